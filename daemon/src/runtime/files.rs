//! The files a workload has open or mapped: they are not moved, so they must be at the target.
//!
//! At the source each becomes a [`FileDescription`]; at the target [`check`] compares them with
//! what is there. Size and build id are what CRIU compares at its restore; asking before the freeze
//! turns a failed restore into a refusal. Absent: contents; a file of the same size and build id
//! whose bytes differ is the operator's promise.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{FileDescription, FileUse, WorkloadDescription};
use procfs::process::{FDTarget, MMPermissions, MMapPath, Process};

use super::build_id;
use super::mounts::Mounts;
use super::shared::kind::{self, Kind};
use super::shared::mappings;

/// Files named in one description; a large JVM has about a thousand.
pub const FILES_MAX: usize = 16_384;

/// Bytes of one deleted file that CRIU may carry along in its images (its `ghost_limit`).
pub const DELETED_FILE_MAX: u64 = 16 << 20; // 16 MiB

/// What is known of one open descriptor beyond its file.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Where the node has the workload's files, if it has a mount namespace of its own.
    pub mounts: Option<Mounts>,
    /// All processes of the workload: what procfs has of them goes along.
    pub pids: Vec<i32>,
    /// Files by path.
    pub files: BTreeMap<PathBuf, FileDescription>,
    /// Pipe ends by inode: readers, writers.
    pub pipes: BTreeMap<u64, [usize; 2]>,
    /// Sockets by inode, with the descriptor they were seen at.
    pub sockets: BTreeMap<u64, (i32, i32)>,
}

impl Descriptors {
    /// None yet, of these processes.
    pub fn of(pids: &[i32], mounts: Option<Mounts>) -> Self {
        Self {
            mounts,
            pids: pids.to_vec(),
            ..Self::default()
        }
    }

    /// Adds what process `pid` has open and mapped.
    pub fn add(&mut self, process: &Process, shared: &[PathBuf]) -> Result<(), Failure> {
        let unreadable = |error: procfs::ProcError| {
            Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!("process {} cannot be inspected: {error}", process.pid),
            )
        };
        for fd in process.fd().map_err(unreadable)? {
            let fd = fd.map_err(unreadable)?;
            let writes = fd.mode().contains(procfs::process::FDPermissions::WRITE);
            match &fd.target {
                FDTarget::Path(path) => {
                    self.add_open(process.pid, fd.fd, path, writes, shared)?;
                }
                FDTarget::Pipe(inode) => {
                    self.pipes.entry(*inode).or_default()[usize::from(writes)] += 1;
                }
                FDTarget::Socket(inode) => {
                    self.sockets.insert(*inode, (process.pid, fd.fd));
                }
                FDTarget::Net(_)
                | FDTarget::AnonInode(_)
                | FDTarget::MemFD(_)
                | FDTarget::Other(..)
                | FDTarget::Unknown(..) => {}
            }
        }
        self.add_mapped(process, shared)
    }

    fn add_open(
        &mut self,
        pid: i32,
        fd: i32,
        path: &Path,
        writes: bool,
        shared: &[PathBuf],
    ) -> Result<(), Failure> {
        let Ok(metadata) = fs::metadata(format!("/proc/{pid}/fd/{fd}")) else {
            // Closed meanwhile: the workload runs.
            return Ok(());
        };
        if is_terminal(path) && metadata.file_type().is_char_device() {
            return Err(Failure::new(
                ErrorCode::StdioUnfit,
                format!(
                    "descriptor {fd} of process {pid} is the terminal {}: start the workload with \
                     its input and output elsewhere (/dev/null or a pipe inside the tree)",
                    path.display()
                ),
            ));
        }
        if !metadata.is_file() {
            return Ok(());
        }
        if let Some(name) = deleted(path) {
            if metadata.len() > DELETED_FILE_MAX {
                return Err(Failure::new(
                    ErrorCode::FileDiffers,
                    format!(
                        "descriptor {fd} of process {pid} is the deleted file {name} of {} bytes; \
                         deleted files go along up to {DELETED_FILE_MAX} bytes",
                        metadata.len()
                    ),
                ));
            }
            return Ok(());
        }
        let Some(path) = self.node_path(path) else {
            // On a tmpfs of its own, which goes along, or made by the kernel.
            return Ok(());
        };
        let path = path.as_path();
        // The target has it once they are restored there.
        if owner_in_proc(path).is_some_and(|owner| self.pids.contains(&owner)) {
            return Ok(());
        }
        if writes && !is_shared(path, shared) {
            return Err(Failure::new(
                ErrorCode::FileWritable,
                format!(
                    "descriptor {fd} of process {pid} writes to {}: files are not moved; {}",
                    path.display(),
                    advice(path)
                ),
            ));
        }
        self.add_file(pid, path, &metadata, writes, FileUse::Open)
    }

    fn add_mapped(&mut self, process: &Process, shared: &[PathBuf]) -> Result<(), Failure> {
        let pid = process.pid;
        let unreadable = |error| mappings::unreadable(pid, &error);
        let maps = process.maps().map_err(unreadable)?;
        let written = mappings::writable(process, |_| true).map_err(unreadable)?;
        for map in maps.iter() {
            let MMapPath::Path(name) = &map.pathname else {
                continue;
            };
            if deleted(name).is_some() {
                continue;
            }
            let Some(path) = self.node_path(name) else {
                continue;
            };
            let path = path.as_path();
            // A file may be mapped in both ways, and be open besides.
            let writes = map.perms.contains(MMPermissions::SHARED) && written.contains(name);
            if self
                .files
                .get(path)
                .is_some_and(|known| known.mapped_shared || !writes)
            {
                continue;
            }
            let Ok(metadata) = fs::metadata(self.seen(pid).join(strip(path))) else {
                continue;
            };
            if writes && metadata.is_file() && !is_shared(path, shared) {
                return Err(Failure::new(
                    ErrorCode::FileWritable,
                    format!(
                        "process {pid} has {} mapped shared and writable: files are not moved; {}",
                        path.display(),
                        advice(path)
                    ),
                ));
            }
            if !metadata.is_file() {
                continue;
            }
            if writes && let Some(failure) = mappings::incoherent(pid, path) {
                return Err(failure);
            }
            self.add_file(pid, path, &metadata, writes, FileUse::Mapped)?;
            if writes && let Some(file) = self.files.get_mut(path) {
                (file.writable, file.mapped_shared) = (true, true);
            }
        }
        Ok(())
    }

    fn add_file(
        &mut self,
        pid: i32,
        path: &Path,
        metadata: &Metadata,
        writable: bool,
        kind: FileUse,
    ) -> Result<(), Failure> {
        if self.files.len() >= FILES_MAX {
            return Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!("the workload has more than {FILES_MAX} files open or mapped"),
            ));
        }
        let Some(name) = path.to_str() else {
            return Err(Failure::new(
                ErrorCode::UnsupportedWorkload,
                format!(
                    "process {pid} has {} open, whose name is not UTF-8",
                    path.display()
                ),
            ));
        };
        let build_id = File::open(self.seen(pid).join(strip(path)))
            .and_then(|file| build_id::read(&file))
            .unwrap_or_default();
        self.files
            .entry(path.to_owned())
            .or_insert_with(|| FileDescription {
                path: name.to_owned(),
                size: metadata.len(),
                build_id,
                writable,
                mode: metadata.mode(),
                kind,
                mapped_shared: false,
            });
        Ok(())
    }

    /// Where the node has what process has at `path`; none if that is not a file of the node.
    fn node_path(&self, path: &Path) -> Option<PathBuf> {
        match &self.mounts {
            Some(mounts) => mounts.node_path(path),
            None => Some(path.to_owned()),
        }
    }

    /// The folder below which files of process `pid` are found by their paths at the node.
    fn seen(&self, pid: i32) -> PathBuf {
        match self.mounts {
            Some(_) => PathBuf::from("/"),
            None => PathBuf::from(format!("/proc/{pid}/root")),
        }
    }

    /// Refuses pipes that have an end outside the tree, which CRIU would refuse in the freeze.
    pub fn check_pipes(&self, held: &[u64]) -> Result<(), Failure> {
        let others = self.pipes.iter().filter(|(inode, _)| !held.contains(inode));
        for (inode, [readers, writers]) in others {
            if *readers == 0 || *writers == 0 {
                let missing = if *readers == 0 { "reader" } else { "writer" };
                return Err(Failure::new(
                    ErrorCode::StdioUnfit,
                    format!(
                        "pipe {inode} of the workload has its {missing} outside the process tree; \
                         start the workload with its input and output at /dev/null or in a file"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Compares a file of the description with what this node has under `root`. One that `is_shared`,
/// which has been proven, may be gone: the workload runs, and removes and renames what it has.
pub fn check(file: &FileDescription, root: &Path, is_shared: bool) -> Result<(), Failure> {
    let differs = |why: String| {
        Err(Failure::new(
            ErrorCode::FileDiffers,
            format!("{} is not the same at the target: {why}", file.path),
        ))
    };
    let here = root.join(file.path.trim_start_matches('/'));
    let metadata = match fs::metadata(&here) {
        Ok(metadata) => metadata,
        Err(error) if is_shared && error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return differs(error.to_string()),
    };
    if file.mapped_shared
        && let Ok((Kind::OnOpen, number)) = kind::of(&here)
    {
        return Err(Failure::new(
            ErrorCode::SharedIncoherent,
            format!(
                "{} is mapped shared and writable, and at the target it is on {}, whose caches \
                 differ between nodes: keep that file elsewhere",
                file.path,
                kind::name(number)
            ),
        ));
    }
    if file.writable {
        // It lives on storage both nodes share; its size may change until the freeze.
        return Ok(());
    }
    if metadata.len() != file.size {
        return differs(format!(
            "{} bytes here, {} at the source",
            metadata.len(),
            file.size
        ));
    }
    let build_id = File::open(&here)
        .and_then(|opened| build_id::read(&opened))
        .unwrap_or_default();
    if build_id != file.build_id {
        return differs("another build of the same size".to_owned());
    }
    Ok(())
}

/// Compares all files of the description with what this node has.
pub fn check_all(description: &WorkloadDescription) -> Result<(), Failure> {
    let shared = description.shared.iter();
    let shared: Vec<_> = shared.map(|shared| PathBuf::from(&shared.path)).collect();
    description.files.iter().try_for_each(|file| {
        let is_shared = is_shared(Path::new(&file.path), &shared);
        check(file, Path::new("/"), is_shared)
    })
}

/// What helps against a file that is written, in the cases that people meet.
fn advice(path: &Path) -> &'static str {
    let mut names = path.components();
    let is_counters = names.any(|name| {
        let name = name.as_os_str().as_encoded_bytes();
        name.starts_with(b"hsperfdata_")
    });
    if is_counters {
        "these are performance counters of a JVM: start it with -XX:+PerfDisableSharedMem"
    } else {
        "name a path that both nodes share with --shared"
    }
}

fn strip(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The process of whose folder in `/proc` this is a file.
fn owner_in_proc(path: &Path) -> Option<i32> {
    let below = path.strip_prefix("/proc").ok()?;
    below
        .components()
        .next()?
        .as_os_str()
        .to_str()?
        .parse()
        .ok()
}

/// The name of a deleted file, as the kernel marks it in /proc.
pub(super) fn deleted(path: &Path) -> Option<&str> {
    path.to_str()?.strip_suffix(" (deleted)")
}

fn is_terminal(path: &Path) -> bool {
    path.starts_with("/dev/pts")
        || path == Path::new("/dev/tty")
        || path == Path::new("/dev/console")
}

pub(super) fn is_shared(path: &Path, shared: &[PathBuf]) -> bool {
    shared.iter().any(|prefix| path.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_written_file_says_what_helps() {
        let advice = |path: &str| advice(Path::new(path));
        assert!(advice("/tmp/hsperfdata_tomcat/4711").contains("-XX:+PerfDisableSharedMem"));
        assert!(advice("/srv/data/log").contains("--shared"));
        assert!(!advice("/srv/hsperf/log").contains("JVM"));
    }

    #[test]
    fn what_procfs_has_of_the_workload_is_not_asked_of_the_target() {
        let pid = std::process::id().cast_signed();
        let path = PathBuf::from(format!("/proc/{pid}/smaps"));
        let opened = File::open(&path).unwrap();
        let seen = |pids: &[i32]| {
            let mut descriptors = Descriptors::of(pids, None);
            let added = descriptors.add_open(pid, opened.as_raw_fd(), &path, false, &[]);
            added.map(|()| descriptors.files.len())
        };
        assert_eq!(seen(&[1, pid]), Ok(0));
        // Of another process, the target has none, or not the same.
        assert_eq!(seen(&[1]), Ok(1));
    }

    #[test]
    fn a_file_may_be_gone_from_shared_storage_alone() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = FileDescription {
            path: "/temp-4711.rdb".to_owned(),
            size: 9,
            build_id: Vec::new(),
            writable: true,
            mode: 0o100_644,
            kind: FileUse::Open,
            mapped_shared: false,
        };
        let checked = |is_shared| check(&file, folder.path(), is_shared).map_err(|f| f.code());
        assert_eq!(checked(true), Ok(()));
        assert_eq!(checked(false), Err(ErrorCode::FileDiffers));
    }
}
