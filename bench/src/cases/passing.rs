//! States that pass by themselves, as most do, or stay.

use std::time::{Duration, Instant};

/// Whether a state is there, now.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    stays: bool,
    is_on: bool,
    since: Instant,
}

impl Phase {
    /// One that stays as it is, or comes and goes.
    pub fn new(stays: bool) -> Self {
        Self {
            stays,
            is_on: true,
            since: Instant::now(),
        }
    }

    /// The state is there from now on.
    pub fn begin(&mut self) {
        self.is_on = true;
        self.since = Instant::now();
    }

    /// Whether it is time for the other one; then it is the other one.
    pub fn changes(&mut self) -> bool {
        let changes = !self.stays && self.since.elapsed() >= LASTS;
        if changes {
            self.is_on = !self.is_on;
            self.since = Instant::now();
        }
        changes
    }

    pub fn is_on(self) -> bool {
        self.is_on
    }
}

/// How long it is there, and how long it is not.
const LASTS: Duration = Duration::from_millis(700);
