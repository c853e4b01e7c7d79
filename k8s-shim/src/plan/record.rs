//! What is written down of a move.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::migration::{Outcome, PodReference};

/// Where a move stands, as the controller has it.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize,
)]
pub enum Step {
    /// Nothing is begun.
    #[default]
    Waiting,
    /// The source's daemon copies, and holds when another round would not help.
    Copying,
    /// The new pod is made, and gets to where it waits.
    Placing,
    /// The daemons hand over.
    Moving,
    /// The new pod takes the place of the old one in the cluster.
    Switching,
    /// The daemons remove what is left.
    Cleaning,
    /// It is given up, if the daemons still can.
    Aborting,
    /// Nothing changes any more.
    Ended,
}

/// One of the two nodes.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize,
)]
pub enum Side {
    Source,
    Target,
}

/// Why something is as it is.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Why {
    /// In one word, for programs.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// For people.
    #[schemars(length(max = 4096))]
    pub message: String,
}

impl Why {
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if MESSAGE_MAX < message.len() {
            let mut end = MESSAGE_MAX;
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
        }
        Self {
            reason: reason.to_owned(),
            message,
        }
    }
}

/// What the controller has written down of a Migration. It alone writes it.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Record {
    pub step: Step,
    /// Since when, in seconds of Unix time.
    pub since: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<i64>,
    /// The nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The name of the new pod, before it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_name: Option<String>,
    /// The new pod, once it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_uid: Option<String>,
    /// What the pod is to keep, if its network lets it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The word to the source's daemon to freeze. It is never taken back.
    pub proceed: bool,
    /// The side that is dead and stays so: somebody has made sure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fenced: Option<Side>,
    /// Why it is given up, or why it ended as it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Why>,
    /// It is given up because it was asked for.
    pub cancelled: bool,
    /// What it waits for that will not come by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked: Option<Why>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Outcome>,
}

impl Record {
    /// The same at another step.
    pub(super) fn at(&self, step: Step, now: i64) -> Self {
        Self {
            step,
            since: now,
            blocked: None,
            ..self.clone()
        }
    }

    /// The new pod, if it is known to be there.
    pub fn new_pod(&self) -> Option<PodReference> {
        Some(PodReference {
            name: self.new_name.clone()?,
            uid: self.new_uid.clone()?,
        })
    }
}

const MESSAGE_MAX: usize = 1000;
