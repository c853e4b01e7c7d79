//! How a freeze is given up for another round.

use super::state::{Retrying, State, Timer};
use super::{RETRIES_MAX, RetryReport, SourceMachine};
use crate::migration::status::Edges;
use crate::wire::control::{RoundEnd, SourceMessage};

impl SourceMachine {
    /// Thaws and sends another round, after a pause, and after what is on its way has arrived: a
    /// page must never be in flight twice, or the older one may be the one that stays.
    pub(super) fn retry(&mut self, report: RetryReport) {
        let round = match &self.state {
            State::Freezing { round } => *round,
            State::Finishing(finishing) if !finishing.sent => finishing.round,
            State::Journalling
            | State::Dialling
            | State::Offered
            | State::Tracking
            | State::Copying(_)
            | State::Retrying(_)
            | State::Finishing(_)
            | State::Prepared { .. }
            | State::Committed { .. }
            | State::Releasing(_)
            | State::Reclaiming { .. }
            | State::Aborting(_)
            | State::Telling
            | State::Settling { .. }
            | State::Closing { .. }
            | State::Closed { .. } => return self.out_of_place("a retry"),
        };
        self.counters.sent_bytes += report.raw_bytes;
        self.counters.wire_bytes += report.wire_bytes;
        if self.retries == RETRIES_MAX {
            return self.abort(report.reason);
        }
        let Some(undecided) = &self.undecided else {
            return self.out_of_place("a retry after the commit");
        };
        let permit = undecided.permit();
        self.retries += 1;
        self.generation = self.generation.next();
        self.given_up = Some(report.reason);
        self.edges = Edges::default();
        self.timers.stop(Timer::Frozen);
        self.timers
            .set(Timer::Overall, self.started_at.after(self.policy.timeout));
        self.state = State::Retrying(Retrying {
            round,
            pause: report.pause,
            thawed: false,
            rested: false,
            held: false,
        });
        self.thaw(permit, false);
        self.send(SourceMessage::RoundEnd(RoundEnd {
            round,
            parcels: report.parcels,
            pages: report.pages,
        }));
    }

    pub(super) fn continue_after_retry(&mut self) {
        let State::Retrying(retrying) = &self.state else {
            return self.out_of_place("the end of a retry");
        };
        if retrying.thawed && retrying.rested && retrying.held {
            self.send_round(retrying.round.next());
        }
    }
}
