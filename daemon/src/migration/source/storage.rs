//! What a migration does with storage that both nodes share: it lets the target find out that it is
//! the same, and has it synced, beside every round and in the freeze.

use std::path::Path;
use std::time::Duration;

use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::Failure;
use pageferry_proto::wire::shared::SharedPath;

use super::member::Trees;
use super::waits::Waits;
use super::workload::Workload;
use crate::migration::text::internal;
use crate::runtime::detached;
use crate::runtime::mounts::Mounts;
use crate::runtime::shared::marker::{Markers, Written};
use crate::runtime::shared::sync::{FileSystems, Syncing};
use crate::runtime::shared::{Storage, lengths, mappings};

/// How long syncing may take while the workload stands still. Little is dirty then: a sync has gone
/// before, beside the last round. Beside a round it may take as long as the round may.
const FROZEN_SYNC_MAX: Duration = Duration::from_secs(10);

/// The processes of a tree, and the mounts they have, if those are their own.
type Seen = (Vec<i32>, Option<Mounts>);

/// Storage that both nodes share, as the source holds it.
#[derive(Debug, Default)]
pub(super) struct Kept {
    storage: Storage,
    markers: Markers,
    systems: FileSystems,
    /// Begun in the freeze.
    syncing: Option<Syncing>,
    /// How long syncing took in the last freeze, if anything is shared.
    synced: Option<Duration>,
}

impl Kept {
    /// Opens `storage`; with it comes what the target is told of it.
    pub(super) fn open(storage: Storage) -> Result<(Self, Vec<SharedPath>), Failure> {
        let mut markers = Markers::default();
        let systems = FileSystems::open(&storage)?;
        let offered = storage.offer(&mut markers)?;
        let kept = Self {
            storage,
            markers,
            systems,
            syncing: None,
            synced: None,
        };
        Ok((kept, offered))
    }

    /// The markers, for the journal.
    pub(super) fn markers(&self) -> Vec<Written> {
        self.markers.written().to_vec()
    }

    /// What a dead daemon has left.
    pub(super) fn recovered(markers: Vec<Written>) -> Self {
        Self {
            markers: Markers::recovered(markers),
            ..Self::default()
        }
    }

    /// The target has looked.
    pub(super) fn offer_is_answered(&mut self) {
        self.markers.remove();
    }

    /// A sync beside a round of the running workload; none if nothing is shared.
    pub(super) fn sync_beside(&self, pids: &[i32]) -> Beside {
        Beside((!self.systems.is_empty()).then(|| self.systems.begin(pids.to_vec())))
    }

    /// Begins the sync that counts, when the workload stands still, and refuses what it must not
    /// have by then. Asks nothing of the storage, which may not answer.
    pub(super) fn freeze(&mut self, trees: Trees<'_>) -> Result<(), Failure> {
        let seen = |tree: &Workload| Ok((tree.pids()?, tree.mounts.clone()));
        let seen: Vec<Seen> = trees.iter().map(seen).collect::<Result<_, Failure>>()?;
        self.freeze_seen(&seen)
    }

    fn freeze_seen(&mut self, trees: &[Seen]) -> Result<(), Failure> {
        if self.storage.is_empty() {
            return Ok(());
        }
        let pids = trees.iter().flat_map(|(pids, _)| pids.iter().copied());
        self.syncing = Some(self.systems.begin(pids.collect()));
        self.storage.check_unchanged()?;
        if !self.storage.is_incoherent() {
            return Ok(());
        }
        trees.iter().try_for_each(|(pids, mounts)| {
            let mut pids = pids.iter();
            pids.try_for_each(|pid| mappings::check_coherent(*pid, &self.storage, mounts.as_ref()))
        })
    }

    /// Puts beside the images how long the files are that the frozen workload writes.
    pub(super) async fn tell_lengths(
        &self,
        pids: Vec<i32>,
        mounts: Option<&Mounts>,
        images: &Path,
        waits: &Waits,
    ) -> Result<(), Failure> {
        if self.storage.is_empty() {
            return Ok(());
        }
        let (paths, mounts) = (self.storage.paths().to_owned(), mounts.cloned());
        // One that ends late writes nothing: the images may be those of another try by then.
        let reading = detached::done("lengths", move || {
            lengths::read(&pids, &paths, mounts.as_ref())
        });
        let read = waits.on(Wait::Storage, reading).await??;
        lengths::write(images, &read).map_err(|error| internal(&error))
    }

    /// Waits for the sync of this freeze, if there is one.
    pub(super) async fn settle(&mut self, waits: &Waits) -> Result<(), Failure> {
        let syncing = self.syncing.take();
        let cut = waits.cut();
        let settled = async {
            match syncing {
                Some(syncing) => syncing.ended(FROZEN_SYNC_MAX, cut).await.map(Some),
                None => Ok(None),
            }
        };
        self.synced = waits.on(Wait::Storage, settled).await??;
        Ok(())
    }

    /// How long that took in the last freeze, if anything is shared.
    pub(super) fn synced(&self) -> Option<Duration> {
        self.synced
    }

    /// The freeze is over.
    pub(super) fn thawed(&mut self) {
        self.syncing = None;
    }
}

/// A sync beside a round, if there is one.
#[derive(Debug)]
pub(super) struct Beside(Option<Syncing>);

impl Beside {
    /// Waits for it: as long as the round may take.
    pub(super) async fn ended(self, waits: &Waits) -> Result<(), Failure> {
        let Some(syncing) = self.0 else {
            return Ok(());
        };
        let ended = syncing.ended(Duration::MAX, waits.cut());
        let took = waits.on(Wait::Storage, ended).await??;
        tracing::debug!(?took, "shared storage synced");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use pageferry_proto::wire::code::ErrorCode;
    use tokio::sync::watch;

    use super::*;

    use crate::runtime::shared::tests::fuse::{Fuse, Silent};

    /// A process that has files open, killed on drop.
    struct Holder(Child);

    impl Holder {
        /// `script` opens what it is to hold.
        fn start(script: &str) -> Self {
            let script = format!("{script}; echo; exec sleep 600");
            let mut child = Command::new("sh")
                .args(["-c", &script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0];
            let mut output = child.stdout.take().unwrap();
            std::io::Read::read_exact(&mut output, &mut ready).unwrap();
            Self(child)
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "never happened: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_server_that_does_not_answer_holds_no_freeze_that_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let fuse = Fuse::mount(folder.path());
        fuse.state().uncached = true;
        let storage = Storage::find(std::slice::from_ref(&fuse.path)).unwrap();
        let (mut kept, _) = Kept::open(storage).unwrap();
        kept.offer_is_answered();
        until("the marker is gone", || fuse.state().files.is_empty());
        let path = fuse.path.join("log");
        let holder = Holder::start(&format!("exec 3>>{}", path.display()));
        let pid = holder.0.id().cast_signed();
        // It lets go before the file is closed.
        let silent = Silent::begin(&fuse);
        let (cut, cancelled) = watch::channel(false);
        let (waits, images) = (Waits::new(cancelled), tempfile::tempdir().unwrap());
        let (seen, place) = (waits.clone(), images.path().to_owned());
        let freezing = std::thread::spawn(move || {
            let frozen = kept.freeze_seen(&[(vec![pid], None)]);
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            let telling = kept.tell_lengths(vec![pid], None, &place, &waits);
            let told = runtime.unwrap().block_on(telling);
            (frozen, told)
        });
        until("the server is asked", || {
            seen.list().iter().any(|wait| wait.what == Wait::Storage)
        });
        cut.send_replace(true);
        until("the wait is cut", || freezing.is_finished());
        let (frozen, told) = freezing.join().unwrap();
        assert_eq!(frozen, Ok(()));
        assert_eq!(told.unwrap_err().code(), ErrorCode::Aborted);
        drop((silent, holder));
        // It ended late, and says nothing any more.
        assert!(File::open(images.path().join("lengths")).is_err());
        assert_eq!(images.path().read_dir().unwrap().count(), 0);
    }
}
