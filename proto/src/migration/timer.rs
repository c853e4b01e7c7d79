//! Time as the machines know it: an argument, and a table of deadlines.

use std::time::Duration;

/// A moment: the time since a start that the caller chose and never changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub Duration);

/// One deadline per timer of a machine. `Timer` is a machine's enum of timers; there are few of
/// them, so a list is searched.
#[derive(Clone, Debug)]
pub(crate) struct Timers<Timer> {
    set: Vec<(Timer, Time)>,
}

impl Time {
    /// The moment `duration` later.
    #[must_use]
    pub const fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// How long ago `earlier` was; zero if it is later.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl<Timer: Copy + PartialEq> Timers<Timer> {
    pub(crate) const fn new() -> Self {
        Self { set: Vec::new() }
    }

    /// Sets the timer, whether or not it was set.
    pub(crate) fn set(&mut self, timer: Timer, deadline: Time) {
        self.stop(timer);
        self.set.push((timer, deadline));
    }

    pub(crate) fn stop(&mut self, timer: Timer) {
        self.set.retain(|(set, _)| *set != timer);
    }

    pub(crate) fn stop_all(&mut self) {
        self.set.clear();
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Time> {
        self.set.iter().map(|(_, deadline)| *deadline).min()
    }

    /// Takes the timer with the earliest deadline that is not after `now`.
    pub(crate) fn expired(&mut self, now: Time) -> Option<Timer> {
        let earliest = self
            .set
            .iter()
            .enumerate()
            .min_by_key(|(_, (_, deadline))| *deadline);
        let (index, (_, deadline)) = earliest?;
        if now < *deadline {
            return None;
        }
        Some(self.set.swap_remove(index).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_expire_in_the_order_of_their_deadlines() {
        let at = |seconds| Time(Duration::from_secs(seconds));
        let mut timers = Timers::new();
        timers.set('a', at(3));
        timers.set('b', at(2));
        timers.set('a', at(1));
        timers.set('c', at(9));
        timers.stop('c');
        assert_eq!(timers.next(), Some(at(1)));
        assert_eq!(timers.expired(Time::default()), None);
        assert_eq!(timers.expired(at(5)), Some('a'));
        assert_eq!(timers.expired(at(5)), Some('b'));
        assert_eq!(timers.expired(at(5)), None);
    }
}
