//! A lock on storage that both nodes have, at the moment of the freeze.
//!
//! Programs hold such locks for some milliseconds, so a freeze that meets one is given up before
//! CRIU is let in, and tried again after a random pause. How often, the machine decides.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::wire::code::Failure;

use crate::migration::source::sending::Sums;
use crate::migration::source::waits::Waits;
use crate::runtime::detached;
use crate::runtime::locks::{Locks, SharedLock};

/// The shortest pause, and how much longer it may be.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_SPREAD_MS: u64 = 180;

/// What comes of a freeze that meets a lock; nothing if it meets none. The tree is frozen.
pub(super) async fn look(
    locks: &Locks,
    pids: &[i32],
    waits: &Waits,
) -> Result<Option<SourceEvent>, Failure> {
    let held = held(locks, pids, waits).await?;
    let Some(lock) = held.first() else {
        return Ok(None);
    };
    let pause = pause(RandomState::new().build_hasher().finish());
    tracing::info!(?pause, ?lock, "the freeze is given up");
    Sums::default().given_up(lock.refused(), pause).map(Some)
}

/// Deleted files are asked about at their storage, which may not answer.
async fn held(locks: &Locks, pids: &[i32], waits: &Waits) -> Result<Vec<SharedLock>, Failure> {
    if locks.is_empty() {
        return Ok(Vec::new());
    }
    let (locks, pids) = (locks.clone(), pids.to_vec());
    let looking = detached::done("locks", move || locks.held(&pids));
    waits.on(Wait::Storage, looking).await?
}

/// How long the workload runs before the next try: random, so as not to meet it in step.
fn pause(random: u64) -> Duration {
    PAUSE_MIN + Duration::from_millis(random % PAUSE_SPREAD_MS)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use pageferry_proto::wire::code::ErrorCode;
    use tokio::sync::watch;

    use super::*;
    use crate::runtime::shared::Storage;
    use crate::runtime::shared::tests::fuse::{Fuse, Silent};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_server_that_does_not_answer_about_a_deleted_file_holds_no_freeze_that_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let fuse = Fuse::mount(folder.path());
        fuse.state().uncached = true;
        let storage = Storage::find(std::slice::from_ref(&fuse.path)).unwrap();
        let locks = Locks::on(&storage, None);
        let path = fuse.path.join("data");
        let _open = File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (cut, cancelled) = watch::channel(false);
        let waits = Waits::new(cancelled);
        let silent = Silent::begin(&fuse);
        let looking = tokio::spawn({
            let waits = waits.clone();
            let own = [std::process::id().cast_signed()];
            async move { held(&locks, &own, &waits).await }
        });
        let asked = async {
            while waits.list().is_empty() {
                tokio::task::yield_now().await;
            }
            cut.send_replace(true);
            looking.await.unwrap()
        };
        let looked = tokio::time::timeout(Duration::from_secs(20), asked).await;
        drop(silent);
        let failure = looked.expect("it is cut").unwrap_err();
        assert_eq!(failure.code(), ErrorCode::Aborted);
    }
}
