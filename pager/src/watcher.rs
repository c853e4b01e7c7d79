//! The watcher: a process that does nothing, and so does not die with the pager.
//!
//! When the last holder of a userfaultfd goes, threads that wait for a page read zeros. So there
//! are two holders. The watcher is forked from the pager before it has any thread, *sharing its
//! table of descriptors*: a userfaultfd that arrives, or that the kernel makes when a process
//! forks, is held by both from the instant at which it exists. (Sending a duplicate leaves some
//! microseconds between the reading of a fork event and the sending, in which the death of the
//! pager would let the child read zeros.) What the pager closes is closed for both.
//!
//! It is in other cgroups than the pager, so that nothing that kills a cgroup kills both.
//!
//! When the pager has died:
//! - after `Go`: the tree's cgroup is frozen, the file `fill-lost` is written, every descriptor but
//!   the userfaultfds is closed, and those are kept until the cgroup is empty. The tree never reads
//!   a wrong byte; it will not run again either.
//! - before `Go`: nothing of the tree has run. Closing the socket to CRIU makes CRIU kill it; the
//!   watcher kills what is left and writes `restore-lost`.
//! - after the end: nothing.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use pageferry_cgroup::freezer::Freezer;
use pageferry_cgroup::identity::FolderId;
use pageferry_sys::fdpass::{self, Fork};
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::marks::{FILL_LOST, RESTORE_LOST};

/// How often the watcher looks whether the frozen cgroup has been emptied.
const EMPTY_POLL: Duration = Duration::from_millis(500);

/// How long tasks that never ran may take to die before it is said that they do not.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest message to the watcher, in bytes: a path.
const MESSAGE_BYTES_MAX: usize = 8 << 10; // 8 KiB

/// The pager's side.
#[derive(Debug)]
pub struct Watcher {
    socket: OwnedFd,
    pidfd: OwnedFd,
}

/// Why there is no watcher, or why it cannot be told something.
#[derive(Debug, thiserror::Error)]
pub enum WatcherError {
    /// It could not be started.
    #[error("cannot start the watcher")]
    Start(#[source] io::Error),
    /// It could not be put into a cgroup of its own. It ends with the pager.
    #[error("cannot put the watcher into the cgroup of {path}")]
    Cgroup {
        /// Its `cgroup.procs`.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is gone.
    #[error("the watcher has died")]
    Gone,
    /// It could not be told.
    #[error("cannot tell the watcher")]
    Tell(#[source] io::Error),
}

/// What it is told; the last word counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    /// A tree is being restored in this cgroup.
    Hold {
        freezer: PathBuf,
        id: Option<FolderId>,
    },
    /// It runs and its memory is not complete.
    Run {
        freezer: PathBuf,
        id: Option<FolderId>,
    },
    /// It is complete, or nothing is left of it.
    Done,
}

impl Watcher {
    /// Forks the watcher of the calling process, which must have one thread. Files are written to
    /// `directory`. It is moved into the cgroups with these `cgroup.procs` files.
    pub fn start(directory: &Path, cgroup_procs: &[PathBuf]) -> Result<Self, WatcherError> {
        let start = |errno: nix::errno::Errno| WatcherError::Start(errno.into());
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(start)?;
        let own = fdpass::open_process(Pid::this()).map_err(WatcherError::Start)?;
        match fdpass::fork_sharing_descriptors().map_err(WatcherError::Start)? {
            Fork::Child => {
                watch(&own, &theirs, directory);
                std::process::exit(0)
            }
            Fork::Parent { child } => {
                // Both are open in the watcher's memory, and the table is one: never close them
                // here.
                std::mem::forget((own, theirs));
                let pidfd = fdpass::open_process(child).map_err(WatcherError::Start)?;
                for path in cgroup_procs {
                    fs::write(path, child.to_string()).map_err(|source| WatcherError::Cgroup {
                        path: path.clone(),
                        source,
                    })?;
                }
                Ok(Self {
                    socket: ours,
                    pidfd,
                })
            }
        }
    }

    /// A tree is being restored into this cgroup.
    pub fn hold(&self, cgroup: &Freezer) -> Result<(), WatcherError> {
        self.tell(&Word::Hold {
            freezer: cgroup.path().to_owned(),
            id: cgroup.id(),
        })
    }

    /// From now on the tree may run.
    pub fn run(&self, cgroup: &Freezer) -> Result<(), WatcherError> {
        self.tell(&Word::Run {
            freezer: cgroup.path().to_owned(),
            id: cgroup.id(),
        })
    }

    /// The tree is complete, or nothing is left of it.
    pub fn done(&self) -> Result<(), WatcherError> {
        self.tell(&Word::Done)
    }

    /// Whether the watcher lives.
    pub fn is_alive(&self) -> bool {
        !is_ready(self.pidfd.as_fd())
    }

    /// Becomes readable when the watcher dies.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    fn tell(&self, word: &Word) -> Result<(), WatcherError> {
        // A message in its socket is as good as read: it is read before the pager's death counts.
        if !self.is_alive() {
            return Err(WatcherError::Gone);
        }
        let bytes = serde_json::to_vec(word).map_err(|error| WatcherError::Tell(error.into()))?;
        fdpass::send(self.socket.as_fd(), &bytes, &[]).map_err(WatcherError::Tell)
    }
}

fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
    // Anything but a clear "no" counts as ready.
    poll(&mut polled, PollTimeout::ZERO) != Ok(0)
}

/// The life of the watcher.
fn watch(pager: &OwnedFd, socket: &OwnedFd, directory: &Path) {
    // The name only helps whoever looks at a list of processes.
    let _ = nix::sys::prctl::set_name(c"pageferry-watch");
    // It ends by itself or is killed. Without this a signal to the process group would end it.
    let _ = SigSet::all().thread_block();
    let mut last = Word::Done;
    loop {
        let mut polled = [
            PollFd::new(pager.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            // Out of memory, say. The descriptors must be kept whatever happens.
            Err(_) => std::thread::sleep(EMPTY_POLL),
        }
        let died = is_ready(pager.as_fd());
        while let Ok(packet) = fdpass::receive(socket.as_fd(), MESSAGE_BYTES_MAX) {
            match serde_json::from_slice(&packet.bytes) {
                Ok(word) => last = word,
                Err(_) => break,
            }
        }
        if died {
            return end(&last, directory);
        }
    }
}

fn end(last: &Word, directory: &Path) {
    match last {
        Word::Done => {}
        Word::Run { freezer, id } => {
            let named = Freezer::again(freezer.clone(), *id);
            let (cgroup, frozen) = match named.clone().opened() {
                Ok(cgroup) => {
                    let frozen = cgroup.begin_freeze();
                    (Some(cgroup), frozen)
                }
                Err(error) => (None, Err(error)),
            };
            let held = match &frozen {
                Ok(()) => "is frozen".to_owned(),
                Err(error) => format!("cannot be frozen ({error}); waiting threads stay blocked"),
            };
            let path = freezer.display();
            let text = format!("the pager died with pages missing; the workload in {path} {held}");
            note(directory, FILL_LOST, &text);
            close_all_but_userfaultfds();
            // A cgroup that is gone was empty; one that cannot be used may hold the workload.
            while match &cgroup {
                Some(cgroup) => !cgroup.is_empty(),
                None => named.exists(),
            } {
                std::thread::sleep(EMPTY_POLL);
            }
        }
        Word::Hold { freezer, id } => {
            note(
                directory,
                RESTORE_LOST,
                "the pager died before the tree was let go",
            );
            close_all_but_userfaultfds();
            // Whoever does not die keeps the descriptors, and with them every promise.
            while let Ok(cgroup) = Freezer::again(freezer.clone(), *id).opened()
                && let Err(error) = cgroup.kill(KILL_TIMEOUT)
            {
                error!(%error, "tasks that never ran do not die");
            }
        }
    }
}

/// Writes one line into a file that is there whole or not at all.
fn note(directory: &Path, name: &str, text: &str) {
    error!("{name}: {text}");
    let unfinished = directory.join(format!("{name}.new"));
    let written = fs::write(&unfinished, format!("{name}: {text}\n"))
        .and_then(|()| fs::rename(&unfinished, directory.join(name)));
    if let Err(error) = written {
        error!(%error, "cannot write {name}");
    }
}

/// Lets go of all that the pager had open: the socket whose end tells CRIU, the stores. Standard
/// error stays.
fn close_all_but_userfaultfds() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<RawFd> = entries
        .flatten()
        .filter(|entry| {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            !target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"anon_inode:[userfaultfd]")
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|number| *number != libc::STDERR_FILENO)
        .collect();
    for number in numbers {
        // Fails for the descriptor of the directory that was read, which is closed already.
        let _ = nix::unistd::close(number);
    }
}
