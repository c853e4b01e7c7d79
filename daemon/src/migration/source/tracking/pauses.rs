//! Scans of a workload with direct I/O: made while it stands still, in pauses.
//!
//! A scan that comes in the middle of a direct read loses what is read after it (see
//! [`pageferry_pages::track::refuse`]), and a thread of a frozen workload is in the middle of none.
//! So each pause freezes the cgroup, walks a part of the memory, looks whether every thread was at
//! rest all the while, and thaws. What a part has found holds whatever comes between the pauses.
//!
//! ```text
//! freeze ── a thread in a direct read is waited for: the storage decides how long
//! walk ──── until PAUSE_MAX is over, all included; some of it in any case
//! look ──── was every thread at rest? If not, this part is walked once more
//! thaw ──── calls that the freeze has interrupted are restarted
//! ```
//!
//! A storage that is slow is waited for a little longer each time, up to [`PATIENCE_MAX`]: the
//! threads that were not in a read stand still for as long. What is slower does not move. Between
//! two pauses the workload runs at least [`RUNNING_SHARE`] times as long as it stood still.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageferry_pages::track::frozen::Frozen;
use pageferry_pages::track::{Scan, Scanning, Space, TrackError};
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::priority;
use tokio::task::block_in_place;

use crate::migration::source::failure::freeze_failed;
use crate::migration::source::waits::Waits;
use crate::migration::source::workload::Workload;
use crate::runtime::passing;

/// How often a workload stood still for a scan, and for how long at most. Clones count the same.
#[derive(Clone, Debug, Default)]
pub struct Paused(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    pauses: AtomicU32,
    longest_us: AtomicU64,
}

impl Paused {
    /// How many pauses there were, and the longest, if there were any.
    pub fn told(&self) -> (u32, Option<Duration>) {
        let pauses = self.0.pauses.load(Ordering::Relaxed);
        let longest = Duration::from_micros(self.0.longest_us.load(Ordering::Relaxed));
        (pauses, (0 < pauses).then_some(longest))
    }

    fn add(&self, pause: Duration) {
        let micros = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        self.0.longest_us.fetch_max(micros, Ordering::Relaxed);
        self.0.pauses.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes scans in pauses.
#[derive(Debug)]
pub(super) struct Pauses {
    paused: Paused,
    /// How long the next freeze may take.
    patience: Duration,
    /// How long it took in the last pause to let the workload go.
    letting_go: Duration,
}

/// Scans that are not at their end.
type UnderWay<'a> = Vec<(SpaceId, Scanning<'a>)>;

/// What scans came to.
pub(super) type Scanned = BTreeMap<SpaceId, Result<Scan, TrackError>>;

/// What one pause came to.
#[derive(Debug)]
struct Pause {
    /// From the freeze being asked for to the thaw.
    took: Duration,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// A part of the memory was walked with everybody at rest. Else nothing is gained.
    Walked,
    /// The cgroup did not freeze in time.
    NotFrozen,
    /// This thread was not at rest.
    Busy(i32),
}

impl Pauses {
    pub(super) fn new(paused: Paused) -> Self {
        Self {
            paused,
            patience: PATIENCE_FIRST,
            letting_go: Duration::ZERO,
        }
    }

    pub(super) fn paused(&self) -> Paused {
        self.paused.clone()
    }

    /// Scans these spaces. The error is of the workload as a whole.
    pub(super) fn scan<'a>(
        &mut self,
        workload: &Workload,
        spaces: Vec<(&'a SpaceId, &'a mut Space)>,
        waits: &Waits,
    ) -> Result<Scanned, Failure> {
        let scanning = waits.begin(Wait::Scan);
        let began = Instant::now();
        let mut scanned = Scanned::new();
        let mut under_way = UnderWay::new();
        for (id, space) in spaces {
            match space.begin_scan() {
                Ok(scan) => under_way.push((*id, scan)),
                Err(error) => drop(scanned.insert(*id, Err(error))),
            }
        }
        let (mut pauses, mut failed, mut rest) = (0, 0, Duration::ZERO);
        loop {
            under_way = settle(under_way, &mut scanned);
            if under_way.is_empty() {
                break;
            }
            std::thread::sleep(rest);
            scanning.check()?;
            let pause = self.pause(workload, &mut under_way, &mut scanned)?;
            self.paused.add(pause.took);
            pauses += 1;
            rest = pause.took * RUNNING_SHARE;
            failed = match pause.outcome {
                Outcome::Walked => 0,
                Outcome::NotFrozen | Outcome::Busy(_) => failed + 1,
            };
            if FAILED_MAX < failed {
                return Err(restless(workload, pause.outcome));
            }
        }
        tracing::debug!(pauses, took = ?began.elapsed(), "scanned at rest");
        Ok(scanned)
    }

    /// Walks a part of what is left while everybody stands still.
    fn pause(
        &mut self,
        workload: &Workload,
        under_way: &mut UnderWay<'_>,
        scanned: &mut Scanned,
    ) -> Result<Pause, Failure> {
        let _urgent = Urgent::from_now_on();
        let (began, patience) = (Instant::now(), self.patience);
        let todo: Vec<_> = under_way.iter().map(|(_, scan)| scan.todo()).collect();
        let is_over = || patience < began.elapsed();
        let frozen = block_in_place(|| workload.freezer.freeze_unless(is_over));
        let frozen_after = began.elapsed();
        let mut failed = Vec::new();
        if matches!(frozen, Ok(true)) {
            let spare = spare_time(frozen_after, self.letting_go);
            failed = walk(under_way, Instant::now() + spare);
        }
        let walked_after = began.elapsed();
        let (frozen_threads, looked) = match workload.look() {
            Ok(found) => (found, Ok(())),
            Err(failure) => (Frozen::default(), Err(failure)),
        };
        let busy = frozen_threads.busy();
        let thawed = frozen_threads.thaw(|| {
            let thawed = workload.freezer.thaw();
            thawed.map(|()| began.elapsed())
        });
        let took = thawed.map_err(|error| freeze_failed(&error))?;
        looked?;
        self.letting_go = took - walked_after;
        let outcome = match (frozen.map_err(|error| freeze_failed(&error))?, busy) {
            (false, _) => Outcome::NotFrozen,
            (true, Some(thread)) => Outcome::Busy(thread),
            (true, None) => Outcome::Walked,
        };
        if let Outcome::Busy(_) = outcome {
            let again = under_way.iter_mut().zip(todo);
            again.for_each(|((_, scan), todo)| scan.walk_again(todo));
        }
        for (place, error) in failed.into_iter().rev() {
            let (id, _) = under_way.remove(place);
            scanned.insert(id, Err(error));
        }
        self.patience = match outcome {
            Outcome::NotFrozen => (patience * 2).min(PATIENCE_MAX),
            _ if frozen_after < patience / 4 => (patience / 2).max(PATIENCE_FIRST),
            _ => patience,
        };
        tracing::debug!(
            ?took,
            ?frozen_after,
            ?walked_after,
            ?outcome,
            "paused for a scan"
        );
        Ok(Pause { took, outcome })
    }
}

/// While this is there, whoever else waits for a processor lets this thread go first, and those
/// that it starts: a turn of somebody else would be as long as a pause.
struct Urgent(i32);

impl Urgent {
    fn from_now_on() -> Self {
        Self(priority::make_urgent())
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Err(error) = priority::set(self.0) {
            tracing::debug!(%error, "urgent still");
        }
    }
}

/// How long the memory may be walked in a pause whose freeze took so long, if letting go takes as
/// long as in the last one.
fn spare_time(frozen_after: Duration, letting_go: Duration) -> Duration {
    if PAUSE_MAX < frozen_after {
        // Storage was waited for: it will be no short pause.
        return PAUSE_MAX;
    }
    let letting_go = letting_go.max(frozen_after * LETTING_GO_SHARE);
    (PAUSE_MAX - RESERVE)
        .saturating_sub(frozen_after + letting_go)
        .max(WALK_MIN)
}

/// Walks each of these as far as there is time; the places of those that failed.
fn walk(under_way: &mut UnderWay<'_>, until: Instant) -> Vec<(usize, TrackError)> {
    let mut failed = Vec::new();
    for (place, (_, scan)) in under_way.iter_mut().enumerate() {
        if let Err(error) = scan.walk(Some(until)) {
            failed.push((place, error));
        }
        if until <= Instant::now() {
            break;
        }
    }
    failed
}

/// Takes those out that are at their end, one way or the other. The workload runs.
fn settle<'a>(under_way: UnderWay<'a>, scanned: &mut Scanned) -> UnderWay<'a> {
    let mut left = UnderWay::new();
    for (id, mut scan) in under_way {
        match scan.register_replaced() {
            Err(error) => drop(scanned.insert(id, Err(error))),
            Ok(()) if scan.is_walked() => drop(scanned.insert(id, scan.end())),
            Ok(()) => left.push((id, scan)),
        }
    }
    left
}

/// It does not come to rest.
fn restless(workload: &Workload, outcome: Outcome) -> Failure {
    let root = workload.root();
    let what = match outcome {
        Outcome::Busy(thread) => format!(
            "thread {thread} waits within a read for an answer of its storage, in which the \
             freezer of cgroup v1 freezes it: use cgroup v2"
        ),
        Outcome::NotFrozen | Outcome::Walked => {
            let pids = workload.pids().unwrap_or_default();
            let sleeper = block_in_place(|| passing::uninterruptible(&pids));
            let who = sleeper.map_or_else(|| "a thread".to_owned(), |sleeper| sleeper.holder);
            format!("{who} did not come out of a read, or of another wait, within {PATIENCE_MAX:?}")
        }
    };
    let text = format!(
        "the tree of process {root} has files open for direct I/O, so its memory is scanned while \
         it stands still, and it does not: {what}. Try again when its storage is faster, or start \
         the program without O_DIRECT (MariaDB and MySQL: innodb_flush_method=fsync)"
    );
    Failure::new(ErrorCode::DirectIo, text)
}

/// How long a pause may last, all included, unless to freeze and to let go alone take longer.
///
/// Measured with `lab run memory --only direct-io-late` and `direct-io-threads` on two cores, as
/// medians: 1.0 ms with six threads (freeze 0.15, walk 0.55, look and thaw 0.15), 3.8 ms with 200
/// more that wait in `epoll_wait` (1.1, 0.8 and 1.6), of which one in 35 was longer than this (5.4
/// ms). A thousand of those take 8 ms, whatever is walked. A walk that protects all it comes to
/// takes 25 ms per GiB, one that finds nothing written 7 ms.
pub const PAUSE_MAX: Duration = Duration::from_millis(5);

/// What of that is left for what takes longer than it did before.
const RESERVE: Duration = Duration::from_millis(1);

/// How many times as long as to freeze it takes to let go of threads whose calls are restarted.
const LETTING_GO_SHARE: u32 = 2;

/// How long the memory is walked at least: less would not be worth the freeze.
const WALK_MIN: Duration = Duration::from_millis(1);

/// How long a freeze may take at first. Without storage to wait for it takes 0.1 ms, and 5 us for
/// each thread that sleeps in a system call.
const PATIENCE_FIRST: Duration = Duration::from_millis(2);

/// The longest: much less than the downtime that is allowed by default, and more than most disks
/// take for all that is asked of them.
pub const PATIENCE_MAX: Duration = Duration::from_millis(128);

/// How often in a row a pause may be for nothing: up to the longest patience, and then some.
const FAILED_MAX: u32 = 8;

/// How many times as long as it stood still the workload runs before the next pause.
const RUNNING_SHARE: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_walked_in_what_freeze_and_thaw_leave_of_a_pause() {
        let micros = Duration::from_micros;
        for (frozen_after, letting_go, expected) in [
            (0, 0, 4000),
            (500, 0, 2500),
            (500, 2000, 1500),
            (1000, 2000, 1000),
            (2000, 2000, 1000),
            (5000, 5000, 1000),
            (60_000, 1000, 5000),
        ] {
            let spare = spare_time(micros(frozen_after), micros(letting_go));
            assert_eq!(spare, micros(expected), "{frozen_after} {letting_go}");
        }
    }
}
