//! Files that a process can write through a shared mapping.
//!
//! Such memory is one memory for all who map the file, as long as all are on one kernel or their
//! kernels keep their caches in step. Where these do not, two who map it on two nodes would each
//! have their own, and whoever is written back last wins.

use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use procfs::ProcError;
use procfs::process::{MMPermissions, MMapPath, Process, VmFlags};

use super::kind::{self, Kind};
use crate::runtime::mounts::Mounts;

/// The files that `process` has mapped shared, and may write there: now, or after an mprotect(2),
/// which a mapping of a descriptor open for writing allows.
///
/// Names are the kernel's. Reads smaps (11 ms per GiB) if there are shared mappings of files that
/// are not writable now.
pub fn writable(process: &Process) -> Result<Vec<PathBuf>, ProcError> {
    let (mut found, mut unsure) = (Vec::new(), false);
    for map in &process.maps()? {
        if let Some(path) = shared_file(&map.pathname, map.perms) {
            if map.perms.contains(MMPermissions::WRITE) {
                found.push(path.to_owned());
            } else {
                unsure = true;
            }
        }
    }
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

/// The first such file of process `pid` that is below one of `shared` and on storage whose caches
/// are not coherent between nodes. `mounts` is there if the process has a mount namespace of its
/// own. A process that has ended has none.
pub fn find_incoherent(pid: i32, shared: &[PathBuf], mounts: Option<&Mounts>) -> Option<Failure> {
    let process = Process::new(pid).ok()?;
    let files = writable(&process).unwrap_or_default();
    files.iter().find_map(|file| {
        let path = match mounts {
            Some(mounts) => mounts.node_path(file)?,
            None => file.clone(),
        };
        let declared = shared.iter().any(|prefix| path.starts_with(prefix));
        declared.then(|| incoherent(pid, &path)).flatten()
    })
}

/// Why process `pid` must not map `path`, shared and writable; none if it may.
pub fn incoherent(pid: i32, path: &Path) -> Option<Failure> {
    let name = match kind::of(path) {
        Ok((Kind::Local | Kind::Coherent, _)) => return None,
        Ok((Kind::OnOpen, number)) => kind::name(number),
        Err(error) => format!("storage that cannot be looked at ({error})"),
    };
    Some(Failure::new(
        ErrorCode::SharedIncoherent,
        format!(
            "process {pid} has {} mapped shared and writable, and it is on {name}, whose caches \
             differ between nodes: keep that file elsewhere",
            path.display()
        ),
    ))
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
