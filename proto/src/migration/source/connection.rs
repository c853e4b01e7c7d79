//! What the coming and going of the connection means.

use super::SourceMachine;
use super::state::{Decided, Link, Over, State, Step, Timer};
use crate::migration::timer::Time;
use crate::wire::code::{ErrorCode, Failure};

impl SourceMachine {
    pub(super) fn peer_connected(&mut self, now: Time) {
        self.link = Link::Up;
        self.timers.stop(Timer::Redial);
        match &self.state {
            State::Undecided(_, Step::Dialling) => self.offer(now),
            State::Undecided(..) => self.out_of_place("a connection"),
            State::Decided(_) | State::Over(_) => self.speak(now),
        }
    }

    pub(super) fn peer_lost(&mut self, now: Time) {
        self.link = Link::Down;
        self.timers.stop(Timer::Resend);
        match &self.state {
            // Nothing was dialled.
            State::Undecided(_, Step::Journalling) => {}
            State::Undecided(_, Step::Dialling) => {
                self.abort_with(ErrorCode::PeerLost, "the target cannot be reached");
            }
            State::Undecided(..) => {
                self.abort_with(ErrorCode::PeerLost, "the connection to the target is gone");
            }
            State::Decided(Decided::Committed { .. } | Decided::Draining(_))
            | State::Over(Over::Telling | Over::Settling { .. }) => self.redial_later(now),
            // Nobody waits for an answer: what needs the peer dials.
            State::Decided(_) | State::Over(_) => {}
        }
    }

    /// There is no connection, and that has a reason which says more than that.
    pub(super) fn peer_refused(&mut self, now: Time, failure: Failure) {
        self.link = Link::Down;
        match &self.state {
            State::Undecided(_, Step::Journalling) => {}
            State::Undecided(..) => self.abort(failure),
            // It may change its mind, or its certificate.
            State::Decided(
                Decided::Unlocking { .. } | Decided::Committed { .. } | Decided::Draining(_),
            ) => {
                self.note(failure);
            }
            State::Decided(_) | State::Over(_) => {}
        }
        self.peer_lost(now);
    }
}
