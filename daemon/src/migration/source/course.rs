//! Where the driver's events and actions meet the timeline: the parts of the downtime begin and end
//! by them, each operation is a span, and so is each answer that is waited for.
//!
//! What the target has measured it tells when the workload runs, and when its memory is complete.
//! For that the connection is kept a little longer, when all else is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::{SourceAction, SourceEvent};
use pageferry_proto::migration::timeline::{self as names, Asked, Spans};
use pageferry_proto::wire::control::TargetMessage;

use super::{Incoming, SourceDriver};
use crate::migration::timeline::{Open, Timeline, answered, asked};

/// How long the target may take to fill the workload's memory, and to tell.
const TELL_MAX: Duration = Duration::from_secs(60);

/// Notes what takes how long. Clones note the same.
#[derive(Clone, Debug)]
pub(super) struct Course {
    timeline: Timeline,
    /// The target tells of its spans, and has not told the last.
    tells: Arc<AtomicBool>,
}

impl Course {
    pub(super) fn new(timeline: &Timeline) -> Self {
        Self {
            timeline: timeline.clone(),
            tells: Arc::default(),
        }
    }

    /// This is about to be done.
    pub(super) fn performs(&self, action: &SourceAction) {
        match action {
            SourceAction::Freeze { .. } => self.timeline.part(names::FREEZE),
            SourceAction::Journal(record) => self.timeline.writes(record.entry.name()),
            SourceAction::Send(message) => self.timeline.said(asked(message)),
            SourceAction::Thaw { .. } => self.timeline.end_part(),
            _ => {}
        }
    }

    /// The span of an operation that begins. Those of the freeze are parts of the downtime.
    pub(super) fn begins(&self, action: &SourceAction) -> Option<Open> {
        let name = match action {
            SourceAction::CompareSmaps => names::COMPARE,
            SourceAction::Release => names::RELEASE,
            SourceAction::SendRound { round, .. } => {
                return Some(self.timeline.begin_of(names::ROUND, round.to_string()));
            }
            SourceAction::Thaw { .. } => names::THAW,
            SourceAction::Track => names::TRACK,
            SourceAction::Unlock => names::UNLOCK,
            _ => return None,
        };
        Some(self.timeline.begin(name))
    }

    /// The machine is about to hear of this.
    pub(super) fn takes(&self, event: &SourceEvent) {
        match event {
            SourceEvent::Frozen => self.timeline.part(names::FINAL_ROUND),
            SourceEvent::Message(TargetMessage::FinalHeld { .. }) => {
                self.timeline.part(names::RESTORE);
            }
            SourceEvent::Message(TargetMessage::Ready { .. }) => self.timeline.part(names::COMMIT),
            SourceEvent::Message(TargetMessage::Started { .. }) => self.timeline.end_part(),
            SourceEvent::Journalled(record) => {
                self.timeline.written();
                if matches!(record.entry, Entry::Commit { .. }) {
                    self.timeline.part(names::HANDOFF);
                }
            }
            SourceEvent::JournalFailed(_) => self.timeline.written(),
            _ => {}
        }
    }

    /// A message has come at this moment.
    pub(super) fn hears(&self, message: &TargetMessage) {
        let asked = answered(message);
        let waited = self.timeline.heard(asked);
        let (Some(asked), Some(waited)) = (asked, waited) else {
            return;
        };
        let (name, detail) = match asked {
            Asked::Offer => (names::OFFER, String::new()),
            Asked::Round(round) => (names::ROUND_HELD, round.to_string()),
            Asked::Final(_) => (names::FINAL_HELD, String::new()),
            // A part of the downtime.
            Asked::Go(_) => return,
        };
        self.timeline.keep(name, detail, waited);
    }

    /// The target has told of its spans, on the present connection or an older one.
    pub(super) fn hear(&self, is_present: bool, told: Spans) {
        if is_present {
            let is_last = self.timeline.hear(told);
            self.tells.store(!is_last, Ordering::Relaxed);
        }
    }

    fn is_told_more(&self) -> bool {
        self.tells.load(Ordering::Relaxed)
    }
}

impl SourceDriver {
    /// Everything else is over: hears what the target has yet to tell of its spans, for a while.
    pub(super) async fn hear_the_rest(&mut self) {
        if self.connection.is_none() || !self.course.is_told_more() {
            return;
        }
        // Nobody need wait for this.
        self.requests.close();
        let told = async {
            while self.connection.is_some() && self.course.is_told_more() {
                let ours = self.connections;
                match self.incoming.recv().await {
                    Some(Incoming::Of(
                        number,
                        SourceEvent::Message(TargetMessage::Spans(told)),
                    )) => {
                        self.course.hear(number == ours, *told);
                    }
                    Some(
                        Incoming::Of(number, SourceEvent::PeerLost) | Incoming::Lost(number, _),
                    ) if number == ours => {
                        return;
                    }
                    Some(_) => {}
                    None => return,
                }
            }
        };
        if tokio::time::timeout(TELL_MAX, told).await.is_err() {
            tracing::debug!("the target did not tell of its fill within {TELL_MAX:?}");
        }
    }
}
