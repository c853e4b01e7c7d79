//! Tracking real processes. All tests need root, and a kernel that can track.

mod blocked;
mod frozen;
mod injected;
mod memory;
mod pieces;
mod refused;
mod stopped;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_trial::{self as trial, Trial};

use super::{ATTEMPTS, FinalScan, STOP_MAX, Scan, Space, Support, TrackError, TrackOptions, task};
use crate::read::Misses;

/// The other process of all tests in `pages`.
#[test]
fn workload() {
    trial::obey();
}

const WORKLOAD: &str = "track::tests::workload";

/// Where the trial process maps what it is told to: far from everything else.
const BASE: u64 = 0x2000_0000_0000;

pub(crate) fn start() -> Trial {
    Trial::start(WORKLOAD)
}

pub(crate) fn attach(trial: &Trial) -> Space {
    Space::attach(trial.pid(), &options()).unwrap()
}

fn options() -> TrackOptions {
    TrackOptions {
        support: Support::probe().unwrap(),
        tree: Vec::new(),
        // The tests run beside each other, so that a thread may wait for a processor.
        stop_max: 10 * STOP_MAX,
        attempts: ATTEMPTS,
    }
}

/// The address of page `page` of the tests' memory.
fn at(page: u64) -> String {
    format!("{:#x}", BASE + page * PAGE_SIZE as u64)
}

/// Pages of the tests' memory.
fn run(page: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex((BASE >> 12) + page), PageCount(count)).unwrap()
}

/// What of a set lies in the tests' memory, as (first page, count).
fn ours(set: &PageSet) -> Vec<(u64, u64)> {
    let area = PageSet::from(run(0, 1 << 20));
    let inside = set.intersection(&area);
    inside
        .runs()
        .iter()
        .map(|run| (run.start().0 - (BASE >> 12), run.count().0))
        .collect()
}

/// A target that is a map from pages to bytes.
#[derive(Default)]
struct Mirror(BTreeMap<u64, Vec<u8>>);

impl Mirror {
    /// Takes over what a scan found.
    fn copy(&mut self, space: &mut Space, pages: &PageSet) {
        let reader = space.reader();
        for batch in pages.partition(PageCount(256)) {
            let mut buffer = vec![0; usize::try_from(batch.len().bytes()).unwrap()];
            let pages = reader.read(&batch, &mut buffer, Misses::GiveUp).unwrap();
            let numbers = pages
                .read
                .runs()
                .iter()
                .flat_map(|run| run.start().0..run.end().0);
            for (page, bytes) in numbers.zip(buffer.chunks(PAGE_SIZE)) {
                self.0.insert(page, bytes.to_vec());
            }
            space.put_back(&pages.unread);
        }
    }

    fn round(&mut self, space: &mut Space) -> Scan {
        let scan = space.scan().unwrap();
        self.copy(space, &scan.dirty);
        scan
    }

    /// The last round, of the stopped process; then both sides must be equal.
    fn finish(&mut self, space: &mut Space) -> FinalScan {
        let _frozen = Frozen::new(space.pid());
        let last = space.final_scan().unwrap();
        self.copy(space, &last.dirty);
        self.0
            .retain(|page, _| last.live.contains(PageIndex(*page)));
        assert_eq!(
            self.0.len() as u64,
            last.live.len().0,
            "not all live pages are held"
        );
        let mut fresh = Self::default();
        fresh.copy(space, &last.live);
        for (page, bytes) in &fresh.0 {
            assert!(self.0.get(page) == Some(bytes), "page {page:#x} differs");
        }
        let hidden = |page: u64| {
            let address = page << 12;
            last.hidden
                .iter()
                .any(|(start, end)| (*start..*end).contains(&address))
        };
        assert!(
            self.0.keys().all(|page| hidden(*page)),
            "a live page is not hidden"
        );
        last
    }
}

/// A process that is stopped, until this is dropped.
struct Frozen(i32);

impl Frozen {
    fn new(pid: i32) -> Self {
        trial::signal(pid, libc::SIGSTOP);
        let stopped = |&tid: &i32| task::Status::read(tid).unwrap().state == b'T';
        eventually("the stop", || {
            task::threads(pid).unwrap().iter().all(stopped)
        });
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        trial::signal(self.0, libc::SIGCONT);
    }
}

/// Waits until `done`, which must happen soon.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}
