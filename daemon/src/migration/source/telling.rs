//! What the driver tells whoever watches: the reports of the machine, and what it has measured.

use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::migration::policy::Mode;
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::SourceDriver;
use crate::migration::progress::Progress;

/// What a freeze came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    /// How long CRIU held the tasks.
    pub(super) frozen: Option<Duration>,
    /// How long shared storage was synced.
    pub(super) synced: Option<Duration>,
    /// Pages of the final round, and those that were to follow it.
    pub(super) final_pages: Option<u64>,
    pub(super) followed: Option<PageCount>,
}

impl Measured {
    /// How the memory has moved, of which the machine says what rounds have sent.
    fn mode(&self, status: &Status) -> Option<Mode> {
        Some(match (self.followed?, status.sent_bytes) {
            (PageCount::ZERO, _) => Mode::Precopy,
            (_, 0) => Mode::Postcopy,
            _ => Mode::Hybrid,
        })
    }
}

impl SourceDriver {
    /// Between the reports of the machine: what a long round has sent so far, and how often the
    /// workload was paused for its scan.
    pub(super) fn tell_progress(&mut self) {
        let (raw_bytes, wire_bytes) = self.sent.take();
        if self.is_drained {
            self.fetched.0 += raw_bytes;
            self.fetched.1 += wire_bytes;
        }
        let (pauses, longest_pause) = self.paused.told();
        self.status.send_if_modified(|progress| {
            if raw_bytes == 0 && progress.pauses == pauses {
                return false;
            }
            let progress = Arc::make_mut(progress);
            progress.status.sent_bytes += raw_bytes;
            progress.status.wire_bytes += wire_bytes;
            progress.pauses = pauses;
            progress.longest_pause = longest_pause;
            true
        });
    }

    /// What the machine reports, with what the driver knows besides.
    pub(super) fn publish(&mut self, status: Status) {
        // The machine counts whole rounds: its sums replace those of the pieces. What was fetched
        // is of none.
        let (raw_bytes, wire_bytes) = self.sent.take();
        if self.is_drained {
            self.fetched.0 += raw_bytes;
            self.fetched.1 += wire_bytes;
        }
        let mode = self.measured.mode(&status);
        let mut status = status;
        status.sent_bytes += self.fetched.0;
        status.wire_bytes += self.fetched.1;
        let Measured {
            frozen,
            synced,
            final_pages,
            followed,
        } = self.measured;
        let (pauses, longest_pause) = self.paused.told();
        let outdated = |failure: &Failure| failure.code() == ErrorCode::SmapsDiffer;
        let repeat = self.repeatable
            && status.phase == Phase::Aborted
            && status.failure.as_ref().is_some_and(outdated);
        let progress = Progress {
            status,
            frozen,
            synced,
            pauses,
            longest_pause,
            final_pages,
            followed,
            mode,
            successor: self.successor,
            pid_at_target: self.pid_at_target,
            waiting: false,
            missing: None,
            waited: None,
            notes: self.notes.clone(),
            recovered: self.recovered,
        };
        if repeat {
            self.held_back = Some(progress);
        } else {
            self.status.send_replace(Arc::new(progress));
        }
    }
}
