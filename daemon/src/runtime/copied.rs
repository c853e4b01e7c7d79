//! Folders that travel with a workload: who may store to their files, and whether anybody else
//! does.
//!
//! Absent: writers that are not processes of this node, such as clients of a file server; and what
//! is open in no process, such as a descriptor on its way in a socket.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_files::Key;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::identity;
use super::mounts::mounted_elsewhere;

/// How often it is looked for writers before one is believed, and how long between two looks.
const LOOKS: usize = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Adds files that a process may store to, and what it calls each: as many as can be read before
/// something cannot, which is an error unless it has ended. One whose mappings change meanwhile is
/// an error of the kind [`io::ErrorKind::Interrupted`].
fn stores(pid: i32, found: &mut Vec<(Key, PathBuf)>) -> io::Result<()> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mut add = |link: PathBuf| {
        // Who has closed it meanwhile stores no more.
        let Some(metadata) = unless_ended(fs::metadata(&link))? else {
            return Ok(false);
        };
        if metadata.is_file() {
            let device = metadata.dev();
            let device = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
            // Numbers of devices have 12 and 20 bits.
            let device = (device.0 as u32, device.1 as u32);
            let inode = metadata.ino();
            found.push((Key { device, inode }, fs::read_link(&link).unwrap_or(link)));
        }
        Ok::<_, io::Error>(true)
    };
    for fd in unless_ended(fs::read_dir(process.join("fd")))?
        .into_iter()
        .flatten()
    {
        let Some(fd) = unless_ended(fd)? else {
            continue;
        };
        let link = fd.path();
        // The link's mode says how it was opened.
        let opened = unless_ended(fs::symlink_metadata(&link))?;
        if opened.is_some_and(|opened| opened.mode() & 0o200 != 0) {
            add(link)?;
        }
    }
    // Names in it need not be UTF-8.
    let maps = unless_ended(fs::read(process.join("maps")))?.unwrap_or_default();
    let mut is_changed = false;
    for line in maps.split(|byte| *byte == b'\n') {
        if let Some(range) = shared_mapping(line) {
            is_changed |= !add(process.join("map_files").join(range))?;
        }
    }
    match is_changed && process.exists() {
        // It may be there as a part of another.
        true => Err(io::Error::new(
            io::ErrorKind::Interrupted,
            format!("the mappings of process {pid} change"),
        )),
        false => Ok(()),
    }
}

/// The range of a mapping of a file that may show stores there, as `map_files` has it.
fn shared_mapping(line: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(line);
    let mut fields = text.split_ascii_whitespace();
    let (range, how) = (fields.next()?, fields.next()?);
    let inode = fields.nth(2)?;
    // One that may not be written now may be later.
    if !how.ends_with('s') || inode == "0" {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(format!("{:x}-{:x}", number(from)?, number(to)?))
}

/// None if what was read has ended, or is closed.
fn unless_ended<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    let ended = [nix::libc::ENOENT, nix::libc::ESRCH];
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|code| ended.contains(&code)) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Files that these processes have open for writing, or mapped shared. An error if that cannot be
/// told, though it was tried again.
pub fn suspects(pids: &[i32]) -> io::Result<HashSet<Key>> {
    let mut all = HashSet::new();
    for pid in pids {
        let mut found = Vec::new();
        let mut looked = Ok(());
        for _ in 0..LOOKS {
            looked = stores(*pid, &mut found);
            if looked.is_ok() {
                break;
            }
        }
        looked?;
        all.extend(found.into_iter().map(|(key, _)| key));
    }
    Ok(all)
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

/// Refuses `folder` if a process that is not among `pids` has it mounted for itself, as containers
/// do: it would go on with what is left of it. Takes longer the more of those there are.
pub fn check_mounted(folder: &Path, pids: &[i32]) -> Result<(), Failure> {
    let Some((pid, place)) = mounted_elsewhere(folder, pids)? else {
        return Ok(());
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Err(Failure::new(
        ErrorCode::FolderUnfit,
        format!(
            "process {pid} ({}), which does not move, has {} mounted at {}: end it, or its \
             container",
            name.trim_end(),
            folder.display(),
            place.display()
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
        let mut written = Vec::new();
        if let Err(error) = stores(pid, &mut written) {
            tracing::debug!(pid, "not all that it may write to is known: {error}");
        }
        let (_, path) = written.into_iter().find(|(key, _)| files.contains(key))?;
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
    fn a_shared_mapping_of_a_file_is_told_from_others() {
        let range = |line: &[u8]| shared_mapping(line);
        let file = b"7f00-8f00 r--s 00000000 fe:01 12   /srv/\xff\xfe (deleted)";
        assert_eq!(range(file).as_deref(), Some("7f00-8f00"));
        let padded = b"00400000-00401000 rw-s 00000000 fe:01 12 /a b";
        assert_eq!(range(padded).as_deref(), Some("400000-401000"));
        for other in [
            &b"7f00-8f00 rw-p 00000000 fe:01 12 /srv/s"[..],
            b"7f00-8f00 rw-s 00000000 00:00 0 ",
            b"",
        ] {
            assert_eq!(range(other), None);
        }
    }

    #[test]
    fn who_has_ended_stores_to_nothing_and_what_cannot_be_read_is_an_error() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        assert!(suspects(&[pid]).unwrap().is_empty());
        let refused = io::Error::from_raw_os_error(nix::libc::EACCES);
        assert!(unless_ended::<()>(Err(refused)).is_err());
        let closed = io::Error::from_raw_os_error(nix::libc::ENOENT);
        assert!(unless_ended::<()>(Err(closed)).unwrap().is_none());
    }

    #[test]
    fn who_has_a_folder_mounted_for_himself_is_found() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let [folder, place] = ["data", "place"].map(|name| root.join(name));
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::create_dir(&place).unwrap();
        let script = "mount --bind $0/data/sub $0/place && echo ready && exec sleep 1000";
        let mut child = std::process::Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .arg(&root)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut ready = String::new();
        let mut told = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut told, &mut ready).unwrap();
        let found = check_mounted(&folder, &[]);
        let [inside, other] =
            [(&folder, pid), (&place, 0)].map(|(path, pid)| check_mounted(path, &[pid]));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(ready.trim(), "ready");
        let found = found.unwrap_err();
        assert_eq!(found.code(), ErrorCode::FolderUnfit);
        assert!(found.text().contains(&*place.to_string_lossy()), "{found}");
        assert_eq!((inside, other), (Ok(()), Ok(())));
    }

    #[test]
    fn a_file_that_somebody_has_open_for_writing_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = fs::File::create(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let key = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            let mut found = Vec::new();
            stores(own, &mut found).unwrap();
            found
                .into_iter()
                .map(|(key, _)| key)
                .find(|key| key.inode == metadata.ino())
        };
        let found = key(&path).expect("it is open");
        assert!(suspects(&[own]).unwrap().contains(&found));
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
