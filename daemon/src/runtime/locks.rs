//! Locks that a workload holds on files which both nodes have.
//!
//! Only one node can have such a lock, so it does not go along with the workload: the source lets
//! go of it, and the target takes it. What the kernel shows with a descriptor are locks that are
//! held: record locks of the process, those of the open file (`flock`, OFD locks) and leases. Who
//! only waits for one holds nothing.
//!
//! Two kinds of locks keep a workload from moving: a lease, which a node cannot take without asking
//! all that have the file open; and one that somebody else waits for, who would have it before the
//! target. Most are held, or waited for, for moments only.
//!
//! Absent: locks on files that are not shared, which CRIU carries; waits at other nodes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_inject::locks::{FileLock, Shown};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::files::{deleted, is_shared};
use super::mounts::Mounts;
use super::shared::Storage;

/// What there is of locks on shared files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Those that are held, for each descriptor that leads to one.
    pub held: Vec<FileLock>,
    /// What keeps the workload from moving.
    pub unfit: Vec<Unfit>,
}

/// Why a lock cannot be given from node to node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// It is no lock that could be taken again.
    Kind {
        /// By whom it is held.
        pid: i32,
        /// What the kernel calls it.
        kind: String,
        /// On what.
        path: PathBuf,
    },
    /// Somebody else waits for it.
    Awaited {
        /// The lock.
        lock: FileLock,
        /// Who waits, if the kernel tells.
        by: Option<i32>,
    },
}

/// Which locks on files below `shared` processes hold.
#[derive(Debug, Clone, Default)]
pub struct Locks {
    /// What both nodes have, as open files below are named. With nothing shared nothing is looked
    /// at.
    shared: Vec<PathBuf>,
    /// Where the node has the workload's files, if it has a mount namespace of its own.
    mounts: Option<Mounts>,
}

impl Locks {
    /// Those on `storage`, of a workload that sees `mounts` if these are its own.
    pub fn on(storage: &Storage, mounts: Option<Mounts>) -> Self {
        Self {
            shared: storage.paths().to_vec(),
            mounts,
        }
    }

    /// Whether there can be none.
    pub fn is_empty(&self) -> bool {
        self.shared.is_empty()
    }

    /// All of them, of processes `pids`. Takes some microseconds per descriptor, and for a file
    /// that was deleted as long as its storage takes to answer. Who has ended holds none.
    ///
    /// If they are `frozen`, none of them is shown as waiting: whoever is, is somebody else.
    pub fn find(&self, pids: &[i32], frozen: bool) -> Found {
        let mut found = Found::default();
        if self.shared.is_empty() {
            return found;
        }
        let mut files = Vec::new();
        for pid in pids {
            self.find_of(*pid, &mut found, &mut files);
        }
        if files.is_empty() {
            return found;
        }
        for waiting in Shown::all().iter().filter(|shown| shown.waits) {
            let by = Some(waiting.pid).filter(|pid| 0 < *pid);
            if by.map_or(!frozen, |pid| pids.contains(&pid)) {
                continue;
            }
            let mut held = found.held.iter().zip(&files);
            let lock = held.find(|(lock, file)| waiting.file == **file && lock.excludes(waiting));
            if let Some((lock, _)) = lock {
                let lock = lock.clone();
                found.unfit.push(Unfit::Awaited { lock, by });
            }
        }
        found
    }

    /// Those of one process; `files` are what the kernel calls the files of those that are held.
    fn find_of(&self, pid: i32, found: &mut Found, files: &mut Vec<String>) {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for descriptor in descriptors.flatten() {
            let name = descriptor.file_name();
            let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(path) = self.shared_file(&descriptor.path()) else {
                continue;
            };
            let info = format!("/proc/{pid}/fdinfo/{fd}");
            let info = fs::read_to_string(info).unwrap_or_default();
            let lines = info.lines().filter_map(|line| line.strip_prefix("lock:"));
            for shown in lines.filter_map(Shown::parse) {
                match shown {
                    Ok(shown) => {
                        files.push(shown.file);
                        found.held.push(FileLock {
                            pid,
                            fd,
                            kind: shown.kind,
                            exclusive: shown.exclusive,
                            start: shown.start,
                            bytes: shown.last.map(|last| last - shown.start + 1),
                            path: path.to_string_lossy().into_owned(),
                        });
                    }
                    Err(other) => found.unfit.push(Unfit::Kind {
                        pid,
                        kind: other.0,
                        path: path.clone(),
                    }),
                }
            }
        }
    }

    /// The name of a descriptor's file, if both nodes have it.
    fn shared_file(&self, link: &Path) -> Option<PathBuf> {
        let name = fs::read_link(link).ok()?;
        let old = deleted(&name).map(PathBuf::from);
        let was_deleted = old.is_some();
        let path = old.unwrap_or(name);
        let path = match &self.mounts {
            Some(mounts) => mounts.node_path(&path)?,
            None => path,
        };
        if !is_shared(&path, &self.shared) {
            return None;
        }
        // Without any other name it goes along, as a file of nobody else's.
        if was_deleted && fs::metadata(link).ok()?.nlink() == 0 {
            return None;
        }
        Some(path)
    }
}

impl Unfit {
    /// Why the workload does not move.
    pub fn refused(&self) -> Failure {
        let text = match self {
            Self::Kind { pid, kind, path } => format!(
                "process {pid} holds a {kind} lock on {}, which both nodes share, and that cannot \
                 be given from node to node; move the workload when it has none, or keep the file \
                 where only one node has it",
                path.display()
            ),
            Self::Awaited { lock, by } => {
                let by = by.map_or_else(
                    || "a process outside the workload".to_owned(),
                    |pid| format!("process {pid}, which is not of the workload,"),
                );
                format!(
                    "{by} waits for what process {} holds, a {lock}, which both nodes share: it \
                     would have it before the target; move the workload when nobody waits",
                    lock.pid
                )
            }
        };
        Failure::new(ErrorCode::SharedLock, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::time::{Duration, Instant};

    use nix::fcntl::{Flock, FlockArg};
    use pageferry_inject::locks::LockKind;
    use pageferry_trial::Trial;

    /// The other process of these tests.
    #[test]
    fn workload() {
        pageferry_trial::obey();
    }

    const WORKLOAD: &str = "runtime::locks::tests::workload";

    fn own() -> [i32; 1] {
        [i32::try_from(std::process::id()).expect("a pid")]
    }

    fn below(shared: &Path) -> Locks {
        let storage = Storage::find(&[shared.to_owned()]).expect("it is there");
        Locks::on(&storage, None)
    }

    #[test]
    fn a_lock_is_found_on_shared_files_only_and_as_long_as_it_is_held() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("database");
        let file = File::create(&path).expect("a file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
        let lock = lock.expect("nobody else has it");
        let held = |folder: &Path| below(folder).find(&own(), false).held;
        let found = held(folder.path());
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].pid, Path::new(&found[0].path)),
            (own()[0], &*path)
        );
        assert_eq!((found[0].kind, found[0].exclusive), (LockKind::Flock, true));
        assert_eq!((found[0].start, found[0].bytes), (0, None));
        let elsewhere = tempfile::tempdir().expect("a folder");
        assert!(held(elsewhere.path()).is_empty());
        assert_eq!(Locks::default().find(&own(), false), Found::default());
        // Its name is gone, and it has another.
        fs::hard_link(&path, folder.path().join("other")).expect("a link");
        fs::remove_file(&path).expect("a file");
        assert_eq!(held(folder.path()).len(), 1);
        fs::remove_file(folder.path().join("other")).expect("a file");
        assert!(held(folder.path()).is_empty(), "nobody else can have it");
        drop(lock);
        assert!(held(folder.path()).is_empty());
    }

    #[test]
    fn a_lock_is_found_whichever_way_leads_to_the_shared_path() {
        let folder = tempfile::tempdir().expect("a folder");
        let (place, link) = (folder.path().join("place"), folder.path().join("link"));
        fs::create_dir(&place).expect("a folder");
        std::os::unix::fs::symlink(&place, &link).expect("a link");
        let file = File::create(place.join("database")).expect("a file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
        let _lock = lock.expect("nobody else has it");
        for declared in [place.clone(), link, place.join("..").join("place")] {
            let found = below(&declared).find(&own(), false).held;
            assert_eq!(found.len(), 1, "{}", declared.display());
        }
    }

    #[test]
    fn who_waits_for_a_lock_is_found_unless_it_is_of_the_workload() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("database");
        let locks = below(folder.path());
        for (kind, told) in [("posix", true), ("ofd", false), ("flock", true)] {
            let mut holder = Trial::start(WORKLOAD);
            let mut waiter = Trial::start(WORKLOAD);
            let lock = format!("lock-file {} {kind} write 0 0", path.display());
            holder.tell(&lock);
            let all = [holder.pid(), waiter.pid()];
            let found = locks.find(&all[..1], true);
            assert_eq!((found.held.len(), found.unfit.len()), (1, 0), "{kind}");
            waiter.tell_silently(&format!("{lock} wait"));
            let deadline = Instant::now() + Duration::from_secs(20);
            let found = loop {
                let found = locks.find(&all[..1], true);
                if !found.unfit.is_empty() {
                    break found;
                }
                assert!(
                    Instant::now() < deadline,
                    "nobody waits for the {kind} lock"
                );
            };
            let by = told.then(|| waiter.pid());
            let lock = found.held[0].clone();
            let awaited = [Unfit::Awaited { lock, by }];
            assert_eq!(found.unfit, awaited, "{kind}");
            assert_eq!(found.unfit[0].refused().code(), ErrorCode::SharedLock);
            // Of a workload that runs, some wait for others.
            assert_eq!(locks.find(&all, false).unfit, [], "{kind}");
            // Of one that is frozen nobody is shown who waits.
            let frozen = locks.find(&all, true).unfit;
            assert_eq!(frozen.is_empty(), told, "{kind}");
        }
    }
}
