//! Volumes that an engine of this node has made for a workload that comes, and that go with it if
//! it does not.
//!
//! Invariant: one is removed only if it is written down that it was made here for this migration;
//! that is where a reboot does not reach it. A node that dies while it is made may leave an empty
//! one.

use std::fs;
use std::path::PathBuf;

use pageferry_files::Keep;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;

use crate::migration::folders::failed;
use crate::migration::text::internal;
use crate::runtime::kind;

/// Those of one migration. Clones are of the same.
#[derive(Clone, Debug)]
pub(super) struct Volumes {
    keep: Keep,
    note: PathBuf,
}

impl Volumes {
    /// Those that are written down in `note`.
    pub(super) const fn new(keep: Keep, note: PathBuf) -> Self {
        Self { keep, note }
    }

    /// Has each of them made. Blocks.
    pub(super) fn make(&self, volumes: &[VolumeDescription]) -> Result<(), Failure> {
        let mut made = Vec::with_capacity(volumes.len());
        for volume in volumes {
            kind::make_volume(volume)?;
            made.push(&volume.name);
            let note = serde_json::to_vec(&made).map_err(|error| internal(&error))?;
            let written = self.keep.write(&self.note, &note);
            if let Err(error) = written {
                drop(kind::remove_volume(&volume.name));
                return Err(failed(&error, ErrorCode::NodeUnfit));
            }
        }
        Ok(())
    }

    /// The workload runs here: they are its own for good.
    pub(super) fn settle(&self) {
        drop(fs::remove_file(&self.note));
    }

    /// The workload does not run here: they go. Blocks; succeeds when there is none.
    pub(super) fn take_back(&self) -> Result<(), Failure> {
        let Ok(noted) = fs::read(&self.note) else {
            return Ok(());
        };
        let made: Vec<String> = serde_json::from_slice(&noted).map_err(|error| internal(&error))?;
        for name in &made {
            kind::remove_volume(name).map_err(|why| {
                let text = format!("the volume {name}, which came empty, is left: {why}");
                Failure::new(ErrorCode::NodeUnfit, text)
            })?;
        }
        drop(fs::remove_file(&self.note));
        Ok(())
    }
}
