//! How long what took, from one thing to the next.

use std::time::{Duration, Instant};

/// A clock that says each lap.
#[derive(Debug)]
pub struct Laps {
    last: Instant,
    taken: Vec<(&'static str, Duration)>,
}

impl Laps {
    pub fn start() -> Self {
        Self {
            last: Instant::now(),
            taken: Vec::new(),
        }
    }

    /// What is done now.
    pub fn lap(&mut self, what: &'static str) {
        let took = self.last.elapsed();
        self.last = Instant::now();
        eprintln!("lab: {what} ({:.1} s)", took.as_secs_f64());
        self.taken.push((what, took));
    }

    pub fn taken(&self) -> &[(&'static str, Duration)] {
        &self.taken
    }
}
