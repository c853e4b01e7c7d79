//! What becomes of each migration, counted; and how things stand, for whoever looks at the metrics.

use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::status::{Phase, Status};
use pageferry_proto::migration::timeline::{GO, PARKING, PORTS};
use pageferry_proto::wire::code::ErrorCode;

use super::{Entry, Registry};
use crate::metrics::{Metrics, Standing};
use crate::migration::progress::Progress;
use crate::migration::timeline::{Timeline, View};
use crate::runtime::identity;

/// What has been counted of a migration.
#[derive(Debug, Default)]
struct Counted {
    raw_bytes: u64,
    wire_bytes: u64,
    rounds: u64,
    retries: u64,
}

impl Counted {
    /// Counts what is new. Sums may shrink for a moment, when those of whole rounds take the place
    /// of what was seen of them.
    fn count(&mut self, status: &Status, metrics: &Metrics) {
        if status.role == Side::Target {
            return;
        }
        let rounds = status.round.map_or(0, |round| round.number().into());
        let raw = grown(&mut self.raw_bytes, status.sent_bytes);
        let wire = grown(&mut self.wire_bytes, status.wire_bytes);
        metrics.sent(raw, wire);
        let rounds = grown(&mut self.rounds, rounds);
        metrics.rounds(rounds, grown(&mut self.retries, status.retries.into()));
    }
}

/// By how much a number is more than it was.
fn grown(known: &mut u64, now: u64) -> u64 {
    let more = now.saturating_sub(*known);
    *known += more;
    more
}

impl Registry {
    /// Counts what becomes of a migration, until its end. One that had ended before is not counted
    /// again.
    pub(super) fn count(&self, entry: &Entry) {
        let metrics = self.inner.parts.metrics.clone();
        let (mut status, timeline) = (entry.status.clone(), entry.timeline.clone());
        tokio::spawn(async move {
            let mut counted = Counted::default();
            loop {
                let progress = Arc::clone(&status.borrow_and_update());
                if progress.recovered && progress.status.phase.is_final() {
                    return;
                }
                counted.count(&progress.status, &metrics);
                if progress.status.phase.is_final() {
                    return end(&progress, &timeline, &metrics);
                }
                if status.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// How things stand. Reads the folder of the journals.
    pub async fn standing(&self) -> Standing {
        let mut standing = Standing {
            answers: self.answers().len() as u64,
            outcomes: self.outcomes().len() as u64,
            ..Standing::default()
        };
        for progress in self.list() {
            standing.journals += 1;
            let status = &progress.status;
            if !status.phase.is_final() {
                standing.migrations.push((status.role, status.phase));
            }
        }
        let memory = &self.inner.parts.target.memory;
        (standing.promised_bytes, standing.stored_bytes) = memory.totals();
        let registry = self.clone();
        let read = tokio::task::spawn_blocking(move || registry.inner.parts.journals.bytes());
        standing.journal_bytes = read.await.unwrap_or_default();
        standing
    }
}

fn end(progress: &Progress, timeline: &Timeline, metrics: &Metrics) {
    let status = &progress.status;
    let failure = (status.phase != Phase::Done).then(|| {
        let code = status.failure.as_ref().map(|failure| failure.code());
        code.unwrap_or(ErrorCode::Unknown)
    });
    metrics.ended(status.role, failure);
    if status.role == Side::Source && status.phase == Phase::Done && !progress.recovered {
        metrics.left(&status.parts, status.elapsed);
        let view = identity::boot().map(|boot| timeline.view(&boot));
        if let Some(took) = view.ok().as_ref().and_then(blackout) {
            metrics.blackout(took);
        }
    }
}

/// From the ports being closed at the source to the last span of the hand-over at the target, if
/// both are known on one clock.
fn blackout(view: &View) -> Option<Duration> {
    let closings = view
        .own
        .iter()
        .filter(|span| span.name == PORTS && view.zero <= span.begin);
    let closed = closings.map(|span| span.begin).min()?;
    let last = view
        .others
        .iter()
        .filter(|span| span.name == PARKING || span.name == GO);
    let last = last.map(|span| span.end).max()?;
    Some(Duration::from_nanos(last.checked_sub(closed)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_proto::migration::timeline::Span;

    #[test]
    fn sums_that_shrink_for_a_moment_are_not_counted_twice() {
        let mut known = 0;
        let grown: Vec<u64> = [5, 9, 7, 9, 12].map(|now| grown(&mut known, now)).into();
        assert_eq!(grown, [5, 4, 0, 0, 3]);
    }

    #[test]
    fn nobody_is_answered_from_the_last_closing_of_the_ports_to_the_last_word_of_the_target() {
        let span = |name: &str, begin, end| Span {
            name: name.to_owned(),
            detail: String::new(),
            begin,
            end,
        };
        let view = View {
            zero: 100,
            // Those of a freeze that was given up do not count.
            own: vec![span(PORTS, 10, 20), span(PORTS, 120, 130)],
            others: vec![span(GO, 170, 190), span(PARKING, 190, 200)],
            ..View::default()
        };
        assert_eq!(blackout(&view), Some(Duration::from_nanos(80)));
        let unknown = View {
            others: Vec::new(),
            ..view
        };
        assert_eq!(blackout(&unknown), None);
    }
}
