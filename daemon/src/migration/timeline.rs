//! What took how long in a migration, as this node has measured it and as the other one has told.
//!
//! Spans are made by guards where the work is done, and have the names of `proto`'s dictionary.
//! What is seldom is kept always; what may come once for each space, in a freeze alone, and what
//! follows closely on its like is one span. Nothing is decided by any of it.
//!
//! Bounded: the newest spans of each node are kept, and the newest exchanges. They are lost with
//! the daemon.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry_proto::migration::timeline::{
    Asked, EXCHANGES_MAX, Exchange, FREEZE, JOURNAL, Log, Offset, PARTS, Span, Spans, is_known,
};
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use pageferry_sys::clock::since_boot;

/// Closer than this, what has one name is one span, in nanoseconds.
const GAP: u64 = 500_000; // 0.5 ms

/// The timeline of one migration at this node. Clones are of the same.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    log: Log,
    /// The part of the downtime that goes on, and since when.
    part: Option<(usize, u64)>,
    /// Records that are being written.
    records: VecDeque<(&'static str, u64)>,
    said: VecDeque<(Asked, u64)>,
    heard: VecDeque<(Asked, u64)>,
    other: Option<Spans>,
}

/// A span, until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Open {
    timeline: Timeline,
    name: &'static str,
    detail: String,
    begin: u64,
    /// It may go on in another of its name.
    extends: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        let span = Span {
            name: self.name.to_owned(),
            detail: std::mem::take(&mut self.detail),
            begin: self.begin,
            end: since_boot(),
        };
        let mut kept = self.timeline.lock();
        match self.extends {
            true => kept.log.extend(span, GAP),
            false => kept.log.push(span),
        }
    }
}

/// Both nodes' spans by this node's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// When the last freeze was asked for, or else the first span began: times are shown from here.
    pub zero: u64,
    /// Of this node.
    pub own: Vec<Span>,
    /// Of the other node, if it has told any and its clock is known.
    pub others: Vec<Span>,
    /// How far its clock is ahead of this one's, if that is known.
    pub offset: Option<Offset>,
    /// Both nodes have one clock.
    pub is_one_clock: bool,
    /// Spans that were not kept.
    pub dropped: u64,
    /// The other node has told all.
    pub is_whole: bool,
}

impl Timeline {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a span.
    pub fn begin(&self, name: &'static str) -> Open {
        self.begin_of(name, String::new())
    }

    /// Begins the span of one of several.
    pub fn begin_of(&self, name: &'static str, detail: String) -> Open {
        debug_assert!(is_known(name), "{name} is not in the dictionary");
        Open {
            timeline: self.clone(),
            name,
            detail,
            begin: since_boot(),
            extends: false,
        }
    }

    /// Begins a span of the freeze; nothing while there is none.
    pub fn begin_in_freeze(&self, name: &'static str) -> Option<Open> {
        self.lock().part?;
        let mut open = self.begin(name);
        open.extends = true;
        Some(open)
    }

    /// Keeps a span that was measured elsewhere; nothing if a time is missing.
    pub fn keep(&self, name: &'static str, detail: String, (begin, end): (u64, u64)) {
        if begin == 0 || end < begin {
            return;
        }
        let name = name.to_owned();
        self.lock().log.push(Span {
            name,
            detail,
            begin,
            end,
        });
    }

    /// Keeps a span that ends now.
    pub fn ended(&self, name: &'static str, detail: String, took: Duration) {
        let end = since_boot();
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.keep(name, detail, (end.saturating_sub(took).max(1), end));
    }

    /// A part of the downtime begins now, and ends the one before; parts that were passed over have
    /// none. What comes out of order changes nothing.
    pub fn part(&self, name: &'static str) {
        let Some(next) = PARTS.iter().position(|part| *part == name) else {
            return;
        };
        let mut kept = self.lock();
        // A freeze that was given up is followed by another one.
        let follows = match kept.part {
            None => next == 0,
            Some((now, _)) => now < next,
        };
        if follows {
            let now = since_boot();
            kept.end_part(now);
            kept.part = Some((next, now));
        }
    }

    /// The workload runs, here or there.
    pub fn end_part(&self) {
        self.lock().end_part(since_boot());
    }

    /// A record is being written.
    pub fn writes(&self, record: &'static str) {
        self.lock().records.push_back((record, since_boot()));
    }

    /// The oldest record that was being written is durable, or will not be.
    pub fn written(&self) {
        let mut kept = self.lock();
        if let Some((record, begin)) = kept.records.pop_front() {
            let end = since_boot();
            kept.log.push(Span {
                name: JOURNAL.to_owned(),
                detail: record.to_owned(),
                begin,
                end,
            });
        }
    }

    /// This node has said something that is asked, or answers. The first time counts: whoever heard
    /// it may have heard that one.
    pub fn said(&self, asked: Option<Asked>) {
        let Some(asked) = asked else { return };
        let said = &mut self.lock().said;
        if !said.iter().any(|(one, _)| *one == asked) {
            note(said, asked);
        }
    }

    /// This node has heard something that is asked, or answers: the last time counts. From when to
    /// when it was waited for, if this is the answer.
    pub fn heard(&self, asked: Option<Asked>) -> Option<(u64, u64)> {
        let asked = asked?;
        let mut kept = self.lock();
        note(&mut kept.heard, asked);
        let heard = kept.heard.back().map(|(_, heard)| *heard)?;
        let mut said = kept.said.iter().rev();
        let (_, said) = said.find(|(one, _)| *one == asked)?;
        Some((*said, heard))
    }

    /// What this node tells the other one.
    pub fn told(&self, boot: String, last: bool) -> Spans {
        let kept = self.lock();
        Spans {
            boot,
            spans: kept.log.spans(),
            exchanges: kept.exchanges(),
            dropped: kept.log.dropped(),
            last,
        }
    }

    /// What the other node tells. Whether that is all.
    pub fn hear(&self, spans: Spans) -> bool {
        let last = spans.last;
        self.lock().other = Some(spans);
        last
    }

    /// Both, by the clock of this node, whose boot has this name.
    pub fn view(&self, boot: &str) -> View {
        let kept = self.lock();
        let own = kept.log.spans();
        let frozen = own.iter().rev().find(|span| span.name == FREEZE);
        let first = own.iter().min_by_key(|span| span.begin);
        let zero = frozen.or(first).map_or(0, |span| span.begin);
        let mut view = View {
            zero,
            dropped: kept.log.dropped(),
            own,
            ..View::default()
        };
        if let Some(other) = &kept.other {
            view.is_one_clock = other.boot == boot;
            view.offset = match view.is_one_clock {
                true => Some(Offset::NONE),
                false => Offset::between(&kept.exchanges(), &other.exchanges),
            };
            if let Some(offset) = view.offset {
                let shifted = other.spans.iter().map(|span| Span {
                    begin: offset.here(span.begin),
                    end: offset.here(span.end),
                    ..span.clone()
                });
                view.others = shifted.collect();
            }
            view.dropped += other.dropped;
            view.is_whole = other.last;
        }
        view
    }
}

impl Kept {
    fn end_part(&mut self, now: u64) {
        if let Some((part, begin)) = self.part.take() {
            self.log.push(Span {
                name: PARTS[part].to_owned(),
                detail: String::new(),
                begin,
                end: now,
            });
        }
    }

    fn exchanges(&self) -> Vec<Exchange> {
        let both = self.heard.iter().filter_map(|(asked, heard)| {
            let mut said = self.said.iter().rev();
            let (_, said) = said.find(|(one, _)| one == asked)?;
            Some(Exchange {
                asked: *asked,
                heard: *heard,
                said: *said,
            })
        });
        both.collect()
    }
}

/// The newest are kept.
fn note(notes: &mut VecDeque<(Asked, u64)>, asked: Asked) {
    notes.retain(|(one, _)| *one != asked);
    if notes.len() == EXCHANGES_MAX {
        notes.pop_front();
    }
    notes.push_back((asked, since_boot()));
}

/// What is asked by a message of a source.
pub fn asked(message: &SourceMessage) -> Option<Asked> {
    match message {
        SourceMessage::Offer(_) => Some(Asked::Offer),
        SourceMessage::RoundEnd(end) => Some(Asked::Round(end.round.number())),
        SourceMessage::Final(end) => Some(Asked::Final(end.generation.number())),
        SourceMessage::Go { generation } => Some(Asked::Go(generation.number())),
        _ => None,
    }
}

/// What is answered by a message of a target.
pub fn answered(message: &TargetMessage) -> Option<Asked> {
    match message {
        TargetMessage::Accepted { .. } => Some(Asked::Offer),
        TargetMessage::RoundHeld { round } => Some(Asked::Round(round.number())),
        TargetMessage::FinalHeld { generation } => Some(Asked::Final(generation.number())),
        TargetMessage::Started { generation, .. } => Some(Asked::Go(generation.number())),
        _ => None,
    }
}

#[cfg(test)]
#[path = "timeline_tests.rs"]
mod tests;
