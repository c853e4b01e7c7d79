//! What came for a workload while it stood still, at its target: frames that its source kept, and
//! those that reach its links here before it has had the others.
//!
//! Invariants: nothing is given to a workload that has not been let go; what the source kept comes
//! first, in its order, also what came to it until it heard that the workload runs here; a daemon
//! that is started anew gives none of what it has not seen before, since another may have.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pageferry_proto::migration::parked::Order;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::parked::Parked;
use pageferry_proto::wire::stream::{StreamError, unseal};

use crate::link::park::Await;
use crate::migration::text::chain;

/// What has come, and what it is given to.
#[derive(Debug, Default)]
pub struct Parking(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    order: Order,
    /// The workload's links, once they are there.
    links: Option<Await>,
    course: Course,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Course {
    #[default]
    Waits,
    /// The workload has been let go: what comes is given to it.
    Delivers,
    /// What comes is dropped.
    Closed,
}

impl Parking {
    /// One that takes nothing.
    pub fn closed() -> Self {
        let parking = Self::default();
        parking.close();
        parking
    }

    /// Whether it takes what a source has kept.
    pub fn is_open(&self) -> bool {
        self.lock().course != Course::Closed
    }

    /// The bytes of a stream have come, all of them.
    pub fn take(&self, bytes: &[u8]) -> Result<(), Failure> {
        let refused = |code, error: StreamError| Failure::new(code, error.to_string());
        let body = unseal(bytes).map_err(|error| refused(ErrorCode::Checksum, error))?;
        let parked = Parked::decode(body);
        self.put(parked.map_err(|error| refused(ErrorCode::Malformed, error))?);
        Ok(())
    }

    fn put(&self, parked: Parked) {
        let mut state = self.lock();
        match state.course {
            Course::Closed => {}
            Course::Waits => state.order.put(parked),
            Course::Delivers => {
                state.order.put(parked);
                state.give();
                if state.order.is_whole() {
                    state.open();
                }
            }
        }
    }

    /// The workload's links are these: what comes by them waits.
    pub(super) fn await_by(&self, links: Await) {
        let mut state = self.lock();
        if state.course == Course::Waits {
            state.links = Some(links);
        }
    }

    /// The workload has been let go: it has what its source kept, and has sent so far.
    pub(super) fn deliver(&self) {
        let mut state = self.lock();
        if state.course == Course::Waits {
            let given = state.give();
            state.course = Course::Delivers;
            let lost = state.order.lost();
            tracing::debug!(given, lost, "the workload has what its source kept for it");
        }
    }

    /// It has what has come here, too, and from here on what comes passes, whether or not its
    /// source has said that this is all.
    pub(super) fn open(&self) {
        self.lock().open();
    }

    /// The workload does not come, or came with another daemon: what was kept for it is nobody's.
    pub(super) fn close(&self) {
        *self.lock() = State {
            course: Course::Closed,
            ..State::default()
        };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn open(&mut self) {
        if let Some(Err(error)) = self.links.as_mut().map(Await::deliver) {
            // Its program ends with it, and lets everything pass.
            tracing::warn!("a gate is given up: {}", chain(&error));
            self.links = None;
        }
    }

    /// Gives the workload what its source kept, as far as it is here. Returns how many frames.
    fn give(&mut self) -> u64 {
        let mut given = 0;
        while let Some(frame) = self.order.pop() {
            if let Some(links) = &self.links {
                links.inject(frame);
                given += 1;
            }
        }
        given
    }
}

#[cfg(test)]
mod tests {
    use pageferry_proto::id::Generation;

    use super::*;

    #[test]
    fn what_is_closed_takes_nothing_and_says_so() {
        let parking = Parking::default();
        assert!(parking.is_open());
        parking.put(Parked {
            generation: Generation::FIRST,
            first: 0,
            frames: Vec::new(),
        });
        let refused = parking.take(&[0; 8]).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::Checksum);
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0, 16];
        pageferry_proto::wire::stream::seal(&mut bytes);
        let refused = parking.take(&bytes).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::Malformed);
        parking.deliver();
        parking.open();
        assert!(parking.is_open());
        parking.close();
        assert!(!parking.is_open() && !Parking::closed().is_open());
    }
}
