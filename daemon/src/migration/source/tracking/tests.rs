//! Tracking a real process in a freezer cgroup. All tests need root.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pageferry_cgroup::freezer::{Freezer, FreezerRoot, FreezerVersion};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_pages::read::Misses;
use pageferry_proto::id::{Generation, MemberIndex, MigrationId, Round, WorkloadName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::source::SourceEvent;
use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_trial::{self as trial, Trial};
use tokio::sync::watch;

use super::*;
use crate::migration::source::site::{Asked, Site, SourceNode};
use crate::migration::source::state::{SiteState, encode_state};
use crate::runtime::identity::{Anchor, Identity};
use crate::runtime::ipc::Ipc;
use crate::runtime::kind::Kind;
use crate::runtime::shared::tests::fuse::Fuse;

/// The other process of these tests.
#[test]
fn workload() {
    trial::obey();
}

/// Where it maps what it is told to.
const BASE: u64 = 0x2000_0000_0000;

/// A process in a freezer cgroup, which is thawed and removed on drop.
struct Tracked {
    trial: Option<Trial>,
    workload: Workload,
    tracking: Option<Tracking>,
    sockets: Sockets,
    waits: Waits,
    _cut: watch::Sender<bool>,
}

impl Tracked {
    /// One that is not tracked yet, in the freezer that this node prefers.
    fn start(name: &str) -> Self {
        let name = format!("test-{name}-{}", std::process::id());
        Self::start_in(FreezerRoot::detect().unwrap().plan(&name))
    }

    fn start_in(freezer: Freezer) -> Self {
        let trial = Trial::start("migration::source::tracking::tests::workload");
        freezer.make().unwrap();
        freezer.adopt(|| Ok(vec![trial.pid()])).unwrap();
        let support = Support::probe().unwrap();
        let (cut, cancelled) = watch::channel(false);
        Self {
            workload: Workload {
                member: MemberIndex::FIRST,
                kind: Kind::of(&WorkloadName::Process(trial.pid())).unwrap(),
                anchor: Some(Anchor::new(trial.pid()).unwrap()),
                own: Vec::new(),
                ipc: Ipc::default(),
                mounts: None,
                described_mounts: Vec::new(),
                freezer,
                outer: None,
                standing: Vec::new(),
                support: support.clone(),
            },
            tracking: Some(Tracking::new(support, false, Paused::default())),
            trial: Some(trial),
            sockets: Sockets::default(),
            waits: Waits::new(cancelled),
            _cut: cut,
        }
    }

    fn tracking(&mut self) -> &mut Tracking {
        self.tracking.as_mut().unwrap()
    }

    fn scan(&mut self) -> Result<bool, Failure> {
        let tracking = self.tracking.as_mut().unwrap();
        tracking.scan(&self.workload, &self.sockets, &self.waits)
    }

    fn look(&mut self) -> Option<String> {
        let tracking = self.tracking.as_mut().unwrap();
        let lookout = tracking.lookout(&self.workload, &self.sockets);
        tracking.begins_anew(lookout.look().unwrap())
    }

    /// How often it stood still, and for how long at most.
    fn paused(&self) -> (u32, Option<Duration>) {
        self.tracking.as_ref().unwrap().paused().told()
    }

    /// Which of the pages from [`BASE`] on are pending.
    fn pending(&mut self, pages: u64) -> Vec<u64> {
        let pending = &self.tracking().pending;
        let first = BASE / PAGE_SIZE as u64;
        let is_pending = |page: &u64| pending.values().any(|set| set.contains(PageIndex(*page)));
        let pages = (first..first + pages).filter(is_pending);
        pages.map(|page| page - first).collect()
    }

    /// What is in those pages now.
    fn read(&mut self, pages: u64) -> Vec<u8> {
        let (id, _) = self.tracking().spaces.iter().next().unwrap();
        let id = *id;
        let (_, reader) = self.tracking().reader(id).unwrap();
        let run = PageRun::new(PageIndex(BASE / PAGE_SIZE as u64), PageCount(pages));
        let mut bytes = vec![0; usize::try_from(pages).unwrap() * PAGE_SIZE];
        let read = reader.read(&PageSet::from(run.unwrap()), &mut bytes, Misses::GiveUp);
        assert!(read.unwrap().unread.is_empty());
        bytes
    }

    fn tell(&mut self, order: &str) -> String {
        self.trial.as_mut().unwrap().tell(order)
    }

    /// From now on it is a site's, as between two rounds.
    async fn into_site(mut self, cancelled: watch::Receiver<bool>) -> (Self, Site) {
        let root = self.workload.root();
        let identity = Identity::of(root).unwrap();
        let state = SiteState {
            kind: self.workload.kind.clone(),
            started: identity.started,
            boot: identity.boot,
            freezer: self.workload.freezer.path().to_owned(),
            freezer_id: None,
            ports: Vec::new(),
            markers: Vec::new(),
            asked: Asked::default(),
            members: Vec::new(),
            party: None,
        };
        let node = SourceNode {
            criu: PathBuf::new(),
            view_library: PathBuf::new(),
            stand_in: PathBuf::new(),
            tracer: true,
            criu_version: 0,
            migrations: PathBuf::new(),
            freezers: FreezerRoot::detect().unwrap(),
            hierarchies: Hierarchies::default(),
            support: self.workload.support.clone(),
            workers: 1,
            eager_memory_max: 0,
            keep: pageferry_files::Keep::new(PathBuf::new()),
            parking: crate::link::park::Means::Auto,
            postcopy: false,
        };
        let (id, state) = (MigrationId::new([1; 16]), encode_state(&state).unwrap());
        let site = Site::recover(node, id, Policy::DEFAULT, (&state, false), cancelled).await;
        let mut site = site.unwrap();
        site.members[0].tracking = self.tracking.take().unwrap();
        (self, site)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let _ = self.workload.freezer.thaw();
        drop((self.tracking.take(), self.trial.take()));
        let _ = self.workload.freezer.remove();
    }
}

fn open_direct() -> String {
    format!("open-direct {}", std::env::current_exe().unwrap().display())
}

/// Waits until `done`, which must happen soon.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_first_sight_of_direct_io_all_is_scanned_anew_and_at_a_standstill() {
    let mut tracked = Tracked::start("sight");
    tracked.tell(&format!("map {BASE:#x} 8 rw"));
    tracked.tell(&format!("fill {BASE:#x} 8 random"));
    assert!(!tracked.scan().unwrap());
    assert_eq!(tracked.pending(8), [0, 1, 2, 3, 4, 5, 6, 7]);
    tracked.tracking().take_pending();
    tracked.tell(&format!("fill {BASE:#x} 2 random"));
    assert!(!tracked.scan().unwrap());
    assert_eq!(tracked.pending(8), [0, 1]);
    assert_eq!(tracked.paused().0, 0);
    tracked.tell(&open_direct());
    assert!(tracked.scan().unwrap());
    assert_eq!(tracked.pending(8), [0, 1, 2, 3, 4, 5, 6, 7]);
    let (pauses, longest) = tracked.paused();
    assert!(0 < pauses && longest.is_some());
    // Once is enough, and it stays so.
    tracked.tracking().take_pending();
    tracked.tell(&format!("fill {BASE:#x} 1 random"));
    assert!(!tracked.scan().unwrap());
    assert_eq!(tracked.pending(8), [0]);
    assert!(pauses < tracked.paused().0);
    assert!(!tracked.workload.freezer.is_frozen().unwrap());
    assert_eq!(tracked.tell("signals"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_before_direct_io_was_seen_does_not_count() {
    let mut tracked = Tracked::start("void");
    tracked.tell(&format!("map {BASE:#x} 4 rw"));
    tracked.tell(&format!("fill {BASE:#x} 4 random"));
    tracked.scan().unwrap();
    let sent = tracked.tracking().take_pending();
    let (id, pages) = sent.into_iter().next().unwrap();
    tracked.tracking().sent(id, &pages, &PageSet::new());
    let run = PageRun::new(PageIndex(BASE / PAGE_SIZE as u64), PageCount(4));
    let live = PageSet::from(run.unwrap());
    tracked.tracking().delivered.check(id, &live).unwrap();
    // It came between the look before a scan and the one after it.
    tracked.tell(&open_direct());
    assert!(tracked.look().unwrap().contains("direct I/O"));
    assert!(tracked.tracking().delivered.check(id, &live).is_err());
    assert!(!tracked.tracking().is_pending());
    assert_eq!(tracked.look(), None);
    assert!(!tracked.scan().unwrap());
    assert_eq!(tracked.pending(4), [0, 1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_tree_is_looked_at_once_more() {
    let mut tracked = Tracked::start("look-frozen");
    tracked.scan().unwrap();
    tracked.tracking().take_pending();
    tracked.tell(&open_direct());
    tracked.workload.freezer.freeze().unwrap();
    let (_cut, cancelled) = watch::channel(false);
    let (mut tracked, mut site) = tracked.into_site(cancelled).await;
    let event = site
        .finish(Generation::FIRST, Round::FIRST, false)
        .await
        .unwrap();
    let SourceEvent::Retry(report) = event else {
        panic!("{event:?}");
    };
    assert_eq!(report.reason.code(), ErrorCode::RetryRound);
    assert!(
        report.reason.text().contains("direct I/O"),
        "{}",
        report.reason
    );
    tracked.workload.freezer.thaw().unwrap();
    tracked.tracking = site.members.pop().map(|member| member.tracking);
    tracked.scan().unwrap();
    assert!(0 < tracked.paused().0);
    assert_eq!(tracked.tell("signals"), "0");
}

/// As a thread that the freezer of version 1 has lost, or has frozen in the middle of a read.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_scan_that_is_not_at_rest_does_not_count() {
    let mut tracked = Tracked::start("lost");
    tracked.scan().unwrap();
    if tracked.workload.freezer.version() == FreezerVersion::V2 {
        eprintln!("that of version 2 loses none");
        return;
    }
    let (_cut, cancelled) = watch::channel(false);
    let (_tracked, mut site) = tracked.into_site(cancelled).await;
    let event = site
        .finish(Generation::FIRST, Round::FIRST, false)
        .await
        .unwrap();
    let SourceEvent::Retry(report) = event else {
        panic!("{event:?}");
    };
    assert_eq!(report.reason.code(), ErrorCode::PassingState);
}

/// A file whose reads are answered when the test says so.
struct Slow {
    fuse: Fuse,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

/// How many pages a read has.
const PAGES: u64 = 32;

impl Slow {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fuse = Fuse::mount(folder.path());
        let path = fuse.path.join("data");
        let bytes = usize::try_from(PAGES).unwrap() * PAGE_SIZE;
        let file = (7, vec![b'x'; bytes]);
        fuse.state().files.insert("data".to_owned(), file);
        fuse.state().slow = true;
        Self {
            fuse,
            path,
            _folder: folder,
        }
    }

    /// Has a thread read the file by direct I/O, and returns when the read is under way.
    fn begin(&self, tracked: &mut Tracked) {
        let bytes = PAGES * PAGE_SIZE as u64;
        tracked.tell(&format!(
            "read-direct {} {BASE:#x} {bytes}",
            self.path.display()
        ));
        eventually("the read", || 0 < self.fuse.reads_held());
    }
}

/// A process with memory of its own, all of it sent, and a direct read into that under way.
fn reading(name: &str, slow: &Slow) -> Tracked {
    let mut tracked = Tracked::start(name);
    tracked.tell(&format!("map {BASE:#x} {PAGES} rw"));
    tracked.tell(&format!("fill {BASE:#x} {PAGES} 1"));
    tracked.scan().unwrap();
    tracked.tracking().take_pending();
    slow.begin(&mut tracked);
    tracked
}

fn returned() -> String {
    format!("returned {} 0", PAGES * PAGE_SIZE as u64)
}

/// Why all this is needed: the kernel takes hold of the pages before the scan and fills them after
/// it, without another look at the page tables.
#[tokio::test(flavor = "multi_thread")]
async fn a_scan_in_the_middle_of_a_direct_read_loses_what_is_read_after_it() {
    let slow = Slow::new();
    let mut tracked = reading("hazard", &slow);
    let space = tracked.tracking().spaces.values_mut().next().unwrap();
    let run = PageRun::new(PageIndex(BASE / PAGE_SIZE as u64), PageCount(PAGES)).unwrap();
    let pages = PageSet::from(run);
    // The pages are taken hold of as for a write.
    assert_eq!(space.scan().unwrap().dirty.intersection(&pages), pages);
    assert_eq!(tracked.read(PAGES)[0], 1);
    slow.fuse.answer_reads();
    assert_eq!(tracked.trial.as_mut().unwrap().answer(), returned());
    assert!(tracked.read(PAGES).iter().all(|byte| *byte == b'x'));
    let space = tracked.tracking().spaces.values_mut().next().unwrap();
    assert!(space.scan().unwrap().dirty.intersection(&pages).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_waits_until_a_direct_read_has_ended() {
    let slow = Slow::new();
    let mut tracked = reading("waits", &slow);
    let (scanned, done) = mpsc::channel();
    std::thread::scope(|scope| {
        let tracked = &mut tracked;
        let paused = tracked.tracking().paused();
        scope.spawn(move || scanned.send(tracked.scan()).unwrap());
        // It has tried, and has given the workload back in between.
        eventually("a pause", || 1 < paused.told().0);
        assert!(done.try_recv().is_err());
        slow.fuse.answer_reads();
        assert!(done.recv().unwrap().unwrap());
    });
    assert_eq!(tracked.trial.as_mut().unwrap().answer(), returned());
    assert_eq!(tracked.pending(PAGES), Vec::from_iter(0..PAGES));
    assert!(tracked.read(PAGES).iter().all(|byte| *byte == b'x'));
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_too_slow_refuses_the_move_and_the_workload_runs_on() {
    let slow = Slow::new();
    let mut tracked = reading("too-slow", &slow);
    let refused = tracked.scan().unwrap_err();
    assert_eq!(refused.code(), ErrorCode::DirectIo);
    let (_, longest) = tracked.paused();
    assert!(pauses::PATIENCE_MAX <= longest.unwrap());
    assert!(!tracked.workload.freezer.is_frozen().unwrap());
    slow.fuse.answer_reads();
    assert_eq!(tracked.trial.as_mut().unwrap().answer(), returned());
    assert_eq!(tracked.tell("signals"), "0");
}

/// Freezers of both kinds, as far as this machine has them.
fn freezers(name: &str) -> Vec<Freezer> {
    let name = format!("test-{name}-{}", std::process::id());
    let mut freezers = vec![FreezerRoot::detect().unwrap().plan(&name)];
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let unified = mounts.lines().find(|line| line.contains(" cgroup2 "));
    if let Some(mount) = unified.and_then(|line| line.split(' ').nth(1)) {
        let path = Path::new(mount).join(&name);
        fs::create_dir_all(&path).unwrap();
        freezers.push(Freezer::at(path));
    } else {
        eprintln!("cgroup v2 is not mounted");
    }
    freezers
}

/// Calls that a freeze interrupts, how they are called by number, and what they return in the end.
fn calls() -> [(&'static str, i64, String); 8] {
    let timed_out = |errno| format!("returned -1 {errno}");
    let poked = || "returned 1 0".to_owned();
    [
        ("epoll", libc::SYS_epoll_wait, poked()),
        // As the C library makes it.
        ("semop", libc::SYS_semtimedop, "returned 0 0".to_owned()),
        ("recv", libc::SYS_recvfrom, poked()),
        ("poll", libc::SYS_poll, poked()),
        ("read", libc::SYS_read, poked()),
        (
            "nanosleep",
            libc::SYS_clock_nanosleep,
            "returned 0 0".to_owned(),
        ),
        ("futex", libc::SYS_futex, timed_out(libc::ETIMEDOUT)),
        (
            "sigtimedwait",
            libc::SYS_rt_sigtimedwait,
            timed_out(libc::EAGAIN),
        ),
    ]
}

/// Has a thread wait in a call, lets something happen, ends the call, and returns what it returned.
fn across(tracked: &mut Tracked, call: (&str, i64), happens: impl Fn(&mut Tracked)) -> String {
    let blocked = tracked.tell(&format!("block {}", call.0));
    let words: Vec<&str> = blocked.split(' ').collect();
    let inside = || {
        let text = fs::read_to_string(format!("/proc/{}/syscall", words[1])).unwrap();
        text.split(' ').next() == Some(call.1.to_string().as_str())
    };
    eventually("the call", inside);
    happens(tracked);
    let trial = tracked.trial.as_mut().unwrap();
    trial.tell_silently(&format!("poke {}", words[2]));
    trial.answer()
}

/// How often a call is made that fails: `EINTR` is legal, and beside three busy loops on two
/// processors one call in a thousand still ends with it. Those that nobody mends all do.
const TRIES: usize = 2;

/// Calls that fail whenever something happens to those who wait in them.
fn calls_that_fail(
    name: &str,
    happens: impl Fn(&mut Tracked),
) -> Vec<(&'static str, FreezerVersion, String)> {
    let mut failed = Vec::new();
    for freezer in freezers(name) {
        for (name, number, expected) in calls() {
            let mut answers = (0..TRIES).map(|_| {
                let mut tracked = Tracked::start_in(freezer.clone());
                across(&mut tracked, (name, number), &happens)
            });
            let first = answers.next().unwrap();
            if first != expected && answers.all(|answer| answer != expected) {
                failed.push((name, freezer.version(), first));
            }
        }
    }
    failed
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_fails_because_of_a_pause() {
    let failed = calls_that_fail("calls", |tracked| {
        tracked.tell(&open_direct());
        for _ in 0..3 {
            tracked.scan().unwrap();
        }
        assert!(2 < tracked.paused().0);
    });
    assert_eq!(failed, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_fails_because_of_a_freeze_that_is_given_up() {
    let failed = calls_that_fail("given-up", |tracked| {
        for _ in 0..3 {
            tracked.workload.freezer.freeze().unwrap();
            tracked.workload.thaw().unwrap();
            // Before it is complete.
            tracked.workload.freezer.begin_freeze().unwrap();
            tracked.workload.thaw().unwrap();
        }
    });
    assert_eq!(failed, []);
}
