//! What a migration does with storage that both nodes share: it lets the target find out that it is
//! the same, and has it synced, beside every round and in the freeze.

use std::path::Path;
use std::time::Duration;

use pageferry_proto::wire::code::Failure;
use pageferry_proto::wire::shared::SharedPath;
use tokio::sync::watch;

use crate::migration::text::internal;
use crate::runtime::mounts::Mounts;
use crate::runtime::shared::marker::{Markers, Written};
use crate::runtime::shared::sync::{FileSystems, Syncing};
use crate::runtime::shared::{Storage, lengths, mappings};

/// How long syncing may take while the workload stands still. Little is dirty then: a sync has gone
/// before, beside the last round. Beside a round it may take as long as the round may.
const FROZEN_SYNC_MAX: Duration = Duration::from_secs(10);

/// Storage that both nodes share, as the source holds it.
#[derive(Debug, Default)]
pub(super) struct Kept {
    storage: Storage,
    markers: Markers,
    systems: FileSystems,
    /// Begun in the freeze.
    syncing: Option<Syncing>,
}

impl Kept {
    /// Opens `storage`; what the target is told of it goes to `offered`.
    pub(super) fn open(storage: Storage, offered: &mut Vec<SharedPath>) -> Result<Self, Failure> {
        let mut markers = Markers::default();
        let systems = FileSystems::open(&storage)?;
        *offered = storage.offer(&mut markers)?;
        Ok(Self {
            storage,
            markers,
            systems,
            syncing: None,
        })
    }

    /// The markers, for the journal.
    pub(super) fn markers(&self) -> Vec<Written> {
        self.markers.written().to_vec()
    }

    /// The target has looked.
    pub(super) fn offer_is_answered(&mut self) {
        self.markers.remove();
    }

    /// A sync beside a round of the running workload; none if nothing is shared.
    pub(super) fn sync_beside(&self, pids: &[i32]) -> Option<Syncing> {
        (!self.systems.is_empty()).then(|| self.systems.begin(pids.to_vec()))
    }

    /// Begins the sync that counts, when the workload stands still, and refuses what it must not
    /// have by then.
    pub(super) fn freeze(&mut self, pids: &[i32], mounts: Option<&Mounts>) -> Result<(), Failure> {
        if self.storage.is_empty() {
            return Ok(());
        }
        self.syncing = Some(self.systems.begin(pids.to_vec()));
        self.storage.check_unchanged()?;
        if !self.storage.is_incoherent() {
            return Ok(());
        }
        let paths = self.storage.paths();
        let found = |pid: &i32| mappings::find_incoherent(*pid, paths, mounts);
        pids.iter().find_map(found).map_or(Ok(()), Err)
    }

    /// Puts beside the images how long the files are that the frozen workload writes.
    pub(super) fn tell_lengths(
        &self,
        pids: &[i32],
        mounts: Option<&Mounts>,
        images: &Path,
    ) -> Result<(), Failure> {
        if self.storage.is_empty() {
            return Ok(());
        }
        let read = lengths::read(pids, self.storage.paths(), mounts);
        lengths::write(images, &read).map_err(|error| internal(&error))
    }

    /// The sync of this freeze, once.
    pub(super) fn take_syncing(&mut self) -> Option<Syncing> {
        self.syncing.take()
    }
}

/// Waits for a sync of the frozen workload; how long it took, if there is one.
pub(super) async fn synced(
    syncing: Option<Syncing>,
    cancelled: watch::Receiver<bool>,
) -> Result<Option<Duration>, Failure> {
    match syncing {
        Some(syncing) => syncing.ended(FROZEN_SYNC_MAX, cancelled).await.map(Some),
        None => Ok(None),
    }
}
