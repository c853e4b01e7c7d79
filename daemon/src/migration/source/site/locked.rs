//! A lock on storage that both nodes have, at the moment of the freeze.
//!
//! Programs hold such locks for some milliseconds, so a freeze that meets one is given up before
//! CRIU is let in, and tried again after a random pause. How often, the machine decides.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use pageferry_proto::migration::source::SourceEvent;
use pageferry_proto::wire::code::Failure;
use tokio::task::block_in_place;

use super::Site;
use crate::migration::source::rounds::Sums;

/// The shortest pause, and how much longer it may be.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_SPREAD_MS: u64 = 180;

impl Site {
    /// What comes of a freeze that meets a lock; nothing if it meets none. The tree is frozen.
    pub(super) fn held_lock(&self, pids: &[i32]) -> Result<Option<SourceEvent>, Failure> {
        let held = block_in_place(|| self.locks.held(pids));
        let Some(lock) = held.first() else {
            return Ok(None);
        };
        let pause = pause(RandomState::new().build_hasher().finish());
        tracing::info!(?pause, ?lock, "the freeze is given up");
        Sums::default().given_up(lock.refused(), pause).map(Some)
    }
}

/// How long the workload runs before the next try: random, so as not to meet it in step.
fn pause(random: u64) -> Duration {
    PAUSE_MIN + Duration::from_millis(random % PAUSE_SPREAD_MS)
}
