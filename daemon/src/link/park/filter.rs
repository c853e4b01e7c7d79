//! Programs at a port of a bridge: one diverts what would go to the workload, the other drops what
//! would come from it.
//!
//! They stay when the daemon that attached them dies. What was diverted to is gone then, so that
//! nothing passes, until another daemon lets it pass ([`detach`]) or deletes the port. They are
//! attached by TCX alone: for a classifier of traffic control a queueing discipline has to be made,
//! and while the kernel makes one it drops what is sent by the port, for some milliseconds.
//!
//! Invariants: programs of others stay, and are asked behind ours; no frame is lost when ours come
//! and go.

use pageferry_sys::bpf::Way;
use pageferry_sys::divert::{self, Divert};
use tokio::task::spawn_blocking;

use super::failed;
use crate::link::LinkError;

/// The programs of one port: everything passes at the beginning.
#[derive(Debug)]
pub(super) struct Filter {
    to_workload: Divert,
    from_workload: Divert,
    /// Where to what would go to the workload is diverted.
    tap: u32,
}

impl Filter {
    /// Attaches them to the port of that number. Blocks for some 16 ms.
    pub(super) fn attach(port: u32, tap: u32) -> std::io::Result<Self> {
        let (to_workload, from_workload) = (Divert::load()?, Divert::load()?);
        // What leaves by a port goes to the workload, what comes in by it is from there.
        to_workload.attach(port, Way::Out)?;
        from_workload.attach(port, Way::In)?;
        Ok(Self {
            to_workload,
            from_workload,
            tap,
        })
    }

    /// From here on what would go to the workload is diverted.
    pub(super) fn park(&self) -> Result<(), LinkError> {
        self.to_workload.divert_to(self.tap).map_err(failed)
    }

    /// From here on nothing comes from the workload.
    pub(super) fn shut(&self) -> Result<(), LinkError> {
        self.from_workload.drop_all().map_err(failed)
    }

    /// From here on what comes from the workload passes.
    pub(super) fn let_speak(&self) -> Result<(), LinkError> {
        self.from_workload.pass().map_err(failed)
    }

    /// From here on what goes to the workload passes, too.
    pub(super) fn pass(&self) -> Result<(), LinkError> {
        self.to_workload.pass().map_err(failed)
    }
}

/// Takes the programs off a port, if it has any, whoever has attached them.
pub(super) async fn detach(port: u32) -> Result<(), LinkError> {
    let detached = spawn_blocking(move || divert::detach(port)).await;
    let detached = detached.map_err(std::io::Error::other);
    detached.flatten().map_err(failed)
}
