//! Where the driver's events and actions meet the timeline, and what the source is told of it: once
//! when the workload runs, and once when all of its memory is in place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pageferry_proto::migration::target::{TargetAction, TargetEvent};
use pageferry_proto::migration::timeline::{self as names, Spans};
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};

use super::TargetDriver;
use crate::migration::timeline::{Open, Timeline, answered, asked};
use crate::runtime::identity;

/// Notes what takes how long. Clones note the same.
#[derive(Clone, Debug)]
pub(super) struct Course {
    timeline: Timeline,
    /// The source takes what is told.
    is_wanted: Arc<AtomicBool>,
}

/// The span of an operation, if it has one of its own.
pub(super) fn span_of(action: &TargetAction) -> Option<&'static str> {
    Some(match action {
        TargetAction::LetGo { .. } => names::LET_GO,
        TargetAction::Lock => names::LOCK,
        TargetAction::Prepare(_) => names::PREPARE,
        TargetAction::Restore { .. } => names::RESTORE,
        _ => return None,
    })
}

impl Course {
    pub(super) fn new(timeline: &Timeline) -> Self {
        Self {
            timeline: timeline.clone(),
            is_wanted: Arc::default(),
        }
    }

    /// This is about to be done.
    pub(super) fn performs(&self, action: &TargetAction) {
        match action {
            TargetAction::Journal(record) => self.timeline.writes(record.entry.name()),
            TargetAction::Prepare(offer) => self.is_wanted.store(offer.spans, Ordering::Relaxed),
            TargetAction::Send(message) => self.timeline.said(answered(message)),
            _ => {}
        }
    }

    /// The machine is about to hear of this. Whether nothing comes after it.
    pub(super) fn takes(&self, event: &TargetEvent) -> bool {
        if let TargetEvent::Journalled(_) | TargetEvent::JournalFailed(_) = event {
            self.timeline.written();
        }
        matches!(event, TargetEvent::Filled)
    }

    /// A message has come at this moment.
    pub(super) fn hears(&self, message: &SourceMessage) {
        self.timeline.heard(asked(message));
    }

    /// The final round is waited for, and checked.
    pub(super) fn begins_check(&self) -> Open {
        self.timeline.begin(names::CHECK)
    }

    /// What the source is told, if it takes it.
    pub(super) fn told(&self, last: bool) -> Option<Spans> {
        if !self.is_wanted.load(Ordering::Relaxed) {
            return None;
        }
        let boot = identity::boot().ok()?;
        Some(self.timeline.told(boot, last))
    }
}

impl TargetDriver {
    /// Says something to the source, and what there is to tell when the workload runs. Without a
    /// session the source asks again when it is back.
    pub(super) fn say(&mut self, message: TargetMessage) {
        let is_started = matches!(message, TargetMessage::Started { .. });
        if let Some(session) = &self.session
            && !session.say(message)
        {
            self.lost();
        }
        if is_started {
            self.tell(false);
        }
    }

    /// Tells the source of the spans of this node, if it takes them.
    pub(super) fn tell(&mut self, last: bool) {
        if let Some(told) = self.course.told(last) {
            self.say(TargetMessage::Spans(Box::new(told)));
        }
    }
}
