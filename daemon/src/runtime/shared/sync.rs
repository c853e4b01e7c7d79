//! Making durable what was written to shared storage, before another node reads it.
//!
//! The page cache of a kernel writes back when it likes. What the source writes back late would
//! overwrite what the target has written by then. So everything dirty is written back while the
//! workload stands still, and often before, so that little is left then.
//!
//! Pages written through shared mappings are covered: the first store to a clean page of a file
//! marks it dirty in the page cache (`page_mkwrite`), and writing it back makes the page read-only
//! again in every mapping (`folio_mkclean`), so that the next store marks it anew. Nothing that
//! only page tables know is left out.
//!
//! A server that does not answer holds the thread that syncs and nobody else: whoever waits can
//! stop. Descriptors are kept from the survey on, so that an error of any write since is told.
//!
//! Absent: files that only descriptors in flight through a socket lead to, on FUSE.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{fsync, syncfs};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::{oneshot, watch};

use super::{Storage, kind};
use crate::runtime::detached;
use pageferry_sys::ptrace::{self, Shared};
use pageferry_sys::task;

/// The file systems of shared storage, each once.
#[derive(Clone, Debug, Default)]
pub struct FileSystems(Arc<Vec<FileSystem>>);

#[derive(Debug)]
struct FileSystem {
    /// A path on it that was declared.
    path: PathBuf,
    device: u64,
    number: u64,
    file: File,
}

/// A sync under way, on a thread of its own.
#[derive(Debug)]
pub struct Syncing {
    ended: oneshot::Receiver<Result<Duration, Failure>>,
    /// What it is at.
    at: Arc<Mutex<PathBuf>>,
}

impl FileSystems {
    /// Opens what is to be synced.
    pub fn open(storage: &Storage) -> Result<Self, Failure> {
        let mut devices = BTreeSet::new();
        let distinct = storage
            .places
            .iter()
            .filter(|place| devices.insert(place.device));
        let opened = distinct.map(|place| {
            let path = place.path.clone();
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path);
            match file {
                Ok(file) => Ok(FileSystem {
                    path,
                    device: place.device,
                    number: place.number,
                    file,
                }),
                Err(error) => Err(failed(&path, &error)),
            }
        });
        Ok(Self(Arc::new(opened.collect::<Result<_, _>>()?)))
    }

    /// Whether there is nothing to sync.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Begins to sync all of them. `pids` are the workload's processes.
    pub fn begin(&self, pids: Vec<i32>) -> Syncing {
        let at = Arc::new(Mutex::new(PathBuf::new()));
        let (systems, place) = (Arc::clone(&self.0), Arc::clone(&at));
        let ended = detached::begin("sync", move || {
            let began = Instant::now();
            let synced = systems.iter().try_for_each(|system| {
                place
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone_from(&system.path);
                system.sync(&pids)
            });
            synced.map(|()| began.elapsed())
        });
        Syncing { ended, at }
    }
}

impl Syncing {
    /// Waits for its end, for at most `limit`, or until `cancelled` turns true. Returns how long it
    /// took.
    pub async fn ended(
        self,
        limit: Duration,
        mut cancelled: watch::Receiver<bool>,
    ) -> Result<Duration, Failure> {
        let at = || {
            let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
            at.display().to_string()
        };
        let refused = |text: String| Err(Failure::new(ErrorCode::SyncFailed, text));
        tokio::select! {
            ended = self.ended => ended.unwrap_or_else(|_| {
                refused(format!("syncing {} ended without a word", at()))
            }),
            () = tokio::time::sleep(limit) => {
                refused(format!("syncing {} did not end within {limit:?}", at()))
            }
            _ = cancelled.wait_for(|cancelled| *cancelled) => {
                Err(Failure::new(ErrorCode::Aborted, "syncing was cut off"))
            }
        }
    }
}

impl FileSystem {
    fn sync(&self, pids: &[i32]) -> Result<(), Failure> {
        syncfs(&self.file).map_err(|error| failed(&self.path, &error.into()))?;
        if kind::syncfs_waits(self.number) {
            return Ok(());
        }
        self.sync_files(pids)
    }

    /// Syncs each file of this file system that the workload has open for writing. What it has
    /// closed was written back when it was closed; what it has mapped shared and writable is
    /// refused on such a file system.
    fn sync_files(&self, pids: &[i32]) -> Result<(), Failure> {
        let mut synced = BTreeSet::new();
        for pid in pids {
            for path in descriptors(*pid) {
                let Ok(metadata) = fs::metadata(&path) else {
                    continue;
                };
                if !metadata.is_file()
                    || metadata.dev() != self.device
                    || !is_written(&path)
                    || !synced.insert(metadata.ino())
                {
                    continue;
                }
                // Opened anew: an error is the workload's to hear, too, and would be told to one
                // holder of its own descriptor only.
                let done = File::open(&path).and_then(|file| Ok(fsync(&file)?));
                if let Err(error) = done {
                    let name = fs::read_link(&path).unwrap_or(path);
                    return Err(failed(&name, &error));
                }
            }
        }
        Ok(())
    }
}

/// All descriptors of a process. Threads nearly always have one table: each table is listed once.
pub(super) fn descriptors(pid: i32) -> Vec<PathBuf> {
    let mut listed: Vec<i32> = Vec::new();
    // One that has ended has none.
    for tid in task::threads(pid).unwrap_or_default() {
        // Where the kernel does not say, rather once too often.
        let shares = |known: &i32| {
            ptrace::compare(*known, tid, Shared::Files).is_ok_and(|order| order.is_eq())
        };
        if !listed.iter().any(shares) {
            listed.push(tid);
        }
    }
    let list = |tid| fs::read_dir(format!("/proc/{pid}/task/{tid}/fd"));
    listed
        .into_iter()
        .flat_map(|tid| list(tid).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .collect()
}

fn is_written(descriptor: &Path) -> bool {
    // Rather once too often.
    flags(descriptor).is_none_or(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// What a descriptor below `/proc/PID/task/TID/fd` was opened with.
pub(super) fn flags(descriptor: &Path) -> Option<i32> {
    let info = descriptor.to_string_lossy().replacen("/fd/", "/fdinfo/", 1);
    let text = fs::read_to_string(info).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(line.trim(), 8).ok()
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        ErrorCode::SyncFailed,
        format!(
            "what was written to {} cannot be made durable: {error}; nothing was moved",
            path.display()
        ),
    )
}
