//! Locks that a workload holds on files which both nodes have.
//!
//! Only one node can have such a lock, so it does not go along with the workload: the source lets
//! go of it, and the target takes it. What the kernel shows with a descriptor are locks that are
//! held: record locks of the process, those of the open file (`flock`, OFD locks) and leases. Who
//! only waits for one holds nothing.
//!
//! A FUSE server may keep record locks itself: it is asked about each of its files, which opens it
//! anew. Two kinds of locks keep a workload from moving: a lease, which a node cannot take without
//! asking all that have the file open; and one that somebody else waits for, who would have it
//! before the target. Most are held, or waited for, for moments only.
//!
//! Absent: locks on files that are not shared, which CRIU carries; waits at other nodes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_inject::locks::{FileLock, Shown, ShownKind};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::task;

mod outsiders;
mod served;

use super::files::{deleted, is_shared};
use super::mounts::Mounts;
use super::shared::Storage;
use super::shared::kind::may_hide_locks;

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
    /// A process that stays has the same open file, and with it the lock.
    Outside {
        /// The lock.
        lock: FileLock,
        /// Who stays.
        with: i32,
    },
    /// The server of its file keeps it, and the kernel knows nothing of it.
    Served {
        /// Who has the file open.
        pid: i32,
        /// The file.
        path: PathBuf,
    },
    /// It cannot be told what there is.
    Unknown {
        /// What was looked at.
        what: String,
        /// Why it failed.
        why: String,
    },
}

/// Which locks on files below `shared` processes hold.
#[derive(Debug, Clone, Default)]
pub struct Locks {
    /// What both nodes have, as open files below are named. With nothing shared nothing is looked
    /// at.
    storage: Storage,
    /// Where the node has the workload's files, if it has a mount namespace of its own.
    mounts: Option<Mounts>,
}

impl Locks {
    /// Those on `storage`, of a workload that sees `mounts` if these are its own.
    pub fn on(storage: &Storage, mounts: Option<Mounts>) -> Self {
        Self {
            storage: storage.clone(),
            mounts,
        }
    }

    /// Whether there can be none.
    pub fn is_empty(&self) -> bool {
        self.storage.is_empty()
    }

    /// All of them, of processes `pids`. Takes some microseconds per descriptor, and for a file
    /// that was deleted as long as its storage takes to answer. Who has ended holds none.
    ///
    /// If they are `frozen`, none of them is shown as waiting: whoever is, is somebody else.
    pub fn find(&self, pids: &[i32], frozen: bool) -> Found {
        let mut found = Found::default();
        if self.storage.is_empty() {
            return found;
        }
        for pid in pids {
            if let Err(error) = self.find_of(*pid, frozen, &mut found) {
                let what = format!("the open files of process {pid}");
                found.unfit.push(Unfit::unknown(what, &error));
            }
        }
        match awaited(&found.held, pids, frozen) {
            Ok(awaited) => found.unfit.extend(awaited),
            Err(error) => {
                let what = "who waits for the workload's locks".to_owned();
                found.unfit.push(Unfit::unknown(what, &error));
            }
        }
        found
    }

    /// Those of one process. Servers are asked about those that are `frozen` alone. Only that it
    /// has ended, or has closed a file, means that there are none.
    fn find_of(&self, pid: i32, frozen: bool, found: &mut Found) -> io::Result<()> {
        let Some(descriptors) = there(fs::read_dir(format!("/proc/{pid}/fd")))? else {
            return Ok(());
        };
        let mut started = None;
        for descriptor in descriptors {
            let Some(descriptor) = there(descriptor)? else {
                continue;
            };
            let name = descriptor.file_name();
            let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(path) = self.shared_file(&descriptor.path())? else {
                continue;
            };
            let number = self.storage.number_at(&path);
            if frozen
                && number.is_some_and(may_hide_locks)
                && served::is_locked(&descriptor.path())?
            {
                let path = path.clone();
                found.unfit.push(Unfit::Served { pid, path });
            }
            let info = there(fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")))?;
            for shown in Shown::of_descriptor(&info.unwrap_or_default())? {
                let kind = match shown.kind {
                    ShownKind::Lock(kind) => kind,
                    ShownKind::Other(kind) => {
                        let path = path.clone();
                        found.unfit.push(Unfit::Kind { pid, kind, path });
                        continue;
                    }
                };
                if started.is_none() {
                    started = there(task::start_time(pid))?;
                }
                found.held.push(FileLock {
                    pid,
                    fd,
                    kind,
                    exclusive: shown.exclusive,
                    start: shown.start,
                    bytes: shown.last.map(|last| last - shown.start + 1),
                    path: path.to_string_lossy().into_owned(),
                    file: Some(shown.file),
                    started,
                });
            }
        }
        Ok(())
    }

    /// The name of a descriptor's file, if both nodes have it.
    fn shared_file(&self, link: &Path) -> io::Result<Option<PathBuf>> {
        let Some(name) = there(fs::read_link(link))? else {
            return Ok(None);
        };
        let old = deleted(&name).map(PathBuf::from);
        let was_deleted = old.is_some();
        let path = old.unwrap_or(name);
        let path = match &self.mounts {
            Some(mounts) => match mounts.node_path(&path) {
                Some(path) => path,
                None => return Ok(None),
            },
            None => path,
        };
        if !is_shared(&path, self.storage.paths()) {
            return Ok(None);
        }
        // Without any other name it goes along, as a file of nobody else's.
        if was_deleted && there(fs::metadata(link))?.is_none_or(|file| file.nlink() == 0) {
            return Ok(None);
        }
        Ok(Some(path))
    }
}

/// What was read of a process; none if that has ended, or has closed what was asked about. Nothing
/// else means that there is nothing.
fn there<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if task::tells_of_end(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One of `held` for which somebody waits who is none of `pids`. If these are `frozen`, none of
/// them is shown as waiting.
pub fn awaited(held: &[FileLock], pids: &[i32], frozen: bool) -> io::Result<Option<Unfit>> {
    if held.is_empty() {
        return Ok(None);
    }
    let waiting = Shown::all()?.into_iter().filter(|shown| shown.waits);
    let found = waiting.filter_map(|waiting| {
        let by = Some(waiting.pid).filter(|pid| 0 < *pid);
        if by.map_or(!frozen, |pid| pids.contains(&pid)) {
            return None;
        }
        let is_it =
            |lock: &&FileLock| lock.file.as_ref() == Some(&waiting.file) && lock.excludes(&waiting);
        let lock = held.iter().find(is_it)?.clone();
        Some(Unfit::Awaited { lock, by })
    });
    Ok(found.into_iter().next())
}

/// What keeps `held` from being given away that was not there when they were found, or takes longer
/// to look for than a moment: all processes are `pids`, and frozen.
pub fn check_again(held: &[FileLock], pids: &[i32]) -> Result<(), Failure> {
    let unfit = awaited(held, pids, true).and_then(|found| match found {
        Some(awaited) => Ok(Some(awaited)),
        None => outsiders::find(held, pids),
    });
    match unfit {
        Ok(None) => Ok(()),
        Ok(Some(unfit)) => Err(unfit.refused()),
        Err(error) => {
            let what = "who else has to do with the workload's locks".to_owned();
            Err(Unfit::unknown(what, &error).refused())
        }
    }
}

impl Unfit {
    fn unknown(what: String, error: &io::Error) -> Self {
        let why = error.to_string();
        Self::Unknown { what, why }
    }

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
            Self::Outside { lock, with } => format!(
                "process {with}, which is not of the workload, has the open file by which process \
                 {} holds a {lock}, which both nodes share: it would go on as if it had that lock; \
                 move the workload when it has closed the file, or the two of them as one tree",
                lock.pid
            ),
            Self::Served { pid, path } => format!(
                "{}, which process {pid} has open, is locked at its server, which keeps such locks \
                 from the kernel, so that they cannot be given from node to node; move the \
                 workload when nobody has one",
                path.display()
            ),
            Self::Unknown { what, why } => format!(
                "it cannot be told which locks the workload has on what both nodes share: looking \
                 at {what} failed: {why}"
            ),
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

    use crate::runtime::shared::tests::fuse::Fuse;

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
            assert!(found.held[0].started.is_some());
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

    #[test]
    fn an_open_file_that_a_process_outside_has_too_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("database");
        let locks = below(folder.path());
        for (kind, beside) in [("flock", "posix"), ("ofd", "flock")] {
            let mut holder = Trial::start(WORKLOAD);
            holder.tell(&format!("lock-file {} {kind} write 0 0", path.display()));
            let pids = [holder.pid()];
            let held = locks.find(&pids, true).held;
            assert_eq!(held.len(), 1, "{kind}");
            assert_eq!(check_again(&held, &pids), Ok(()), "{kind}");
            // Another open file of the same name is nothing to it.
            let mut other = Trial::start(WORKLOAD);
            other.tell(&format!("lock-file {} {beside} read 0 1", path.display()));
            let alone = check_again(&held, &pids);
            drop(other);
            assert_eq!(alone, Ok(()), "{kind}");
            let child: i32 = holder.tell("fork").parse().expect("a pid");
            let failure = check_again(&held, &pids).expect_err("the child has it");
            assert_eq!(failure.code(), ErrorCode::SharedLock);
            let text = failure.text();
            assert!(
                text.starts_with(&format!("process {child}, which")),
                "{text}"
            );
            // As one tree they move.
            assert_eq!(check_again(&held, &[pids[0], child]), Ok(()), "{kind}");
            // A record lock is of its process alone.
            let record = FileLock {
                kind: LockKind::Posix,
                ..held[0].clone()
            };
            assert_eq!(check_again(&[record], &pids), Ok(()), "{kind}");
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }

    #[test]
    fn what_cannot_be_looked_at_keeps_the_workload_from_moving() {
        let gone = io::Error::from_raw_os_error(libc::ESRCH);
        assert_eq!(there::<()>(Err(gone)).expect("it has ended"), None);
        let full = io::Error::from_raw_os_error(libc::EMFILE);
        assert!(there::<()>(Err(full)).is_err());
        let unfit = Unfit::unknown("it".to_owned(), &io::Error::other("no"));
        assert_eq!(unfit.refused().code(), ErrorCode::SharedLock);
        // Who has ended holds none.
        let folder = tempfile::tempdir().expect("a folder");
        let found = below(folder.path()).find(&[i32::MAX], true);
        assert_eq!(found, Found::default());
    }

    #[test]
    fn a_lock_that_a_fuse_server_keeps_is_found_by_asking() {
        let folder = tempfile::tempdir().expect("a folder");
        for serves in [true, false] {
            let place = folder.path().join(format!("{serves}"));
            fs::create_dir(&place).expect("a folder");
            let fuse = if serves {
                Fuse::mount_locking(&place)
            } else {
                Fuse::mount(&place)
            };
            let path = fuse.path.join("data");
            let mut holder = Trial::start(WORKLOAD);
            File::create(&path).expect("a file");
            let locks = below(&fuse.path);
            let fd = holder.tell(&format!("lock-file {} posix write 0 0", path.display()));
            let found = locks.find(&[holder.pid()], true);
            let pid = holder.pid();
            if serves {
                assert_eq!(found.held, [], "the kernel knows of none");
                assert_eq!(found.unfit, [Unfit::Served { pid, path }]);
                assert_eq!(found.unfit[0].refused().code(), ErrorCode::SharedLock);
            } else {
                assert_eq!((found.held.len(), found.unfit), (1, Vec::new()));
            }
            holder.tell(&format!("close {fd}"));
            assert_eq!(locks.find(&[pid], true), Found::default());
        }
    }
}
