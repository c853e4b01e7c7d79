//! What a daemon counts, for Prometheus: the OpenMetrics text format, over plain HTTP.
//!
//! Invariants: every series there can be is there from the start, at 0, so that the first of
//! anything is seen as a change; labels have a fixed set of values (phases, codes, parts), never a
//! name of a workload or a node; what is counted is counted for a parcel, a round, a fill or a
//! move, never for a page. Numbers are of this process: they begin anew with it, as counters may.
//! What stands somewhere (migrations under way, memory, journals) is asked when somebody looks.
//!
//! The catalogue is in `deploy/README.md`, and a test holds both to each other.

mod buckets;
mod names;
mod serve;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::status::{Parts, Phase};
use pageferry_proto::wire::code::ErrorCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use buckets::Buckets;
pub use serve::{ServeError, serve};

/// A number that stands somewhere.
type Level = Gauge<u64, AtomicU64>;

/// All numbers of a daemon. Cheap to clone; clones are of the same.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    counted: Counted,
}

/// How a migration ended here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    role: &'static str,
    result: &'static str,
}

/// Where one stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stands {
    role: &'static str,
    phase: &'static str,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    code: &'static str,
}

/// Which of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

/// By which way a page came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Fate {
    fate: &'static str,
}

/// What is kept of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// What this build is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: String,
    profile: String,
    compiler: String,
}

#[derive(Debug)]
struct Counted {
    ended: Family<Ended, Counter>,
    failures: Family<Why, Counter>,
    refusals: Family<Why, Counter>,
    downtime: Histogram,
    parts: Family<Part, Histogram>,
    blackout: Histogram,
    elapsed: Histogram,
    rounds: Counter,
    retries: Counter,
    sent_raw: Counter,
    sent_wire: Counter,
    received_wire: Counter,
    sent_pages: Family<Path, Counter>,
    received_pages: Family<Path, Counter>,
    filled_pages: Family<Path, Counter>,
    fill: Histogram,
    faults: Buckets,
    frames: Family<Fate, Counter>,
    send_queue: Level,
    receiving: Level,
    migrations: Family<Stands, Level>,
    promised: Level,
    stored: Level,
    journals: Family<Kind, Level>,
    journal_bytes: Level,
}

/// Pages by the path that they travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// All zero: no bytes travel.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// Compressed.
    pub lz4: u64,
}

/// How a workload's memory was filled, by its pager.
#[derive(Clone, Copy, Debug)]
pub struct Filled<'a> {
    /// From when it was let go.
    pub took: Duration,
    /// Pages that were missing.
    pub pages: u64,
    /// Those of them that a thread waited for.
    pub faults: u64,
    /// By how long that took, as [`Metrics::new`] was told the edges.
    pub faults_by_time: &'a [u64],
    /// The sum of that.
    pub fault_time: Duration,
}

/// What stands somewhere, at the moment.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// Where each migration stands that is not over.
    pub migrations: Vec<(Side, Phase)>,
    /// Memory that incoming workloads have been promised.
    pub promised_bytes: u64,
    /// What of it their stores hold.
    pub stored_bytes: u64,
    /// Migrations that are kept whole.
    pub journals: u64,
    /// Old ones of which only the answer is kept.
    pub answers: u64,
    /// Old ones of which only the outcome is kept.
    pub outcomes: u64,
    /// What all of these take on disk.
    pub journal_bytes: u64,
}

/// Counts what waits to be sent, until this is dropped.
#[derive(Debug)]
pub struct Queued {
    level: Level,
    count: u64,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.level.dec_by(self.count);
    }
}

const SENT: [&str; 3] = ["zero", "raw", "lz4"];
const PARTS: [&str; 5] = ["freeze", "final_round", "restore", "commit", "handoff"];
const FATES: [&str; 3] = ["kept", "lost", "given"];
const KINDS: [&str; 3] = ["journal", "answer", "outcome"];

const SOURCE_PHASES: [Phase; 8] = [
    Phase::Offered,
    Phase::Copying,
    Phase::Freezing,
    Phase::Finishing,
    Phase::Prepared,
    Phase::Committed,
    Phase::Reclaiming,
    Phase::Aborting,
];
const TARGET_PHASES: [Phase; 7] = [
    Phase::Accepted,
    Phase::Receiving,
    Phase::Restoring,
    Phase::Ready,
    Phase::Running,
    Phase::Refusing,
    Phase::Aborting,
];

/// Edges of what takes milliseconds, in seconds: 1 ms to 8 s, and one where a limit of ours is.
const SHORT: [f64; 14] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.13, 0.3, 0.5, 1.0, 2.0, 5.0,
];

/// Edges of what takes seconds.
const LONG: [f64; 12] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
];

fn short() -> Histogram {
    Histogram::new(SHORT)
}

fn long() -> Histogram {
    Histogram::new(LONG)
}

const fn role(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Target => "target",
    }
}

impl Counted {
    fn new(fault_edges_us: &[u64]) -> Self {
        Self {
            ended: Family::default(),
            failures: Family::default(),
            refusals: Family::default(),
            downtime: short(),
            parts: Family::new_with_constructor(short as fn() -> Histogram),
            blackout: short(),
            elapsed: long(),
            rounds: Counter::default(),
            retries: Counter::default(),
            sent_raw: Counter::default(),
            sent_wire: Counter::default(),
            received_wire: Counter::default(),
            sent_pages: Family::default(),
            received_pages: Family::default(),
            filled_pages: Family::default(),
            fill: long(),
            faults: Buckets::new(fault_edges_us),
            frames: Family::default(),
            send_queue: Level::default(),
            receiving: Level::default(),
            migrations: Family::default(),
            promised: Level::default(),
            stored: Level::default(),
            journals: Family::default(),
            journal_bytes: Level::default(),
        }
    }

    /// Makes every series there can be.
    fn begin_all(&self) {
        for role in ["source", "target"] {
            for result in ["moved", "failed"] {
                drop(self.ended.get_or_create(&Ended { role, result }));
            }
        }
        for code in ErrorCode::ALL.iter().map(|code| code.name()) {
            drop(self.failures.get_or_create(&Why { code }));
            drop(self.refusals.get_or_create(&Why { code }));
        }
        for part in PARTS {
            drop(self.parts.get_or_create(&Part { part }));
        }
        for path in SENT {
            drop(self.sent_pages.get_or_create(&Path { path }));
            drop(self.received_pages.get_or_create(&Path { path }));
        }
        for path in ["fault", "fill"] {
            drop(self.filled_pages.get_or_create(&Path { path }));
        }
        for fate in FATES {
            drop(self.frames.get_or_create(&Fate { fate }));
        }
        for kind in KINDS {
            drop(self.journals.get_or_create(&Kind { kind }));
        }
        self.stand(&[]);
    }

    fn stand(&self, all: &[(Side, Phase)]) {
        let phases = |side| match side {
            Side::Source => &SOURCE_PHASES[..],
            Side::Target => &TARGET_PHASES[..],
        };
        for side in [Side::Source, Side::Target] {
            for phase in phases(side) {
                let those = all.iter().filter(|one| **one == (side, *phase));
                let stands = Stands {
                    role: role(side),
                    phase: phase.name(),
                };
                let count = u64::try_from(those.count()).unwrap_or(u64::MAX);
                self.migrations.get_or_create(&stands).set(count);
            }
        }
    }
}

impl Metrics {
    /// All of them, at 0. `fault_edges_us` are the edges by which a pager counts faults.
    pub fn new(fault_edges_us: &[u64]) -> Self {
        let counted = Counted::new(fault_edges_us);
        counted.begin_all();
        let mut registry = Registry::with_prefix("pageferryd");
        let build = Build {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            profile: env!("PAGEFERRY_PROFILE").to_owned(),
            compiler: env!("PAGEFERRY_RUSTC").to_owned(),
        };
        registry.register("build", "What this daemon is", Info::new(build));
        counted.register(&mut registry);
        Self(Arc::new(Inner { registry, counted }))
    }

    /// A migration has ended here.
    pub fn ended(&self, side: Side, failure: Option<ErrorCode>) {
        let counted = &self.0.counted;
        let role = role(side);
        let result = if failure.is_none() { "moved" } else { "failed" };
        counted.ended.get_or_create(&Ended { role, result }).inc();
        if let Some(code) = failure.map(ErrorCode::name) {
            counted.failures.get_or_create(&Why { code }).inc();
        }
    }

    /// A workload has left: so long it stood still, and so long all of it took.
    pub fn left(&self, parts: &Parts, elapsed: Duration) {
        let counted = &self.0.counted;
        let times = [
            parts.freeze,
            parts.final_round,
            parts.restore,
            parts.commit,
            parts.handoff,
        ];
        for (part, took) in PARTS.into_iter().zip(times) {
            if let Some(took) = took {
                let histogram = counted.parts.get_or_create(&Part { part });
                histogram.observe(took.as_secs_f64());
            }
        }
        if let Some(downtime) = parts.downtime() {
            counted.downtime.observe(downtime.as_secs_f64());
        }
        counted.elapsed.observe(elapsed.as_secs_f64());
    }

    /// Nobody was answered for so long.
    pub fn blackout(&self, took: Duration) {
        self.0.counted.blackout.observe(took.as_secs_f64());
    }

    /// A move was refused before it began.
    pub fn refused(&self, code: ErrorCode) {
        let code = code.name();
        self.0.counted.refusals.get_or_create(&Why { code }).inc();
    }

    /// So many bytes more were sent: before they were encoded, and on the wire.
    pub fn sent(&self, raw_bytes: u64, wire_bytes: u64) {
        self.0.counted.sent_raw.inc_by(raw_bytes);
        self.0.counted.sent_wire.inc_by(wire_bytes);
    }

    /// So many rounds more were begun, and freezes given up.
    pub fn rounds(&self, rounds: u64, retries: u64) {
        self.0.counted.rounds.inc_by(rounds);
        self.0.counted.retries.inc_by(retries);
    }

    /// The pages of a parcel were sent.
    pub fn pages_sent(&self, paths: Paths) {
        count(&self.0.counted.sent_pages, paths);
    }

    /// The pages of a parcel have come.
    pub fn pages_received(&self, paths: Paths) {
        count(&self.0.counted.received_pages, paths);
    }

    /// A stream of so many bytes has come.
    pub fn received(&self, wire_bytes: u64) {
        self.0.counted.received_wire.inc_by(wire_bytes);
    }

    /// A workload has all its memory.
    pub fn filled(&self, filled: &Filled<'_>) {
        let counted = &self.0.counted;
        let add = |path, pages| {
            counted
                .filled_pages
                .get_or_create(&Path { path })
                .inc_by(pages);
        };
        add("fault", filled.faults);
        add("fill", filled.pages.saturating_sub(filled.faults));
        counted.fill.observe(filled.took.as_secs_f64());
        counted.faults.add(filled.faults_by_time, filled.fault_time);
    }

    /// So many frames were kept for a frozen workload, and for so many there was no room.
    pub fn frames_kept(&self, kept: u64, lost: u64) {
        self.frames("kept", kept);
        self.frames("lost", lost);
    }

    /// A workload was given so many frames that its source had kept.
    pub fn frames_given(&self, given: u64) {
        self.frames("given", given);
    }

    fn frames(&self, fate: &'static str, count: u64) {
        self.0
            .counted
            .frames
            .get_or_create(&Fate { fate })
            .inc_by(count);
    }

    /// So many bytes wait to be sent, until what is returned is dropped.
    #[must_use]
    pub fn queued(&self, bytes: u64) -> Queued {
        queued(&self.0.counted.send_queue, bytes)
    }

    /// A stream is being taken in, until what is returned is dropped.
    #[must_use]
    pub fn receiving(&self) -> Queued {
        queued(&self.0.counted.receiving, 1)
    }

    /// All of it in the OpenMetrics text format, with what stands somewhere as it is now.
    pub fn text(&self, standing: &Standing) -> String {
        let Inner { registry, counted } = &*self.0;
        counted.stand(&standing.migrations);
        counted.promised.set(standing.promised_bytes);
        counted.stored.set(standing.stored_bytes);
        counted.journal_bytes.set(standing.journal_bytes);
        let kept = [standing.journals, standing.answers, standing.outcomes];
        for (kind, count) in KINDS.into_iter().zip(kept) {
            counted.journals.get_or_create(&Kind { kind }).set(count);
        }
        let mut text = String::new();
        text::encode(&mut text, registry).expect("a string takes everything");
        text
    }
}

impl Default for Metrics {
    /// For those that nobody asks for.
    fn default() -> Self {
        Self::new(&[])
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn count(family: &Family<Path, Counter>, paths: Paths) {
    for (path, pages) in SENT.into_iter().zip([paths.zero, paths.raw, paths.lz4]) {
        family.get_or_create(&Path { path }).inc_by(pages);
    }
}

fn queued(level: &Level, count: u64) -> Queued {
    level.inc_by(count);
    Queued {
        level: level.clone(),
        count,
    }
}

#[cfg(test)]
mod tests;
