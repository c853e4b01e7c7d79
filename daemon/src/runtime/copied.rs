//! Folders that travel with a workload: who may store to their files, and whether anybody else
//! does.
//!
//! Absent: writers that are not processes of this node, such as clients of a file server; and what
//! is open in no process, such as a descriptor on its way in a socket.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_files::{Key, Suspects};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use procfs::process::{FDPermissions, MMPermissions, Process};

use super::identity;

/// How often it is looked for writers before one is believed, and how long between two looks.
const LOOKS: usize = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Files that a process may store to, and what it calls each.
fn stores(pid: i32) -> Vec<(Key, PathBuf)> {
    let Ok(process) = Process::new(pid) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut add = |link: PathBuf| {
        // It may have been closed meanwhile: who closed it stores no more.
        if let Ok(metadata) = fs::metadata(&link)
            && metadata.is_file()
        {
            let device = metadata.dev();
            let device = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
            // Numbers of devices have 12 and 20 bits.
            let device = (device.0 as u32, device.1 as u32);
            let inode = metadata.ino();
            found.push((Key { device, inode }, fs::read_link(&link).unwrap_or(link)));
        }
    };
    for fd in process.fd().into_iter().flatten().flatten() {
        if fd.mode().contains(FDPermissions::WRITE) {
            add(PathBuf::from(format!("/proc/{pid}/fd/{}", fd.fd)));
        }
    }
    for map in process.maps().iter().flat_map(|maps| maps.iter()) {
        // One that may not be written now may be later.
        if map.perms.contains(MMPermissions::SHARED) && map.inode != 0 {
            let (from, to) = map.address;
            add(PathBuf::from(format!(
                "/proc/{pid}/map_files/{from:x}-{to:x}"
            )));
        }
    }
    found
}

/// Files that these processes have open for writing, or mapped shared.
pub fn suspects(pids: &[i32]) -> Suspects {
    let of = |pid: &i32| stores(*pid).into_iter().map(|(key, _)| key);
    Suspects(pids.iter().flat_map(of).collect())
}

/// Refuses `folder` if a process that is not among `pids` may store to one of its files.
pub fn check_writers(folder: &Path, files: &HashSet<Key>, pids: &[i32]) -> Result<(), Failure> {
    let mut found = writers(files, pids);
    // One that the tree has started since is its own, and may be gone before that can be seen.
    for _ in 1..LOOKS {
        if found.is_empty() {
            return Ok(());
        }
        std::thread::sleep(LOOK_PAUSE);
        let now = writers(files, pids);
        found.retain(|pid, _| now.contains_key(pid));
    }
    let Some((pid, path)) = found.pop_first() else {
        return Ok(());
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Err(Failure::new(
        ErrorCode::FolderUnfit,
        format!(
            "process {pid} ({}), which does not move, may write to {} in {}: end it, or let it \
             close the file",
            name.trim_end(),
            path.display(),
            folder.display()
        ),
    ))
}

/// Processes outside of the tree of `pids` that may store to one of these files, and what each
/// calls that.
fn writers(files: &HashSet<Key>, pids: &[i32]) -> BTreeMap<i32, PathBuf> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let others = all.filter(|pid| *pid != own && !pids.contains(pid));
    let writers = others.filter_map(|pid| {
        let mut written = stores(pid).into_iter();
        let (_, path) = written.find(|(key, _)| files.contains(key))?;
        let parents = identity::ancestors(pid);
        (!parents.iter().any(|parent| pids.contains(parent))).then_some((pid, path))
    });
    writers.collect()
}

/// Checks that folders that travel are none of each other, nor of what both nodes share.
pub fn check_paths(copied: &[PathBuf], shared: &[PathBuf]) -> Result<(), Failure> {
    let touch = |one: &Path, other: &Path| one.starts_with(other) || other.starts_with(one);
    for (index, path) in copied.iter().enumerate() {
        let hidden = pageferry_files::check_hidden(path);
        hidden.map_err(|error| Failure::new(ErrorCode::FolderUnfit, error.to_string()))?;
        let mut others = copied[..index].iter().chain(shared);
        if let Some(other) = others.find(|other| touch(path, other)) {
            return Err(Failure::new(
                ErrorCode::FolderUnfit,
                format!(
                    "{} cannot travel beside {}: one is in the other",
                    path.display(),
                    other.display()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_travel_have_nothing_in_common() {
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect::<Vec<_>>();
        let check = |copied: &[&str], shared: &[&str]| check_paths(&paths(copied), &paths(shared));
        assert_eq!(check(&["/a", "/b", "/ab"], &["/c", "/aa"]), Ok(()));
        for (copied, shared) in [
            (&["/a", "/a/b"][..], &[][..]),
            (&["/a", "/a"], &[]),
            (&["/a/b"], &["/a"]),
            (&["/a"], &["/a/b"]),
            (&["/a/.pageferry-files/kept"], &[]),
        ] {
            let code = check(copied, shared).map_err(|failure| failure.code());
            assert_eq!(code, Err(ErrorCode::FolderUnfit));
        }
    }

    #[test]
    fn a_file_that_somebody_has_open_for_writing_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = fs::File::create(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let key = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            stores(own)
                .into_iter()
                .map(|(key, _)| key)
                .find(|key| key.inode == metadata.ino())
        };
        let found = key(&path).expect("it is open");
        assert!(suspects(&[own]).0.contains(&found));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .stdout(file.try_clone().unwrap())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let files = HashSet::from([found]);
        let refused = check_writers(folder.path(), &files, &[]);
        let inside = check_writers(folder.path(), &files, &[pid]);
        child.kill().unwrap();
        child.wait().unwrap();
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::FolderUnfit);
        assert!(refused.text().contains("(sleep)"), "{refused}");
        assert_eq!(inside, Ok(()));
    }
}
