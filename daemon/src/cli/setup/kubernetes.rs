//! `pageferry setup kubernetes`: what a node of a cluster needs for pods that come and leave: the
//! program that containerd starts for them, the runtime handler that names it ([`handler`]), and
//! the program by which they keep their addresses ([`network`]).
//!
//! Invariants: what is changed is written down before, whole, so that it can be undone, also after
//! a crash in the middle; a configuration that containerd would read otherwise than before, but for
//! the handler, does not stay; containerd is started anew only if it has not read what is there;
//! nothing is taken away while a pod names the handler, or has an address of another node.
//!
//! Absent: what is the cluster's (`kubectl apply -k deploy/kubernetes`), and the daemon itself.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use pageferry_containerd::{ClientError, SOCKET};
use pageferry_oci::INSTALLED;
use serde::{Deserialize, Serialize};

use super::handler::{Dump, Written};
use super::network::{self, Change, IPAM};
use super::{ANY, LIST_MAX, SetupError, named, put_program, remove as remove_program};

/// The configuration that containerd reads unless it is told otherwise.
pub const CONFIG: &str = "/etc/containerd/config.toml";

/// What has been changed here.
const JOURNAL: &str = "/var/lib/pageferry/setup/kubernetes.json";

/// Where the program for addresses keeps what must outlive a reboot.
const ADDRESSES: &str = "/var/lib/pageferry/ipam";

/// What that has in it; itself last.
const ADDRESS_FOLDERS: [&str; 6] = ["away", "given", "kept", "left", "reserved", ""];

/// How long containerd may take to be there again. With many containers it loads for long.
const START_MAX: Duration = Duration::from_secs(90);
const START_POLL: Duration = Duration::from_millis(200);

/// How it is done.
#[derive(Clone, Debug)]
pub struct How {
    /// containerd's main file.
    pub config: PathBuf,
    /// What starts it anew; none if somebody else does.
    pub restart: Option<String>,
}

/// What has been changed at this node.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Journal {
    /// In the order in which it was done.
    files: Vec<Changed>,
    /// Programs that were put there.
    programs: Vec<PathBuf>,
    /// Folders that were made, the outermost first.
    folders: Vec<PathBuf>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Changed {
    path: PathBuf,
    /// None if it was not there.
    before: Option<String>,
    after: String,
}

/// Prepares the node, or brings it up to date. Says what was done.
pub fn install(how: &How) -> Result<String, SetupError> {
    put_program()?;
    let mut said = vec![format!("{INSTALLED} is there")];
    let journal = Journal::read()?;
    let before = match &journal {
        Some(journal) if !journal.stands() => {
            journal.undo()?;
            dump(&how.config)?
        }
        _ => dump(&how.config)?,
    };
    let mut journal = journal.filter(Journal::stands).unwrap_or_default();
    said.push(add_handler(&how.config, &before, &mut journal)?);
    said.push(add_network(&before, &mut journal)?);
    said.extend(read_again(how, &journal)?);
    Ok(said.join("\n"))
}

/// Whether all of it is done.
pub fn check(how: &How) -> Result<String, SetupError> {
    let missing = |what: String| Err(SetupError::Missing(what));
    let mut said = vec![super::check()?];
    let dump = dump(&how.config)?;
    if !dump.has_handler() {
        return missing("containerd's configuration has no handler pageferry".to_owned());
    }
    if let Some(journal) = Journal::read()?
        && let Some(path) = journal.unread()
    {
        return missing(format!(
            "containerd was started before {} was written",
            path.display()
        ));
    }
    said.push("containerd has the handler pageferry".to_owned());
    let (folder, _) = dump.networks();
    said.push(match find_network(&folder)? {
        None => format!("there is no network in {}", folder.display()),
        Some((path, text)) => match network::wrap(&text) {
            Change::To(_) => return missing(format!("{IPAM} is not in {}", path.display())),
            Change::None => format!("pods keep their addresses, by {}", path.display()),
            Change::Unfit(why) => unkept(&path, &why),
        },
    });
    Ok(said.join("\n"))
}

/// Undoes it, unless a pod needs it.
pub fn remove(how: &How) -> Result<String, SetupError> {
    let is_running = Path::new(SOCKET).exists();
    if is_running {
        let containers = named()?;
        if !containers.is_empty() {
            return Err(SetupError::Named { containers });
        }
    }
    let addresses = addresses();
    if !addresses.is_empty() {
        return Err(SetupError::Addresses { addresses });
    }
    let mut said = Vec::new();
    if let Some(journal) = Journal::read()? {
        let before = dump(&how.config)?;
        let had = journal
            .files
            .iter()
            .any(|one| one.path.extension().is_some_and(is_toml));
        journal.undo()?;
        let after = dump(&how.config)?;
        if let Err(unfit) = after.check_gone(&before) {
            said.push(format!("look at containerd's configuration: {unfit}"));
        }
        said.extend(journal.files.iter().map(|one| match one.before {
            Some(_) => format!("{} is as it was", one.path.display()),
            None => format!("{} is removed", one.path.display()),
        }));
        let removed = journal.programs.iter();
        said.extend(removed.map(|path| format!("{} is removed", path.display())));
        if had && is_running {
            said.push(start_anew(how)?);
        }
    }
    said.push(remove_program()?);
    for name in ADDRESS_FOLDERS {
        // Unless something is in it.
        drop(fs::remove_dir(Path::new(ADDRESSES).join(name)));
    }
    if let Some(folder) = Path::new(INSTALLED).parent() {
        // Unless somebody else has something in it.
        drop(fs::remove_dir(folder));
    }
    Ok(said.join("\n"))
}

/// Adds the handler to containerd's configuration, if it is not in it.
fn add_handler(config: &Path, before: &Dump, journal: &mut Journal) -> Result<String, SetupError> {
    let main = read(config)?;
    let Some(Written { drop_in, main: new }) = before.plan(config, main.as_deref())? else {
        return Ok("containerd's configuration has the handler pageferry".to_owned());
    };
    let (path, text) = drop_in;
    let mut changes = vec![Changed {
        before: read(&path)?,
        after: text,
        path: path.clone(),
    }];
    changes.extend(new.map(|after| Changed {
        path: config.to_owned(),
        before: main,
        after,
    }));
    journal.change(&changes)?;
    let read = dump(config).and_then(|after| Ok(before.check_after(&after)?));
    if let Err(error) = read {
        journal.undo()?;
        return Err(error);
    }
    Ok(format!("{} has the handler pageferry", path.display()))
}

/// Has pods keep their addresses, where the network lets them.
fn add_network(dump: &Dump, journal: &mut Journal) -> Result<String, SetupError> {
    let (folder, programs) = dump.networks();
    let Some((path, text)) = find_network(&folder)? else {
        return Ok(format!(
            "there is no network in {}: run this again when there is one",
            folder.display()
        ));
    };
    let new = match network::wrap(&text) {
        Change::Unfit(why) => return Ok(unkept(&path, &why)),
        Change::To(new) => Some(new),
        Change::None => None,
    };
    let place = programs.iter().find(|folder| folder.is_dir());
    let place = place.ok_or_else(|| {
        let text = format!("none of {programs:?} is there, where programs of networks are to be");
        SetupError::Missing(text)
    })?;
    journal.put(&place.join(IPAM))?;
    if let Some(after) = new {
        let before = Some(text);
        let path = path.clone();
        journal.change(&[Changed {
            path,
            before,
            after,
        }])?;
    }
    Ok(format!("pods keep their addresses, by {}", path.display()))
}

fn unkept(path: &Path, why: &str) -> String {
    format!(
        "pods do not keep their addresses with {}: {why}",
        path.display()
    )
}

fn find_network(folder: &Path) -> Result<Option<(PathBuf, String)>, SetupError> {
    let found = network::find(folder).map_err(failed("cannot list", folder))?;
    let Some(path) = found else { return Ok(None) };
    Ok(read(&path)?.map(|text| (path, text)))
}

/// Starts containerd anew if it has not read what is there.
fn read_again(how: &How, journal: &Journal) -> Result<Option<String>, SetupError> {
    match journal.unread() {
        Some(_) => start_anew(how).map(Some),
        None => Ok(None),
    }
}

/// Starts containerd anew. What runs goes on.
fn start_anew(how: &How) -> Result<String, SetupError> {
    let Some(command) = &how.restart else {
        return Ok("start containerd anew: it has not read its configuration yet".to_owned());
    };
    let before = running()?;
    let status = Command::new("sh").args(["-c", command]).status();
    let ended = status.map_err(failed("cannot run", Path::new(command)))?;
    if !ended.success() {
        return Err(SetupError::Missing(format!("`{command}` failed: {ended}")));
    }
    let deadline = Instant::now() + START_MAX;
    let now = loop {
        match running() {
            Ok(now) => break now,
            Err(error) if deadline < Instant::now() => return Err(error.into()),
            Err(_) => thread::sleep(START_POLL),
        }
    };
    let lost: Vec<String> = before.difference(&now).cloned().collect();
    match lost.is_empty() {
        true => Ok("containerd was started anew, and has what it had".to_owned()),
        false => Err(SetupError::Missing(format!(
            "containerd was started anew, and has no task any more of {}",
            lost.join(", ")
        ))),
    }
}

/// All containers that run.
fn running() -> Result<BTreeSet<String>, ClientError> {
    pageferry_containerd::with((SOCKET.as_ref(), ANY), LIST_MAX, async |client| {
        let mut all = BTreeSet::new();
        for namespace in client.namespaces().await? {
            let client = client.within(&namespace)?;
            for container in client.containers().await? {
                let task = client.task(container.id()).await?;
                if task.is_some_and(|task| task.is_running) {
                    all.insert(format!("{namespace}/{}", container.id()));
                }
            }
        }
        Ok(all)
    })
}

/// What containerd makes of its main file, which need not be there.
fn dump(config: &Path) -> Result<Dump, SetupError> {
    let mut command = Command::new("containerd");
    if config.exists() {
        command.arg("--config").arg(config);
    } else if config != Path::new(CONFIG) {
        let text = format!("there is no {}", config.display());
        return Err(SetupError::Missing(text));
    }
    let output = command.args(["config", "dump"]).output();
    let output = output.map_err(failed("cannot run", Path::new("containerd")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let text = format!("`containerd config dump` failed: {}", said.trim_end());
        return Err(SetupError::Missing(text));
    }
    Ok(Dump::parse(&String::from_utf8_lossy(&output.stdout))?)
}

/// Addresses of pods that have come here or have left, and are not over.
fn addresses() -> Vec<String> {
    let folders = ["kept", "away"].map(|name| Path::new(ADDRESSES).join(name));
    let entries = folders
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok());
    let names = entries.flatten().flatten().map(|entry| entry.path());
    names.map(|path| path.display().to_string()).collect()
}

impl Journal {
    fn read() -> Result<Option<Self>, SetupError> {
        let path = Path::new(JOURNAL);
        match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => {
                let text = read.map_err(failed("cannot read", path))?;
                let journal = serde_json::from_slice(&text).map_err(io::Error::other);
                journal.map(Some).map_err(failed("cannot read", path))
            }
        }
    }

    fn write(&self) -> Result<(), SetupError> {
        let text = serde_json::to_string(self).map_err(io::Error::other);
        let text = text.map_err(failed("cannot write", Path::new(JOURNAL)))?;
        write(Path::new(JOURNAL), &text)
    }

    /// Whether all of it is as it was left.
    fn stands(&self) -> bool {
        let is_as = |one: &Changed| {
            let now = fs::read_to_string(&one.path);
            now.is_ok_and(|now| now == one.after)
        };
        self.files.iter().all(is_as) && self.programs.iter().all(|path| path.exists())
    }

    /// A file that a containerd that runs has not read.
    fn unread(&self) -> Option<&Path> {
        let changed = |path: &Path| fs::metadata(path).and_then(|it| it.modified()).ok();
        // It makes its socket anew when it starts.
        let started: SystemTime = changed(Path::new(SOCKET))?;
        running().ok()?;
        let files = self.files.iter().map(|one| &*one.path);
        let mut files = files.filter(|path| path.extension().is_some_and(is_toml));
        files.find(|path| changed(path).is_some_and(|changed| started < changed))
    }

    /// Makes or changes files, and notes that before.
    fn change(&mut self, changes: &[Changed]) -> Result<(), SetupError> {
        for folder in changes.iter().filter_map(|one| one.path.parent()) {
            if !folder.exists() && !self.folders.iter().any(|made| made == folder) {
                self.folders.push(folder.to_owned());
            }
        }
        self.files.extend_from_slice(changes);
        self.write()?;
        changes
            .iter()
            .try_for_each(|one| write(&one.path, &one.after))
    }

    /// Puts a program of this build there.
    fn put(&mut self, place: &Path) -> Result<(), SetupError> {
        let own = std::env::current_exe().unwrap_or_default();
        let path = own.with_file_name(IPAM);
        let program = fs::read(&path);
        let program = program.map_err(|source| SetupError::Program { path, source })?;
        if !self.programs.iter().any(|there| there == place) {
            self.programs.push(place.to_owned());
            self.write()?;
        }
        if fs::read(place).is_ok_and(|there| there == program) {
            return Ok(());
        }
        // Whoever starts it meanwhile starts the old one or the new one.
        let part = place.with_extension("new");
        let put = fs::write(&part, program)
            .and_then(|()| fs::set_permissions(&part, fs::Permissions::from_mode(0o755)))
            .and_then(|()| fs::rename(&part, place));
        put.map_err(failed("cannot write", place))
    }

    /// Makes all as it was; what somebody has changed since keeps that. Nothing is noted then.
    fn undo(&self) -> Result<(), SetupError> {
        for one in self.files.iter().rev() {
            let now = read(&one.path)?;
            let Some(now) = now else { continue };
            match &one.before {
                Some(before) if now == one.after => write(&one.path, before)?,
                Some(_) if one.path.extension().is_some_and(is_toml) => {
                    write(&one.path, &super::handler::without_imports(&now))?;
                }
                Some(_) => {
                    if let Change::To(text) = network::unwrap(&now) {
                        write(&one.path, &text)?;
                    }
                }
                None => remove_file(&one.path)?,
            }
        }
        self.programs
            .iter()
            .try_for_each(|path| remove_file(path))?;
        for folder in self.folders.iter().rev() {
            // Unless somebody else has something in it.
            drop(fs::remove_dir(folder));
        }
        let journal = Path::new(JOURNAL);
        remove_file(journal)?;
        for folder in journal.ancestors().skip(1).take(1) {
            drop(fs::remove_dir(folder));
        }
        Ok(())
    }
}

fn is_toml(kind: &std::ffi::OsStr) -> bool {
    kind == "toml"
}

fn read(path: &Path) -> Result<Option<String>, SetupError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(failed("cannot read", path)),
    }
}

/// Writes a file that is there whole, as it was or as it is to be, with the mode that it had.
fn write(path: &Path, text: &str) -> Result<(), SetupError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed("cannot create", folder))?;
    }
    let mode = fs::metadata(path).map(|there| there.permissions());
    // Nobody takes it for a configuration.
    let part = path.with_extension("pageferry-new");
    let written = fs::write(&part, text)
        .and_then(|()| match mode {
            Ok(mode) => fs::set_permissions(&part, mode),
            Err(_) => Ok(()),
        })
        .and_then(|()| fs::File::open(&part)?.sync_all())
        .and_then(|()| fs::rename(&part, path));
    written.map_err(failed("cannot write", path))
}

fn remove_file(path: &Path) -> Result<(), SetupError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SetupError + use<> {
    let path = path.to_owned();
    move |source| SetupError::File {
        action,
        path,
        source,
    }
}
