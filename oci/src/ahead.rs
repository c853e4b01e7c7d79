//! What stands for a container of a pod until it is restored, and as long as it runs.
//!
//! ```text
//! engine ─► create ─► holder ─► runtime ─► (the container's first process)
//!             │          └──────────────────► reaps it, and ends as it has ended
//!             └─ ends when the runtime waits: the engine has the holder's number
//! ```
//!
//! The holder is in the container's cgroups while the engine looks where those are, and leaves them
//! when the engine starts the container: nobody is in them then but the container.
//!
//! Invariants: the runtime dies with the holder, and until the container is restored the holder
//! dies with its parent, which is `create` and then the engine's shim: whoever loses the one has no
//! container that comes up later. Only a `create` that has told the engine may end before that. The
//! holder outlives what it holds, and by nothing but a `wait`.
//!
//! Absent: signals for the container. An engine sends them by the runtime, which knows the
//! container's own process.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{self, Child};

use nix::errno::Errno;
use nix::sys::prctl::{set_child_subreaper, set_name, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use pageferry_cgroup::hierarchies::Hierarchies;

use crate::order::{Held, Orders};

/// How this program is started as the holder, and as what becomes the runtime: as its first
/// argument, where an engine has flags or a verb of a runtime's.
pub const HOLD: &str = "pageferry-hold";
pub const BECOME: &str = "pageferry-become";

/// Of an engine's name space and its name for the container.
pub type Named<'a> = (&'a str, &'a str);

/// This program, which may have been replaced since it was started.
pub const THIS: &str = "/proc/self/exe";

/// What the holder ends with if the container was never restored.
const NEVER: i32 = 128;

/// Starts the holder of a container, with the standard streams of this process, which is a `create`
/// and is to write the holder's number to `engine_file`. `gate` is where the runtime finds its
/// programs, and it writes the container's process into `own_file` when it is restored by these
/// `arguments`.
///
/// # Errors
/// When it is not started.
pub fn start(
    (space, id): Named<'_>,
    gate: &Path,
    (engine_file, own_file): (&Path, &Path),
    arguments: &[OsString],
) -> io::Result<Child> {
    let mut command = process::Command::new(THIS);
    command.arg(HOLD).args([space, id]);
    command.arg(process::id().to_string());
    command.arg(engine_file).arg(own_file).arg(gate);
    command.args(arguments).spawn()
}

/// What the holder is started with, before what the runtime is.
pub const HOLD_ARGUMENTS: usize = 6;

/// Holds a container: starts its runtime, and ends as it does. `arguments` are those behind
/// [`HOLD`].
///
/// # Errors
/// Why nothing is held.
pub fn hold(arguments: &[OsString]) -> Result<i32, String> {
    let [space, id, create, engine_file, own_file, rest @ ..] = arguments else {
        return Err("a holder is started with what it holds".to_owned());
    };
    let (Some(space), Some(id)) = (space.to_str(), id.to_str()) else {
        return Err("what is held has no name".to_owned());
    };
    let create = create.to_str().and_then(|pid| pid.parse().ok());
    let create: u32 = create.ok_or("a holder is started by a create")?;
    // It would be called by the file that it was started from.
    set_name(c"pageferry-oci").map_err(|error| format!("taking its name: {error}"))?;
    // What the runtime restores becomes its child, and then ours.
    set_child_subreaper(true).map_err(|error| format!("becoming a subreaper: {error}"))?;
    let signals = SigSet::from_iter([Signal::SIGCHLD, ORPHANED]);
    let blocked = signals.thread_block();
    blocked.map_err(|error| format!("blocking signals: {error}"))?;
    set_pdeathsig(ORPHANED).map_err(|error| format!("binding to its parent: {error}"))?;
    if parent_id() != create {
        return Err("the create that has started it has ended".to_owned());
    }
    let own_file = PathBuf::from(own_file);
    let _ = fs::remove_file(&own_file);
    let runtime = process::Command::new(THIS).arg(BECOME).args(rest).spawn();
    let runtime = runtime.map_err(|error| format!("starting the runtime: {error}"))?;
    let held = Held {
        holder: process::id().cast_signed(),
        runtime: runtime.id().cast_signed(),
    };
    let said = Orders::of_node().hold(space, id, held);
    said.map_err(|error| error.to_string())?;
    close_streams().map_err(|error| format!("closing its streams: {error}"))?;
    let mut holding = Holding {
        runtime: held.runtime,
        create: Some(PathBuf::from(engine_file)),
        parent: create,
        own_file,
        root: None,
        ended: BTreeMap::new(),
    };
    loop {
        let signal = signals.wait();
        let signal = signal.map_err(|error| format!("waiting for signals: {error}"))?;
        let code = match signal {
            ORPHANED => holding.orphaned(),
            _ => holding.reap(),
        };
        if let Some(code) = code {
            return Ok(code);
        }
    }
}

/// What a holder knows.
#[derive(Debug)]
struct Holding {
    runtime: i32,
    /// Until `create` has ended: where that tells the engine of this process.
    create: Option<PathBuf>,
    parent: u32,
    /// Where the runtime writes the container's process.
    own_file: PathBuf,
    /// That, once it is restored.
    root: Option<i32>,
    /// How children have ended, as a shell has it.
    ended: BTreeMap<i32, i32>,
}

impl Holding {
    /// Its parent has ended, or a thread of that; what it ends with, if it does.
    fn orphaned(&mut self) -> Option<i32> {
        let parent = parent_id();
        if parent == self.parent {
            return None;
        }
        self.parent = parent;
        let create = self.create.take();
        let own = process::id().cast_signed();
        let has_told = create.is_some_and(|file| read_pid(&file) == Some(own));
        // What runs is the engine's to end.
        (!has_told && self.root.is_none()).then_some(NEVER)
    }

    /// Takes note of children that have ended; what it ends with, if it does.
    fn reap(&mut self) -> Option<i32> {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid.as_raw(), status),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), NEVER + signal as i32),
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => continue,
                // Nobody is left.
                Err(_) => return Some(self.code().unwrap_or(NEVER)),
            };
            if pid == self.runtime {
                self.root = (status == 0).then(|| read_pid(&self.own_file)).flatten();
                if self.root.is_none() {
                    return Some(NEVER);
                }
            }
            self.ended.insert(pid, status);
        }
        self.code()
    }

    /// How what was restored has ended, if it has.
    fn code(&self) -> Option<i32> {
        self.ended.get(&self.root?).copied()
    }
}

/// By which the kernel says that its parent has ended.
const ORPHANED: Signal = Signal::SIGUSR1;

fn read_pid(path: &Path) -> Option<i32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// They are the container's: whoever reads its output is to see its end.
fn close_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

/// Has this process, which becomes the runtime, die with the holder that has started it. The rest
/// of its arguments, behind the gate.
///
/// # Errors
/// When it would outlive that.
pub fn bind_to_holder(arguments: &[OsString]) -> Result<(PathBuf, &[OsString]), String> {
    let holder = parent_id();
    // The holder's is inherited.
    let unblocked = SigSet::empty().thread_set_mask();
    unblocked.map_err(|error| format!("unblocking signals: {error}"))?;
    set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("binding to the holder: {error}"))?;
    let [gate, rest @ ..] = arguments else {
        return Err("a runtime is started with its gate".to_owned());
    };
    match parent_id() == holder && holder != 1 {
        true => Ok((gate.into(), rest)),
        false => Err("the holder has ended".to_owned()),
    }
}

/// Puts process `pid` into the cgroups that process `of` is in.
///
/// # Errors
/// When it is not in all of them.
pub fn join(pid: i32, of: i32) -> Result<(), String> {
    let all = Hierarchies::detect().map_err(|error| error.to_string())?;
    for hierarchy in all.iter() {
        let Some(folder) = hierarchy.current(of) else {
            continue;
        };
        if hierarchy.current(pid).as_ref() == Some(&folder) {
            continue;
        }
        let procs = folder.join("cgroup.procs");
        let joined = fs::write(&procs, pid.to_string());
        joined.map_err(|error| format!("joining {}: {error}", procs.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn holding(runtime: i32, own_file: &Path) -> Holding {
        Holding {
            runtime,
            create: None,
            parent: parent_id(),
            own_file: own_file.to_owned(),
            root: None,
            ended: BTreeMap::new(),
        }
    }

    fn shell(script: &str) -> i32 {
        let child = process::Command::new("/bin/sh")
            .args(["-c", script])
            .spawn();
        child.unwrap().id().cast_signed()
    }

    fn end_of(mut holding: Holding) -> i32 {
        loop {
            if let Some(code) = holding.reap() {
                return code;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    // One after the other: each waits for any child.
    #[test]
    fn a_holder_ends_as_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let restored = shell("exit 3");
        fs::write(&file, restored.to_string()).unwrap();
        assert_eq!(end_of(holding(shell("exit 0"), &file)), 3);
        let killed = shell("kill -KILL $$");
        fs::write(&file, killed.to_string()).unwrap();
        assert_eq!(end_of(holding(shell("exit 0"), &file)), NEVER + 9);
        // A runtime that has failed has restored nothing, whatever is left in the file.
        assert_eq!(end_of(holding(shell("exit 1"), &file)), NEVER);
    }

    #[test]
    fn whoever_loses_its_parent_goes_on_only_if_that_has_told_the_engine() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("engine");
        let orphan = |told: bool, root| {
            let text = if told { process::id() } else { 1 };
            fs::write(&file, text.to_string()).unwrap();
            let mut holding = Holding {
                create: Some(file.clone()),
                parent: 0,
                root,
                ..holding(0, &file)
            };
            // The next one is the engine's shim.
            let first = holding.orphaned();
            assert_eq!(holding.orphaned(), None);
            holding.parent = 0;
            (first, holding.orphaned())
        };
        assert_eq!(orphan(false, None).0, Some(NEVER));
        assert_eq!(orphan(true, None), (None, Some(NEVER)));
        assert_eq!(orphan(true, Some(7)), (None, None));
    }
}
