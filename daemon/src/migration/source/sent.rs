//! What a round under way has sent so far: for progress, nothing depends on it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what is sent, for progress within a round.
#[derive(Debug, Default)]
pub struct Sent {
    raw_bytes: AtomicU64,
    wire_bytes: AtomicU64,
}

impl Sent {
    /// A parcel of so many bytes of pages has been sent.
    pub(super) fn add(&self, raw_bytes: u64, wire_bytes: u64) {
        self.raw_bytes.fetch_add(raw_bytes, Ordering::Relaxed);
        self.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
    }

    /// Bytes of pages and on the wire since the last call.
    pub(super) fn take(&self) -> (u64, u64) {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        (take(&self.raw_bytes), take(&self.wire_bytes))
    }
}
