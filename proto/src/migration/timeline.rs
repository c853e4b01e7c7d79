//! The spans of a migration: what took how long at which node, and how the clocks of two nodes are
//! put on one.
//!
//! A span has a name of [`NAMES`], the dictionary of all there are, and times of its node's clock,
//! in nanoseconds since its boot. Two nodes of one boot have one clock. Else what is known of the
//! difference comes from messages: none is heard before it is said.
//!
//! ```text
//! source  said ─────────────────────────── heard      what the target's clock is ahead lies
//!             ╲                           ╱           between  said' − heard  and  heard' − said:
//! target       heard' ────────────── said'            half of that range is the uncertainty
//! ```
//!
//! Absent: clocks, and whoever measures.

use std::collections::VecDeque;

/// Most spans that one node keeps of a migration: older ones make room for newer ones.
pub const SPANS_MAX: usize = 384;

/// Most exchanges that a node keeps. Clocks drift apart by some microseconds a second, so that old
/// ones say less and less.
pub const EXCHANGES_MAX: usize = 8;

/// Longest name and longest detail of a span, in bytes.
pub const TEXT_BYTES_MAX: usize = 32;

/// Longest name of a boot, in bytes: a UUID.
pub const BOOT_BYTES_MAX: usize = 36;

macro_rules! names {
    ($($constant:ident = $name:literal, $at:literal, $what:literal;)+) => {
        $(#[doc = $what] pub const $constant: &str = $name;)+

        /// Each name, at which node it is measured, and what it means.
        pub const NAMES: &[(&str, &str, &str)] = &[$(($name, $at, $what),)+];
    };
}

names! {
    SURVEY = "survey", "source", "the tree is described";
    OFFER = "offer", "source", "from the offer to its acceptance";
    TRACK = "track", "source", "tracking begins, with the first scan";
    ROUND = "round", "source", "pages of a round are sent, and what became dirty is looked for";
    ROUND_HELD = "round_held", "source", "from the end of a round to the word that it is held";
    FREEZE = "freeze", "source", "part of the downtime: until all tasks are frozen";
    FINAL_ROUND = "final_round", "source", "part of the downtime: until the target has all of it";
    RESTORE = "restore", "both",
        "part of the downtime: until the target is ready; at the target: until the tree is held";
    COMMIT = "commit", "source", "part of the downtime: until the commit is durable";
    HANDOFF = "handoff", "source", "part of the downtime: until the workload runs";
    PREPARED = "prepared", "source", "CRIU gets ready";
    PORTS = "ports", "source", "the ports of its network are closed";
    LOOK = "look", "source", "it is looked for states that pass";
    CGROUP = "cgroup", "source", "the cgroup is frozen";
    SCAN = "scan", "source", "what is dirty is looked for";
    DUMP = "dump", "source", "CRIU dumps the frozen tree";
    PAGES = "pages", "source", "the last pages are read, and taken by the target";
    LIVE_SETS = "live_sets", "source", "the target takes what is alive";
    DIGESTS = "digests", "source", "digests of all pages are made, and taken";
    IMAGES = "images", "source", "the target takes CRIU's images";
    FILES = "files", "source", "the target takes what has changed in folders";
    STORAGE = "storage", "source", "shared storage is synced, or asked";
    FINAL_HELD = "final_held", "source", "from the final round to the word that it is held";
    COMPARE = "compare", "source", "what CRIU was shown is compared with the truth";
    SMAPS = "smaps", "source", "of that, the wait for the mappings";
    JOURNAL = "journal", "both", "a record becomes durable";
    UNLOCK = "unlock", "source", "file locks are let go of";
    RELEASE = "release", "source", "the frozen copy is ended";
    THAW = "thaw", "source", "the tree is thawed";
    PREPARE = "prepare", "target", "the place is made: namespaces, network, cgroups, pager";
    CHECK = "check", "target", "the final round arrives, and is checked";
    PLAN = "plan", "target", "images are made lazy, and spaces and pages told to the pager";
    PUT = "put", "target", "folders are put where they belong";
    CRIU_BEGIN = "criu_begin", "target", "from the request until CRIU, or its runtime, begins";
    CRIU_TREE = "criu_tree", "target", "namespaces, processes, files and sockets, up to memory";
    CRIU_MEMORY = "criu_memory", "target", "from the first userfaultfd to the last";
    CRIU_REST = "criu_rest", "target", "from there until CRIU holds the whole tree";
    PROBE = "probe", "target", "it is looked whether all that is missing can be filled";
    SETTLE = "settle", "target", "limits and names of what is restored are set";
    LOCK = "lock", "target", "file locks are taken";
    LET_GO = "let_go", "target", "the held tree is let go";
    STANDING = "standing", "target", "each pager says how its tree stands";
    NETWORK = "network", "target", "links join the bridge and are announced";
    GO = "go", "target", "the pager lets CRIU, or its runtime, go on";
    PARKING = "parking", "target", "what came for the frozen workload is given to it";
    FILL = "fill", "target", "the rest of the memory is filled";
}

/// The parts of the downtime, in their order.
pub const PARTS: [&str; 5] = [FREEZE, FINAL_ROUND, RESTORE, COMMIT, HANDOFF];

/// What took from when to when, by one clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// One of [`NAMES`], or that of a newer peer: at most [`TEXT_BYTES_MAX`] of `a-z0-9_`.
    pub name: String,
    /// Which one, where there are several: printable, at most [`TEXT_BYTES_MAX`].
    pub detail: String,
    /// In nanoseconds since the boot.
    pub begin: u64,
    /// The same. Never before `begin`.
    pub end: u64,
}

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// An offer.
    Offer,
    /// The end of a round.
    Round(u32),
    /// The final round of a generation.
    Final(u32),
    /// To run a generation.
    Go(u32),
}

/// When a node has said a message, and heard its answer; at the other node the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Which.
    pub asked: Asked,
    /// When this node heard.
    pub heard: u64,
    /// When this node said.
    pub said: u64,
}

/// What a target tells of its spans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// Names the boot whose clock it is.
    pub boot: String,
    /// At most [`SPANS_MAX`].
    pub spans: Vec<Span>,
    /// At most [`EXCHANGES_MAX`].
    pub exchanges: Vec<Exchange>,
    /// Older spans that were not kept.
    pub dropped: u64,
    /// No more will come.
    pub last: bool,
}

/// How far the other node's clock is ahead of this one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// In nanoseconds.
    pub ahead: i64,
    /// The truth is at most so far from that, in nanoseconds.
    pub uncertainty: u64,
}

impl Offset {
    /// Of two clocks that are one.
    pub const NONE: Self = Self {
        ahead: 0,
        uncertainty: 0,
    };

    /// What exchanges tell that both nodes have noted: that of the shortest round trip counts.
    /// Nothing, if there is none, or what they noted cannot be.
    pub fn between(source: &[Exchange], target: &[Exchange]) -> Option<Self> {
        let of = |ours: &Exchange| {
            let theirs = target.iter().find(|theirs| theirs.asked == ours.asked)?;
            let difference = |a: u64, b: u64| i128::from(a) - i128::from(b);
            let least = difference(theirs.said, ours.heard);
            let most = difference(theirs.heard, ours.said);
            let range = u64::try_from(most - least).ok()?;
            Some(Self {
                ahead: i64::try_from(i128::midpoint(least, most)).ok()?,
                uncertainty: range.div_ceil(2),
            })
        };
        let all = source.iter().filter_map(of);
        all.min_by_key(|offset| offset.uncertainty)
    }

    /// A time of the other node's clock, by this one's.
    pub fn here(self, there: u64) -> u64 {
        there.saturating_add_signed(self.ahead.saturating_neg())
    }
}

/// The spans that a node keeps: the newest [`SPANS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    spans: VecDeque<Span>,
    dropped: u64,
}

impl Log {
    /// Keeps one.
    pub fn push(&mut self, span: Span) {
        if self.spans.len() == SPANS_MAX {
            self.spans.pop_front();
            self.dropped += 1;
        }
        self.spans.push_back(span);
    }

    /// Makes the last one longer if it is of this name and detail, and ended less than `gap`
    /// before this one begins; else keeps it as another.
    pub fn extend(&mut self, span: Span, gap: u64) {
        let same = |last: &&mut Span| last.name == span.name && last.detail == span.detail;
        // Others may have ended in between.
        let last = self.spans.iter_mut().rev().find(same);
        match last {
            Some(last) if span.begin <= last.end.saturating_add(gap) => {
                last.begin = last.begin.min(span.begin);
                last.end = last.end.max(span.end);
            }
            Some(_) | None => self.push(span),
        }
    }

    /// All that are kept, in the order in which they ended.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.iter().cloned().collect()
    }

    /// How many were not.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// Which text stands for a known name.
pub fn is_known(name: &str) -> bool {
    NAMES.iter().any(|(known, ..)| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(number: u32, heard: u64, said: u64) -> Exchange {
        let asked = Asked::Round(number);
        Exchange { asked, heard, said }
    }

    /// `ARCHITECTURE.md` has them in a table, in this order.
    #[test]
    fn the_dictionary_is_written_down() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md");
        let document = std::fs::read_to_string(path).unwrap();
        let (_, section) = document.split_once("### Spans").unwrap();
        let rows = section.lines().skip_while(|line| !line.starts_with("| `"));
        let rows: Vec<&str> = rows.take_while(|line| line.starts_with("| `")).collect();
        let row = |(name, at, what): &(&str, &str, &str)| format!("| `{name}` | {at} | {what} |");
        let names: Vec<String> = NAMES.iter().map(row).collect();
        assert_eq!(rows, names);
    }

    fn span(name: &str, begin: u64, end: u64) -> Span {
        Span {
            name: name.to_owned(),
            detail: String::new(),
            begin,
            end,
        }
    }

    #[test]
    fn names_are_short_and_no_two_are_the_same() {
        for (index, (name, at, what)) in NAMES.iter().enumerate() {
            let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
            assert!(name.bytes().all(is_plain) && name.len() <= TEXT_BYTES_MAX);
            assert!(["source", "target", "both"].contains(at), "{at}");
            assert!(!what.is_empty());
            assert!(NAMES[..index].iter().all(|(other, ..)| other != name));
        }
        assert!(is_known(FILL) && !is_known("fil"));
        assert!(PARTS.iter().all(|part| is_known(part)));
    }

    /// The target's clock is a second ahead; each way takes as long as is said.
    fn both(there: u64, back: u64) -> (Exchange, Exchange) {
        const AHEAD: u64 = 1_000_000_000;
        let heard = 100 + there + AHEAD;
        let said = heard + 50;
        let number = u32::try_from(there).unwrap();
        (
            exchange(number, said - AHEAD + back, 100),
            exchange(number, heard, said),
        )
    }

    #[test]
    fn the_shortest_round_trip_says_most_and_the_truth_is_within() {
        for (there, back) in [(10, 10), (0, 400), (400, 3), (7, 8)] {
            let (near, far) = both(there, back);
            let offset = Offset::between(&[near], &[far]).unwrap();
            let wrong = offset.ahead.abs_diff(1_000_000_000);
            assert!(wrong <= offset.uncertainty, "{offset:?}");
            assert_eq!(offset.uncertainty, (there + back).div_ceil(2));
        }
        let (slow, fast) = (both(400, 300), both(3, 2));
        let offset = Offset::between(&[slow.0, fast.0], &[fast.1, slow.1]).unwrap();
        assert_eq!(offset.uncertainty, 3);
        assert!(offset.here(1_000_000_500).abs_diff(500) <= 3);
    }

    #[test]
    fn what_cannot_be_says_nothing() {
        assert_eq!(Offset::between(&[], &[]), None);
        let (near, _) = both(1, 1);
        assert_eq!(Offset::between(&[near], &[exchange(9, 1, 2)]), None);
        // Answered for longer than it was waited for.
        let impossible = exchange(1, 0, u64::MAX);
        assert_eq!(Offset::between(&[near], &[impossible]), None);
        assert_eq!(Offset::NONE.here(7), 7);
    }

    #[test]
    fn the_oldest_spans_make_room_and_what_goes_on_is_one() {
        let mut log = Log::default();
        for begin in 0..SPANS_MAX as u64 + 2 {
            log.push(span(ROUND, begin, begin + 1));
        }
        assert_eq!((log.spans().len(), log.dropped()), (SPANS_MAX, 2));
        assert_eq!(log.spans()[0].begin, 2);
        let mut log = Log::default();
        log.extend(span(PAGES, 0, 10), 5);
        log.extend(span(SCAN, 11, 12), 5);
        log.extend(span(PAGES, 13, 20), 5);
        log.extend(span(PAGES, 40, 41), 5);
        let ends: Vec<u64> = log.spans().iter().map(|span| span.end).collect();
        assert_eq!(ends, [20, 12, 41]);
    }
}
