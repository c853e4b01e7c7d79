//! The command line of an OCI runtime, as far as it must be understood.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// To make the container.
    Create,
    /// To let what was created run.
    Start,
    /// To remove what is left of it.
    Delete,
    /// What is nothing to us.
    Other,
}

/// A command line that is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// What stands before the verb.
    global: Vec<OsString>,
    /// The verb and all behind it.
    rest: Vec<OsString>,
}

/// Flags before the verb that have a value in the next argument.
const GLOBAL_VALUES: [&str; 5] = ["--root", "--log", "--log-format", "--criu", "--rootless"];

const PID_FILE: &str = "--pid-file";

/// Those of `create` that a restore has, too: with a value, and without.
const KEPT_VALUES: [&str; 3] = ["--bundle", PID_FILE, "--console-socket"];
const KEPT: [&str; 1] = ["--no-pivot"];

/// Those of `create` with a value that it does not have.
const DROPPED_VALUES: [&str; 2] = ["--preserve-fds", "--pidfd-socket"];

impl Command {
    /// Reads the arguments of this program.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let mut global = Vec::new();
        let mut arguments = arguments.into_iter();
        let mut rest = Vec::new();
        while let Some(argument) = arguments.next() {
            if !argument.as_bytes().starts_with(b"-") {
                rest.push(argument);
                break;
            }
            let has_value = GLOBAL_VALUES.iter().any(|flag| argument == *flag);
            global.push(argument);
            if has_value {
                global.extend(arguments.next());
            }
        }
        rest.extend(arguments);
        Self { global, rest }
    }

    /// What is asked for.
    pub fn verb(&self) -> Verb {
        match self.rest.first().and_then(|verb| verb.to_str()) {
            Some("create") => Verb::Create,
            Some("start") => Verb::Start,
            Some("delete") => Verb::Delete,
            _ => Verb::Other,
        }
    }

    /// Of which container: the engine's last argument.
    pub fn id(&self) -> Option<&str> {
        let id = self.rest.get(1..)?.last()?.to_str()?;
        // It is to name a file.
        let is_name = !id.is_empty() && !id.starts_with('-') && !id.contains('/');
        Some(id).filter(|id| is_name && ![".", ".."].contains(id))
    }

    /// In which of the engine's name spaces: that of the folder in which the runtime is to keep it.
    pub fn space(&self) -> Option<&str> {
        self.root()?.file_name()?.to_str()
    }

    /// The folder in which the runtime is to keep the container.
    pub fn state(&self) -> Option<PathBuf> {
        Some(self.root()?.join(self.id()?))
    }

    /// Where what goes wrong is to be written, by one JSON object a line.
    pub fn log(&self) -> Option<&Path> {
        self.value("--log").map(Path::new)
    }

    /// The folder of the bundle, of a `create`.
    pub fn bundle(&self) -> Option<&Path> {
        let mut pairs = self.rest.iter().zip(self.rest.iter().skip(1));
        let found = pairs.find(|(name, _)| *name == "--bundle");
        found.map(|(_, value)| Path::new(value))
    }

    fn root(&self) -> Option<&Path> {
        self.value("--root").map(Path::new)
    }

    fn value(&self, flag: &str) -> Option<&OsStr> {
        let mut pairs = self.global.iter().zip(self.global.iter().skip(1));
        let found = pairs.find(|(name, _)| *name == flag);
        found.map(|(_, value)| value.as_os_str())
    }

    /// Where the engine reads which process is the container's, of a `create`.
    pub fn pid_file(&self) -> Option<&Path> {
        let mut pairs = self.rest.iter().zip(self.rest.iter().skip(1));
        let found = pairs.find(|(name, _)| *name == PID_FILE);
        found.map(|(_, value)| Path::new(value))
    }

    /// The same with another such file.
    #[must_use]
    pub fn with_pid_file(mut self, path: &Path) -> Self {
        let is_flag = |name: &OsString| name == PID_FILE;
        if let Some(flag) = self.rest.iter().position(is_flag)
            && let Some(value) = self.rest.get_mut(flag + 1)
        {
            *value = path.into();
        }
        self
    }

    /// The arguments that ask for a restore of what was to be created.
    pub fn restore(&self, images: &Path, work: &Path) -> Vec<OsString> {
        let mut arguments = self.global.clone();
        let added = [
            "restore".as_ref(),
            "--detach".as_ref(),
            // The engine's shim is to be the parent.
            "--no-subreaper".as_ref(),
            "--manage-cgroups-mode".as_ref(),
            "ignore".as_ref(),
            "--image-path".as_ref(),
            images.as_os_str(),
            "--work-path".as_ref(),
            work.as_os_str(),
        ];
        arguments.extend(added.map(OsStr::to_owned));
        let mut given = self.rest.iter().skip(1).peekable();
        while let Some(argument) = given.next() {
            if given.peek().is_none() {
                arguments.push(argument.clone());
            } else if KEPT_VALUES.iter().any(|flag| argument == *flag) {
                arguments.push(argument.clone());
                arguments.extend(given.next().cloned());
            } else if DROPPED_VALUES.iter().any(|flag| argument == *flag) {
                given.next();
            } else if KEPT.iter().any(|flag| argument == *flag) {
                arguments.push(argument.clone());
            }
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(text: &str) -> Command {
        Command::read(text.split(' ').map(OsString::from))
    }

    const CREATE: &str = "--root /run/containerd/runc/default --log /b/log.json --log-format json \
        --systemd-cgroup create --bundle /b --pid-file /b/init.pid --no-new-keyring \
        --preserve-fds 2 --no-pivot web";

    #[test]
    fn a_create_becomes_a_restore_of_the_same() {
        let create = command(CREATE);
        assert_eq!(create.verb(), Verb::Create);
        assert_eq!(
            (create.space(), create.id()),
            (Some("default"), Some("web"))
        );
        assert_eq!(create.log(), Some(Path::new("/b/log.json")));
        assert_eq!(create.bundle(), Some(Path::new("/b")));
        let state = create.state();
        assert_eq!(state, Some("/run/containerd/runc/default/web".into()));
        let restore = create.restore("/m/streams".as_ref(), "/m".as_ref());
        let restore: Vec<&str> = restore.iter().filter_map(|text| text.to_str()).collect();
        assert_eq!(
            restore.join(" "),
            "--root /run/containerd/runc/default --log /b/log.json --log-format json \
             --systemd-cgroup restore --detach --no-subreaper --manage-cgroups-mode ignore \
             --image-path /m/streams --work-path /m --bundle /b --pid-file /b/init.pid \
             --no-pivot web"
        );
        assert_eq!(create.pid_file(), Some(Path::new("/b/init.pid")));
        let other = create.with_pid_file("/b/other.pid".as_ref());
        assert_eq!(other.pid_file(), Some(Path::new("/b/other.pid")));
        assert!(
            other
                .restore("/i".as_ref(), "/w".as_ref())
                .contains(&"/b/other.pid".into())
        );
    }

    #[test]
    fn a_verb_is_where_flags_end() {
        assert_eq!(command("--root /r/create start web").verb(), Verb::Start);
        let delete = command("--root /r delete --force web");
        assert_eq!((delete.verb(), delete.id()), (Verb::Delete, Some("web")));
        assert_eq!(command("--version").verb(), Verb::Other);
        let exec = command("--root /r exec --process /p web");
        assert_eq!(exec.verb(), Verb::Other);
        for none in ["--root /r create", "--root /r create ..", "create a/b", ""] {
            assert_eq!(command(none).id(), None, "{none}");
        }
    }
}
