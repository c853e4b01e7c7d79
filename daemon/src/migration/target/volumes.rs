//! Volumes that an engine of this node has made for a workload that comes, and that go with it if
//! it does not.
//!
//! Invariants: one is removed only if it is written down that it was made here for this migration,
//! if it is still that one, and if nothing is in it; that is where a reboot does not reach it. From
//! before the workload may run nothing is written down any more, and only who has made them knows
//! them. A node that dies while one is made may leave an empty one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_files::Keep;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;

use crate::migration::folders::failed;
use crate::migration::text::internal;
use crate::runtime::kind::{self, MadeVolume};

/// Those of one migration. Clones are of the same.
#[derive(Clone, Debug)]
pub(super) struct Volumes {
    keep: Keep,
    note: PathBuf,
    made: Arc<Mutex<Vec<MadeVolume>>>,
}

impl Volumes {
    /// Those that are written down in `note`.
    pub(super) fn new(keep: Keep, note: PathBuf) -> Self {
        let made = fs::read(&note).ok();
        let made = made.and_then(|noted| serde_json::from_slice(&noted).ok());
        Self {
            keep,
            note,
            made: Arc::new(Mutex::new(made.unwrap_or_default())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<MadeVolume>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has each of them made. Blocks.
    pub(super) fn make(&self, volumes: &[VolumeDescription]) -> Result<(), Failure> {
        for volume in volumes {
            let made = kind::make_volume(volume)?;
            self.lock().push(made);
            let note = serde_json::to_vec(&*self.lock()).map_err(|error| internal(&error))?;
            let written = self.keep.write(&self.note, &note);
            if let Err(error) = written {
                if let Some(made) = self.lock().pop() {
                    drop(kind::remove_volume(&made));
                }
                return Err(failed(&error, ErrorCode::NodeUnfit));
            }
        }
        Ok(())
    }

    /// Whether the contents of one of them are at this path.
    pub(super) fn has(&self, path: &Path) -> bool {
        self.lock().iter().any(|made| made.path() == path)
    }

    /// The workload may run from now on: nobody who starts again removes any of them. Durable if it
    /// succeeds.
    pub(super) fn hand_over(&self) -> Result<(), Failure> {
        let forgotten = self.keep.forget(&self.note);
        forgotten.map_err(|error| failed(&error, ErrorCode::NodeUnfit))
    }

    /// The workload runs here: they are its own for good.
    pub(super) fn settle(&self) {
        self.lock().clear();
        if let Err(failure) = self.hand_over() {
            tracing::warn!("of a note of volumes: {failure}");
        }
    }

    /// The workload does not run here: they go. Blocks; succeeds when there is none.
    pub(super) fn take_back(&self) -> Result<(), Failure> {
        let all = self.lock().clone();
        for made in &all {
            kind::remove_volume(made).map_err(|why| {
                let text = format!(
                    "the volume {}, which came empty, is left: {why}",
                    made.name()
                );
                Failure::new(ErrorCode::NodeUnfit, text)
            })?;
        }
        self.lock().clear();
        self.hand_over()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_run_keeps_its_volumes_whoever_starts_again() {
        let root = tempfile::tempdir().unwrap();
        let keep = Keep::new(root.path().join("state"));
        let note = root.path().join("state/1.volumes");
        let noted = r#"[{"name":"data","path":"/v/data/_data","created":"2026-11-29T12:00:00Z",
            "folder":[1,2,3]}]"#;
        keep.write(&note, noted.as_bytes()).unwrap();
        let known = Volumes::new(keep.clone(), note.clone());
        assert!(known.has(Path::new("/v/data/_data")));
        known.hand_over().unwrap();
        // Who has made them takes them back yet if nothing has run.
        assert!(!note.exists() && !known.lock().is_empty());
        let again = Volumes::new(keep, note);
        assert!(again.lock().is_empty());
        again.take_back().unwrap();
        again.hand_over().unwrap();
    }
}
