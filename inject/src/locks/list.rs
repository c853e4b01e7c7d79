//! Lists of locks, as files.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use super::FileLock;

/// Most locks of one workload.
pub const LOCKS_MAX: usize = 1 << 16;

/// Longest list of them, in bytes: a path of some hundred bytes in each.
const LIST_BYTES_MAX: u64 = 32 << 20; // 32 MiB

/// Writes a list of locks to a file, in the place of what was there.
pub fn write(path: &Path, locks: &[FileLock]) -> io::Result<()> {
    let bytes = serde_json::to_vec(locks)?;
    if LOCKS_MAX < locks.len() || LIST_BYTES_MAX < bytes.len() as u64 {
        return Err(io::Error::other(format!(
            "{} locks are too many",
            locks.len()
        )));
    }
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, path)
}

/// Reads a list of locks.
pub fn read(path: &Path) -> io::Result<Vec<FileLock>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(LIST_BYTES_MAX + 1)
        .read_to_end(&mut bytes)?;
    if LIST_BYTES_MAX < bytes.len() as u64 {
        return Err(io::Error::other("the list is too long"));
    }
    let locks: Vec<FileLock> = serde_json::from_slice(&bytes)?;
    // Where an empty range is none, and the kernel counts to i64::MAX.
    let is_odd = |lock: &FileLock| {
        let last = lock
            .start
            .checked_add(lock.bytes.unwrap_or(1))
            .map(i64::try_from);
        lock.bytes == Some(0) || !matches!(last, Some(Ok(_)))
    };
    if LOCKS_MAX < locks.len() || locks.iter().any(is_odd) {
        return Err(io::Error::other(
            "it has a lock that cannot be, or too many",
        ));
    }
    Ok(locks)
}

#[cfg(test)]
mod tests {
    use super::super::LockKind;
    use super::*;

    #[test]
    fn a_list_reads_back_and_one_that_cannot_be_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list");
        let lock = |start, bytes| FileLock {
            pid: 7,
            fd: 3,
            kind: LockKind::Flock,
            exclusive: true,
            start,
            bytes,
            path: "/srv/db".to_owned(),
            file: None,
            started: None,
        };
        write(&path, &[lock(0, None), lock(5, Some(7))]).unwrap();
        assert_eq!(read(&path).unwrap(), [lock(0, None), lock(5, Some(7))]);
        let text = fs::read_to_string(&path).unwrap();
        let first = r#"[{"pid":7,"fd":3,"kind":"flock","exclusive":true,"start":0,"bytes":null,"#;
        assert!(text.starts_with(first), "{text}");
        for odd in [
            lock(0, Some(0)),
            lock(1 << 63, None),
            lock(1, Some(u64::MAX)),
        ] {
            write(&path, &[odd]).unwrap();
            assert!(read(&path).is_err());
        }
        fs::write(&path, "[{}]").unwrap();
        assert!(read(&path).is_err());
        let many = vec![lock(0, None); LOCKS_MAX + 1];
        assert!(write(&path, &many).is_err());
    }
}
