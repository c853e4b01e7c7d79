//! What the pagers are asked for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use pageferry_pager::message::{Namespace, RestoreRequest, RuntimeRequest};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::NamespaceKind;

use super::TargetNode;
use super::seat::Seat;
use crate::runtime::mounts::external_at_restore;
use crate::runtime::oci::BOUND;

/// Namespaces that a CRIU is started in.
pub(super) type CriuNamespaces<'a> = [(Namespace, BorrowedFd<'a>)];

impl Seat {
    /// The restore from `images`, without what only those tell.
    pub(super) fn restore_request(&self, node: &TargetNode, images: PathBuf) -> RestoreRequest {
        RestoreRequest {
            criu: node.criu.clone(),
            images_dir: images,
            work_dir: self.directory.clone(),
            log_level: 2,
            cgroup_procs: self.groups.tree.procs_files(),
            freezer: self.freezer.path().to_owned(),
            freezer_id: self.freezer.id(),
            tcp_established: true,
            file_locks: true,
            link_remap: true,
            external: external_at_restore(&self.mounts),
            root: self.mounts.first().map(|mount| mount.node_path.clone()),
            runtime: self.made_by.as_ref().map(|restore| RuntimeRequest {
                stand_in: node.stand_in.clone(),
                program: restore.program.clone(),
                is_engine: restore.is_engine,
                arguments: restore.arguments.clone(),
                log: restore.log.clone(),
                gate: self.directory.join("gate"),
                cgroup_procs: restore.cgroup_procs.clone(),
                cgroup: restore.cgroup.clone(),
                folder: restore.leaves.folder.clone(),
                bound_in: restore.leaves.bound_in.clone(),
                bound: BOUND.to_owned(),
                state: restore.leaves.state.clone(),
                leaves: restore.leaves.paths.clone(),
                undo: restore.undo.clone(),
                then: restore.then.clone(),
            }),
            ..RestoreRequest::default()
        }
    }
}

/// The namespaces that the CRIU of each member is started in.
pub(super) fn criu_namespaces(
    own: &[(NamespaceKind, OwnedFd)],
) -> Result<Vec<(Namespace, BorrowedFd<'_>)>, Failure> {
    let own = own.iter();
    own.map(|(kind, fd)| Ok((pager_kind(*kind)?, fd.as_fd())))
        .collect()
}

fn pager_kind(kind: NamespaceKind) -> Result<Namespace, Failure> {
    match kind {
        NamespaceKind::Ipc => Ok(Namespace::Ipc),
        NamespaceKind::Uts => Ok(Namespace::Uts),
        NamespaceKind::Net => Ok(Namespace::Net),
        NamespaceKind::Mount => Ok(Namespace::Mount),
        NamespaceKind::Pid => Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            "a pid namespace cannot be entered by a restore",
        )),
    }
}
