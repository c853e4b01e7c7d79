//! Files that a process can write through a shared mapping.
//!
//! Such memory is one memory for all who map the file, as long as all are on one kernel or their
//! kernels keep their caches in step. Where these do not, two who map it on two nodes would each
//! have their own, and whoever is written back last wins.

use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use procfs::ProcError;
use procfs::process::{MMPermissions, MMapPath, Process, VmFlags};

use super::Storage;
use super::kind::{self, Kind};
use crate::runtime::mounts::Mounts;
use pageferry_sys::task;

/// The files that `process` has mapped shared, and may write there: now, or after an mprotect(2),
/// which a mapping of a descriptor open for writing allows. Of files that do not `matter` some may
/// be missing.
///
/// Names are the kernel's. Reads smaps (11 ms per GiB) if there are shared mappings of files that
/// matter and are not writable now.
pub fn writable(
    process: &Process,
    matters: impl Fn(&Path) -> bool,
) -> Result<Vec<PathBuf>, ProcError> {
    let (mut found, unsure) = writable_now(process, matters)?;
    if unsure {
        for map in &process.smaps()? {
            let may_write = map.extension.vm_flags.contains(VmFlags::MW);
            if let Some(path) = shared_file(&map.pathname, map.perms)
                && may_write
                && !found.iter().any(|known| known == path)
            {
                found.push(path.to_owned());
            }
        }
    }
    Ok(found)
}

/// The files it has mapped shared and writable now, and whether it may write to others that matter
/// later.
pub(super) fn writable_now(
    process: &Process,
    matters: impl Fn(&Path) -> bool,
) -> Result<(Vec<PathBuf>, bool), ProcError> {
    let (mut found, mut unsure) = (Vec::new(), false);
    for map in &process.maps()? {
        if let Some(path) = shared_file(&map.pathname, map.perms) {
            if map.perms.contains(MMPermissions::WRITE) {
                found.push(path.to_owned());
            } else {
                unsure |= matters(path);
            }
        }
    }
    Ok((found, unsure))
}

/// Refuses a file that process `pid` has mapped so and that is below a path of `storage` whose
/// caches are not coherent between nodes. `mounts` is there if the process has a mount namespace of
/// its own. A process that has ended has none. Asks nothing of the storage.
pub fn check_coherent(pid: i32, storage: &Storage, mounts: Option<&Mounts>) -> Result<(), Failure> {
    let node_path = |file: &Path| match mounts {
        Some(mounts) => mounts.node_path(file),
        None => Some(file.to_owned()),
    };
    let incoherent = |file: &Path| {
        let path = node_path(file)?;
        let number = storage.number_at(&path)?;
        (kind::of_number(number) == Kind::OnOpen).then_some((path, number))
    };
    let written =
        Process::new(pid).and_then(|process| writable(&process, |file| incoherent(file).is_some()));
    match written {
        Ok(files) => match files.iter().find_map(|file| incoherent(file)) {
            Some((path, number)) => Err(refused(pid, &path, &kind::name(number))),
            None => Ok(()),
        },
        Err(_) if task::has_ended(pid) => Ok(()),
        Err(error) => Err(unreadable(pid, &error)),
    }
}

/// Why process `pid` must not map `path`, shared and writable; none if it may.
pub fn incoherent(pid: i32, path: &Path) -> Option<Failure> {
    match kind::of(path) {
        Ok((Kind::Local | Kind::Coherent, _)) => None,
        Ok((Kind::OnOpen, number)) => Some(refused(pid, path, &kind::name(number))),
        Err(error) => {
            let storage = format!("storage that cannot be looked at ({error})");
            Some(refused(pid, path, &storage))
        }
    }
}

/// The mappings of a process that has not ended cannot be read.
pub fn unreadable(pid: i32, error: &ProcError) -> Failure {
    Failure::new(
        ErrorCode::UnsupportedWorkload,
        format!("the mappings of process {pid} cannot be read: {error}"),
    )
}

fn refused(pid: i32, path: &Path, storage: &str) -> Failure {
    Failure::new(
        ErrorCode::SharedIncoherent,
        format!(
            "process {pid} has {} mapped shared and writable, and it is on {storage}, whose caches \
             differ between nodes: keep that file elsewhere",
            path.display()
        ),
    )
}

fn shared_file(name: &MMapPath, permissions: MMPermissions) -> Option<&Path> {
    match name {
        MMapPath::Path(path) if permissions.contains(MMPermissions::SHARED) && !is_memory(path) => {
            Some(path)
        }
        _ => None,
    }
}

/// What has a path in /proc, and no file: shared memory, devices, and what was deleted.
fn is_memory(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with(" (deleted)") || name.starts_with("/dev/") && !name.starts_with("/dev/shm/")
}
