//! A lock on storage that both nodes have, at the moment of the freeze.
//!
//! Programs hold such locks for some milliseconds, so a freeze that meets one is given up before
//! CRIU is let in, and tried again after a random pause. How often, the machine decides.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use pageferry_proto::migration::source::{RetryReport, SourceEvent};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::Failure;
use tokio::task::block_in_place;

use super::Site;
use crate::migration::source::failure::freeze_failed;

/// The shortest pause, and how much longer it may be.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_SPREAD_MS: u64 = 180;

impl Site {
    /// What comes of a freeze that meets a lock; nothing if it meets none. The tree is frozen.
    pub(super) fn held_lock(&self) -> Result<Option<SourceEvent>, Failure> {
        let held = block_in_place(|| {
            let pids = self
                .freezer
                .processes()
                .map_err(|error| freeze_failed(&error))?;
            Ok(self.locks.held(&pids))
        })?;
        Ok(held.first().map(|lock| {
            let pause = pause(RandomState::new().build_hasher().finish());
            tracing::info!(?pause, ?lock, "the freeze is given up");
            given_up(lock.refused(), pause)
        }))
    }
}

/// How long the workload runs before the next try: random, so as not to meet it in step.
fn pause(random: u64) -> Duration {
    PAUSE_MIN + Duration::from_millis(random % PAUSE_SPREAD_MS)
}

/// A freeze that was given up before anything of it was sent.
fn given_up(reason: Failure, pause: Duration) -> SourceEvent {
    SourceEvent::Retry(RetryReport {
        parcels: 0,
        pages: PageCount(0),
        raw_bytes: 0,
        wire_bytes: 0,
        pause,
        reason,
    })
}
