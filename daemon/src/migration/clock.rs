//! The one clock of a migration: what the machines are told as `now`.

use std::time::Instant;

use pageferry_proto::migration::timer::Time;

/// Counts from its making.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Now.
    pub fn now(&self) -> Time {
        Time(self.0.elapsed())
    }

    /// Waits until `time`; for ever without one.
    pub async fn until(&self, time: Option<Time>) {
        match time {
            Some(time) => tokio::time::sleep_until((self.0 + time.0).into()).await,
            None => std::future::pending().await,
        }
    }
}
