//! How a freeze is given up for another round.

use super::state::{Finishing, Retrying, State, Step, Timer};
use super::{RETRIES_MAX, RetryReport, SourceMachine};
use crate::migration::status::Edges;
use crate::wire::control::{RoundEnd, SourceMessage};

impl SourceMachine {
    /// Thaws and sends another round, after a pause, and after what is on its way has arrived: a
    /// page must never be in flight twice, or the older one may be the one that stays.
    pub(super) fn retry(&mut self, report: RetryReport) {
        let State::Undecided(undecided, step) = &mut self.state else {
            return self.out_of_place("a retry");
        };
        let (Step::Freezing { round }
        | Step::Finishing(Finishing {
            round, sent: false, ..
        })) = *step
        else {
            return self.out_of_place("a retry");
        };
        self.counters.sent_bytes += report.raw_bytes;
        self.counters.wire_bytes += report.wire_bytes;
        if self.retries == RETRIES_MAX {
            return self.abort(report.reason);
        }
        let permit = undecided.permit();
        *step = Step::Retrying(Retrying {
            round,
            pause: report.pause,
            thawed: false,
            rested: false,
            held: false,
        });
        self.retries += 1;
        self.generation = self.generation.next();
        self.given_up = Some(report.reason);
        self.edges = Edges::default();
        self.timers.stop(Timer::Frozen);
        self.timers
            .set(Timer::Overall, self.started_at.after(self.policy.timeout));
        self.thaw(permit, false);
        self.send(SourceMessage::RoundEnd(RoundEnd {
            round,
            parcels: report.parcels,
            pages: report.pages,
            files: 0,
        }));
    }

    pub(super) fn continue_after_retry(&mut self) {
        let Some(Step::Retrying(retrying)) = self.state.step() else {
            return self.out_of_place("the end of a retry");
        };
        if retrying.thawed && retrying.rested && retrying.held {
            let next = retrying.round.next();
            self.send_round(next);
        }
    }
}
