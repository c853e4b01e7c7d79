//! What clients saw, as a list of answers on one clock, and what follows from it. No IO.
//!
//! The clock is the lab process's monotonic one, in nanoseconds since the clients began.

/// One answer that a client got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// When it was complete.
    pub at: u64,
    /// How long the client had waited for it, in microseconds.
    pub took: u32,
}

/// Answers of all clients, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Journal(Vec<Answer>);

/// A time without any answer: from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub from: u64,
    pub to: u64,
}

impl Gap {
    pub fn length(self) -> u64 {
        self.to - self.from
    }
}

/// What was answered in a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stretch {
    pub answers: usize,
    /// Per second.
    pub rate: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

impl Journal {
    pub fn of_clients(clients: impl IntoIterator<Item = Vec<Answer>>) -> Self {
        let mut all: Vec<Answer> = clients.into_iter().flatten().collect();
        all.sort_unstable_by_key(|answer| answer.at);
        Self(all)
    }

    /// All times of at least `length_min` without an answer of which a part lies between two
    /// moments. One that is not over at the end of the journal counts to `until`.
    pub fn gaps(&self, from: u64, until: u64, length_min: u64) -> Vec<Gap> {
        let first = self.0.partition_point(|answer| answer.at <= from);
        let begin = first
            .checked_sub(1)
            .map_or(from, |before| self.0[before].at);
        let mut gaps = Vec::new();
        let mut last = begin;
        let rest = self.0[first..].iter().map(|answer| answer.at);
        for at in rest.chain([until.max(last)]) {
            if at - last >= length_min {
                gaps.push(Gap { from: last, to: at });
            }
            if until <= at {
                break;
            }
            last = at;
        }
        gaps
    }

    /// The longest of them.
    pub fn longest_gap(&self, from: u64, until: u64) -> Option<Gap> {
        let gaps = self.gaps(from, until, 1);
        gaps.into_iter().max_by_key(|gap| gap.length())
    }

    /// What came after `from` and until `until`; none if nothing did.
    pub fn stretch(&self, from: u64, until: u64) -> Option<Stretch> {
        let answers = self.between(from, until);
        if answers.is_empty() {
            return None;
        }
        let mut took: Vec<u32> = answers.iter().map(|answer| answer.took).collect();
        took.sort_unstable();
        Some(Stretch {
            answers: answers.len(),
            rate: answers.len() as f64 * 1e9 / (until - from) as f64,
            p50_ms: of_rank(&took, 50),
            p99_ms: of_rank(&took, 99),
        })
    }

    /// Answers in each window of a width, from `from` on, as many windows as are whole.
    pub fn windows(&self, from: u64, until: u64, width: u64) -> Vec<u32> {
        let count = usize::try_from(until.saturating_sub(from) / width).unwrap_or_default();
        let mut windows = vec![0; count];
        for answer in self.between(from, until) {
            let index = usize::try_from((answer.at - from - 1) / width).unwrap_or(usize::MAX);
            if let Some(window) = windows.get_mut(index) {
                *window += 1;
            }
        }
        windows
    }

    /// When the rate was back: how long after `from` the first window of [`WINDOW`] begins that has
    /// nine tenths of the final rate, and with it the whole [`HOLD`] from there. None if that does
    /// not come before `until`.
    pub fn recovery(&self, from: u64, until: u64, final_rate: f64) -> Option<u64> {
        let wanted = 0.9 * final_rate * (WINDOW as f64 / 1e9);
        let windows = self.windows(from, until, WINDOW);
        let hold = usize::try_from(HOLD / WINDOW).unwrap_or(usize::MAX);
        let found = windows.windows(hold).position(|windows| {
            let all: u32 = windows.iter().sum();
            wanted <= f64::from(windows[0]) && wanted * hold as f64 <= f64::from(all)
        });
        Some(found? as u64 * WINDOW)
    }

    /// The last answer, if there is one.
    pub fn last(&self) -> Option<Answer> {
        self.0.last().copied()
    }

    fn between(&self, from: u64, until: u64) -> &[Answer] {
        let first = self.0.partition_point(|answer| answer.at <= from);
        let end = self.0.partition_point(|answer| answer.at <= until);
        &self.0[first..end.max(first)]
    }
}

fn of_rank(sorted: &[u32], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted
        .get(rank - 1)
        .map_or(0.0, |micros| f64::from(*micros) / 1e3)
}

/// Of the rate: 100 ms.
pub const WINDOW: u64 = 100_000_000;
/// How long a rate must hold to count: 1 s.
pub const HOLD: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// One answer every millisecond, but in some times.
    fn journal(seconds: u64, silent: &[(u64, u64)]) -> Journal {
        let times = (1..=seconds * 1000).filter(|ms| {
            let mut silent = silent.iter();
            !silent.any(|(from, to)| (*from + 1..*to).contains(ms))
        });
        let (even, odd): (Vec<_>, Vec<_>) = times.partition(|ms| ms % 2 == 0);
        let answers = |times: Vec<u64>| {
            let answers = times.into_iter().map(|ms| Answer {
                at: ms * MS,
                took: 500,
            });
            answers.collect()
        };
        Journal::of_clients([answers(even), answers(odd)])
    }

    #[test]
    fn a_gap_is_between_answers_of_any_client() {
        let journal = journal(5, &[(1000, 1007), (2000, 2150), (4000, 4003)]);
        let found: Vec<u64> = journal
            .gaps(500 * MS, 4500 * MS, 5 * MS)
            .iter()
            .map(|gap| gap.length() / MS)
            .collect();
        assert_eq!(found, [7, 150]);
        let longest = journal.longest_gap(0, 5000 * MS).expect("a gap");
        assert_eq!((longest.from / MS, longest.to / MS), (2000, 2150));
    }

    #[test]
    fn a_gap_counts_whole_when_a_part_of_it_lies_in_the_time() {
        let journal = journal(3, &[(1000, 1500)]);
        for (from, until) in [(1200, 2000), (500, 1200), (1200, 1300)] {
            let gap = journal.longest_gap(from * MS, until * MS).expect("a gap");
            assert_eq!(gap.length() / MS, 500, "{from} to {until}");
        }
    }

    #[test]
    fn silence_that_never_ends_is_a_gap_up_to_the_end() {
        let journal = journal(2, &[]);
        let gap = journal.longest_gap(0, 9000 * MS).expect("a gap");
        assert_eq!((gap.from / MS, gap.to / MS), (2000, 9000));
        let nothing = Journal::default();
        assert_eq!(
            nothing.longest_gap(0, 5 * MS),
            Some(Gap {
                from: 0,
                to: 5 * MS
            })
        );
        assert_eq!(nothing.stretch(0, 5 * MS), None);
    }

    #[test]
    fn a_rate_is_back_when_it_holds_for_a_second() {
        // Up at 1.5 s for 0.4 s, and for good at 2.2 s.
        let journal = journal(6, &[(1000, 1500), (1900, 2200)]);
        let back = journal.recovery(1000 * MS, 6000 * MS, 1000.0);
        assert_eq!(back, Some(1200 * MS));
        assert_eq!(journal.recovery(1000 * MS, 6000 * MS, 2000.0), None);
    }

    #[test]
    fn a_stretch_has_a_rate_and_percentiles() {
        let stretch = journal(3, &[])
            .stretch(MS * 1000, MS * 2000)
            .expect("answers");
        assert_eq!(stretch.answers, 1000);
        assert!((stretch.rate - 1000.0).abs() < 1e-6);
        assert!((stretch.p99_ms - 0.5).abs() < 1e-6);
    }
}
