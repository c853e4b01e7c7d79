//! Locks that a workload holds on files which both nodes have.
//!
//! A lock does not move: the frozen source keeps it until the target runs, and the target, which
//! restores it before that, would wait for it. So a workload that holds one is refused, by name.
//! Most programs hold such locks for moments only, and are moved between two of them.
//!
//! What the kernel shows with a descriptor are locks that are held: record locks of the process,
//! those of the open file (`flock`, OFD locks) and leases. Who only waits for one holds nothing.
//! Absent: locks on files that are not shared, which go along.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::files::{deleted, is_shared};
use super::mounts::Mounts;
use super::shared::Storage;

/// A lock that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedLock {
    /// By whom.
    pub pid: i32,
    /// On what.
    pub path: PathBuf,
    /// What the kernel calls it, its range included.
    pub kind: String,
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
    pub fn held(&self, pids: &[i32]) -> Vec<SharedLock> {
        if self.shared.is_empty() {
            return Vec::new();
        }
        let mut all = Vec::new();
        for pid in pids {
            let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
                continue;
            };
            for descriptor in descriptors.flatten() {
                let Some(path) = self.shared_file(&descriptor.path()) else {
                    continue;
                };
                let number = descriptor.file_name();
                let info = Path::new("/proc").join(pid.to_string()).join("fdinfo");
                let info = fs::read_to_string(info.join(number)).unwrap_or_default();
                let found = locks(&info).map(|kind| SharedLock {
                    pid: *pid,
                    path: path.clone(),
                    kind,
                });
                all.extend(found);
            }
        }
        all.dedup();
        all
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

/// The locks that the kernel shows with a descriptor, each without its number and the file's.
fn locks(info: &str) -> impl Iterator<Item = String> + '_ {
    // "lock:  1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99": number, kind, strictness, access,
    // whose, where, from and to.
    info.lines().filter_map(|line| {
        let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
        let (kind, _, access) = (words.next()?, words.next()?, words.next()?);
        let (from, to) = (words.nth(2)?, words.next()?);
        Some(format!("{kind} {access} lock on bytes {from} to {to}"))
    })
}

impl SharedLock {
    /// Why the workload that holds it does not move.
    pub fn refused(&self) -> Failure {
        Failure::new(
            ErrorCode::SharedLock,
            format!(
                "process {} holds a {} of {}, which both nodes share: the target could not take it \
                 before this node gives it up; move the workload when it has none, or keep the \
                 file where only one node has it",
                self.pid,
                self.kind,
                self.path.display()
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use nix::fcntl::{Flock, FlockArg};

    #[test]
    fn locks_are_read_as_the_kernel_shows_them() {
        let info = "pos:\t0\nflags:\t0100002\nmnt_id:\t25\nino:\t42\n\
            lock:\t1: POSIX  ADVISORY  WRITE 4711 00:1f:42 0 99\n\
            lock:\t2: OFDLCK ADVISORY  READ -1 00:1f:42 200 EOF\n\
            lock:\t3: LEASE  ACTIVE    WRITE 4711 00:1f:42 0 EOF\n";
        let found: Vec<String> = locks(info).collect();
        assert_eq!(
            found,
            [
                "POSIX WRITE lock on bytes 0 to 99",
                "OFDLCK READ lock on bytes 200 to EOF",
                "LEASE WRITE lock on bytes 0 to EOF",
            ]
        );
    }

    #[test]
    fn a_lock_is_found_on_shared_files_only_and_as_long_as_it_is_held() {
        let folder = tempfile::tempdir().expect("a folder");
        let own = [i32::try_from(std::process::id()).expect("a pid")];
        let path = folder.path().join("database");
        let locks = |shared: &Path| {
            let storage = Storage::find(&[shared.to_owned()]).expect("it is there");
            Locks::on(&storage, None)
        };
        let file = File::create(&path).expect("a file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
        let lock = lock.expect("nobody else has it");
        let found = locks(folder.path()).held(&own);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].pid, &found[0].path), (own[0], &path));
        assert_eq!(found[0].refused().code(), ErrorCode::SharedLock);
        let elsewhere = tempfile::tempdir().expect("a folder");
        assert!(locks(elsewhere.path()).held(&own).is_empty());
        assert!(Locks::default().held(&own).is_empty());
        // Its name is gone, and it has another.
        fs::hard_link(&path, folder.path().join("other")).expect("a link");
        fs::remove_file(&path).expect("a file");
        assert_eq!(locks(folder.path()).held(&own).len(), 1);
        fs::remove_file(folder.path().join("other")).expect("a file");
        assert!(
            locks(folder.path()).held(&own).is_empty(),
            "nobody else can have it"
        );
        drop(lock);
        assert!(locks(folder.path()).held(&own).is_empty());
    }

    #[test]
    fn a_lock_is_found_whichever_way_leads_to_the_shared_path() {
        let folder = tempfile::tempdir().expect("a folder");
        let own = [i32::try_from(std::process::id()).expect("a pid")];
        let (place, link) = (folder.path().join("place"), folder.path().join("link"));
        fs::create_dir(&place).expect("a folder");
        std::os::unix::fs::symlink(&place, &link).expect("a link");
        let file = File::create(place.join("database")).expect("a file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
        let _lock = lock.expect("nobody else has it");
        for declared in [place.clone(), link, place.join("..").join("place")] {
            let storage = Storage::find(std::slice::from_ref(&declared)).expect("it is there");
            let found = Locks::on(&storage, None).held(&own);
            assert_eq!(found.len(), 1, "{}", declared.display());
        }
    }
}
