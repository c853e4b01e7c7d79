//! What the coming and going of the connection means.

use super::SourceMachine;
use super::state::{Link, State, Timer};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};

impl SourceMachine {
    pub(super) fn peer_connected(&mut self, now: Time) {
        self.link = Link::Up;
        self.timers.stop(Timer::Redial);
        match &self.state {
            State::Dialling => self.offer(now),
            State::Committed { .. } => self.ask(now),
            State::Telling => self.tell(now),
            State::Settling { .. } => self.settle(now),
            State::Journalling
            | State::Offered
            | State::Tracking
            | State::Copying(_)
            | State::Retrying(_)
            | State::Freezing { .. }
            | State::Finishing(_) => self.out_of_place("a connection"),
            State::Prepared { .. }
            | State::Releasing(_)
            | State::Reclaiming { .. }
            | State::Aborting(_)
            | State::Closing { .. }
            | State::Closed { .. } => {}
        }
    }

    pub(super) fn peer_lost(&mut self, now: Time) {
        self.link = Link::Down;
        self.timers.stop(Timer::Resend);
        match &self.state {
            State::Dialling => {
                self.abort_with(ErrorCode::PeerLost, "the target cannot be reached");
            }
            State::Offered
            | State::Tracking
            | State::Copying(_)
            | State::Retrying(_)
            | State::Freezing { .. }
            | State::Finishing(_) => {
                self.abort_with(ErrorCode::PeerLost, "the connection to the target is gone");
            }
            State::Committed { .. } | State::Telling | State::Settling { .. } => {
                self.redial_later(now);
            }
            // Nothing was dialled, or nobody waits for an answer: what needs the peer dials.
            State::Journalling
            | State::Prepared { .. }
            | State::Releasing(_)
            | State::Reclaiming { .. }
            | State::Aborting(_)
            | State::Closing { .. }
            | State::Closed { .. } => {}
        }
    }

    /// There is no connection, and that has a reason which says more than that.
    pub(super) fn peer_refused(&mut self, now: Time, failure: Failure) {
        self.link = Link::Down;
        match &self.state {
            State::Dialling
            | State::Offered
            | State::Tracking
            | State::Copying(_)
            | State::Retrying(_)
            | State::Freezing { .. }
            | State::Finishing(_) => self.abort(failure),
            // It may change its mind, or its certificate.
            State::Committed { .. } => self.note(failure),
            State::Journalling
            | State::Prepared { .. }
            | State::Releasing(_)
            | State::Reclaiming { .. }
            | State::Aborting(_)
            | State::Telling
            | State::Settling { .. }
            | State::Closing { .. }
            | State::Closed { .. } => {}
        }
        self.peer_lost(now);
    }
}
