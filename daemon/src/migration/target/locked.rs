//! File locks of a workload that comes, which its source has until it has committed.
//!
//! The list of them is among the images. What is in it is taken out of CRIU's own image, since CRIU
//! would take it, or wait for it, in its restore; the pager takes it when the source has let go.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use criu_glue::image::file_locks;
use pageferry_inject::locks::{self, FileLock};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::shared::LOCKS_FILE;

use super::images::criu_failed;

/// Fails unless the lists of all members have as many locks as the source says.
pub(super) fn check(images: &[PathBuf], said: u32) -> Result<(), Failure> {
    let lists = images.iter().map(|folder| listed(folder));
    let found: usize = lists
        .map(|list| list.map(|list| list.len()))
        .sum::<Result<_, _>>()?;
    if u32::try_from(found) == Ok(said) {
        return Ok(());
    }
    let text = format!("{LOCKS_FILE} lists {found} file locks, and the source says {said}");
    Err(Failure::new(ErrorCode::Malformed, text))
}

/// Takes the listed locks out of what CRIU restores; whether there are any. `spaces` tells whether
/// a process is restored.
pub(super) fn take_out(images: &Path, is_there: impl Fn(u32) -> bool) -> Result<bool, Failure> {
    let listed = listed(images)?;
    let is_missing = |lock: &&FileLock| !u32::try_from(lock.pid).is_ok_and(&is_there);
    if let Some(lock) = listed.iter().find(is_missing) {
        let text = format!(
            "{LOCKS_FILE} has a {lock} for process {}, which is none",
            lock.pid
        );
        return Err(Failure::new(ErrorCode::Malformed, text));
    }
    let ours: HashSet<(i32, i32)> = listed.iter().map(|lock| (lock.pid, lock.fd)).collect();
    let taken = file_locks::take_out(images, |pid, fd| ours.contains(&(pid, fd)));
    let taken = taken.map_err(|error| criu_failed(&error))?;
    tracing::debug!(listed = listed.len(), taken, "file locks are taken later");
    Ok(!listed.is_empty())
}

/// None without a list.
fn listed(images: &Path) -> Result<Vec<FileLock>, Failure> {
    match locks::read(&images.join(LOCKS_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|error| {
            let text = format!("{LOCKS_FILE} of the source is no list of file locks: {error}");
            Failure::new(ErrorCode::Malformed, text)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_inject::locks::LockKind;

    #[test]
    fn a_list_must_be_as_long_as_said_and_of_processes_that_come() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = folder.path();
        let all = [images.to_owned()];
        assert_eq!(check(&all, 0), Ok(()));
        let code = |checked: Result<_, Failure>| checked.expect_err("malformed").code();
        assert_eq!(code(check(&all, 1).map(drop)), ErrorCode::Malformed);
        assert_eq!(take_out(images, |_| false), Ok(false));
        let lock = FileLock {
            pid: 77,
            fd: 3,
            kind: LockKind::Posix,
            exclusive: true,
            start: 0,
            bytes: None,
            path: "/srv/db".to_owned(),
            file: None,
            started: None,
        };
        locks::write(&images.join(LOCKS_FILE), &[lock]).expect("a list");
        assert_eq!(check(&all, 1), Ok(()));
        assert_eq!(code(check(&all, 0).map(drop)), ErrorCode::Malformed);
        assert_eq!(take_out(images, |pid| pid == 77), Ok(true));
        let missing = take_out(images, |pid| pid == 78);
        assert_eq!(code(missing.map(drop)), ErrorCode::Malformed);
        std::fs::write(images.join(LOCKS_FILE), "[]]").expect("no list");
        assert_eq!(code(check(&all, 0).map(drop)), ErrorCode::Malformed);
    }
}
