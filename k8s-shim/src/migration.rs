//! `Migration`: one move of one pod.
//!
//! Rules that the API server checks are on the types, so that no controller ever sees a Migration
//! that breaks one. What may change after it was made is `cancel` alone; how it ended never does.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::plan::{Record, Report};

/// What is to be moved, and where to.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "pageferry.dev",
    version = "v1alpha1",
    kind = "Migration",
    doc = "One live migration of one pod to another node.",
    namespaced,
    status = "MigrationStatus",
    shortname = "mig",
    category = "pageferry",
    derive = "PartialEq",
    selectable = ".spec.pod.name",
    selectable = ".status.source",
    selectable = ".status.target",
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.pod.name"),
    printcolumn(name = "From", type_ = "string", json_path = ".status.source"),
    printcolumn(name = "To", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Result", type_ = "string", json_path = ".status.result"),
    printcolumn(
        name = "Downtime ms",
        type_ = "integer",
        json_path = ".status.downtimeMs",
        description = "How long the pod stood still."
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    ),
    printcolumn(
        name = "Round",
        type_ = "integer",
        json_path = ".status.round",
        priority = "1"
    ),
    printcolumn(
        name = "Left s",
        type_ = "integer",
        json_path = ".status.etaSeconds",
        priority = "1",
        description = "How long the move will still take."
    ),
    printcolumn(
        name = "New pod",
        type_ = "string",
        json_path = ".status.newPod.name",
        priority = "1"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.reason",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "self.pod == oldSelf.pod && self.target == oldSelf.target && self.mode == oldSelf.mode \
         && has(self.policy) == has(oldSelf.policy) \
         && (!has(self.policy) || self.policy == oldSelf.policy)"
    )
    .message("only cancel may change: make another Migration"),
    validation = Rule::new("self.cancel || !oldSelf.cancel")
        .message("a cancelled Migration stays so: make another one")
)]
pub struct MigrationSpec {
    /// The pod, which must be the very one.
    pub pod: PodReference,
    /// Where it is to go. Absent: to any node that takes it.
    #[serde(default)]
    pub target: Target,
    /// How its memory is moved.
    #[serde(default)]
    pub mode: Mode,
    /// The MigrationPolicy that holds. Absent: the one that selects the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub policy: Option<String>,
    /// Gives the move up, as long as the new pod has not been given the word to go on.
    #[serde(default)]
    pub cancel: bool,
}

/// A pod: its name may be another one's later, its UID never is.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReference {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    #[schemars(length(min = 36, max = 36))]
    pub uid: String,
}

/// A node by its name, or any that has these labels, or any.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.node) || !has(self.nodeSelector)")
        .message("a target is either a node or a nodeSelector")
)]
pub struct Target {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16), schema_with = "labels")]
    pub node_selector: Option<BTreeMap<String, String>>,
}

/// Values as long as those of labels may be: what has no end is too dear to be compared.
fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "nullable": true,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}

/// When memory is copied.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Mode {
    /// While the pod runs, and again what it wrote meanwhile.
    #[default]
    PreCopy,
    /// While it stands still.
    StopAndCopy,
}

/// How far the move is.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(oldSelf.result) || (has(self.result) && self.result == oldSelf.result)"
    )
    .message("how a Migration ended does not change")
)]
pub struct MigrationStatus {
    /// The earliest of all containers' phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// How it ended; absent as long as it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Outcome>,
    /// Why it is as it is, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// The node that the pod was at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The node that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The pod there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_pod: Option<PodReference>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 64))]
    pub containers: Vec<ContainerStatus>,
    /// Rounds of copying begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub round: Option<i32>,
    /// Bytes on the wire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// How long it will still take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub eta_seconds: Option<i32>,
    /// How long the pod is going to stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub predicted_downtime_ms: Option<i32>,
    /// How long it stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub downtime_ms: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Time>,
    /// The generation of the spec that this was said of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
    /// Within what time the daemons are to do it: the policy's, when it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// What the controller goes by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub course: Option<Record>,
    /// What the source's agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_report: Option<Report>,
    /// What the target's agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_report: Option<Report>,
}

/// What the daemons have for a move. In milliseconds.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// How long the pod is to stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<i64>,
    /// How long it may stand still before the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<i64>,
    /// How long all of it may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub move_ms: Option<i64>,
}

/// How far one container is.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    pub phase: Phase,
    /// Bytes on the wire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
}

/// What is being done, in this order.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize,
)]
pub enum Phase {
    /// It is looked whether it can move, and room is made.
    Processing,
    /// What it consists of is read and sent, round by round, while it runs.
    Checkpointing,
    /// It stands still, and the last of it is on its way.
    Transferring,
    /// It is put together at the target.
    Restoring,
    /// It runs there, and what is left at the source is removed.
    Cleaning,
    /// Nothing is left to do.
    Done,
}

impl Phase {
    /// That of a whole, from those of its parts.
    pub fn earliest(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        parts.into_iter().min()
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Outcome {
    /// The pod goes on at the target, as it was.
    Succeeded,
    /// The new pod came up cold: what was in memory is lost.
    SucceededWithoutRestore,
    /// The pod goes on where it was.
    Failed,
    /// The pod goes on where it was, as it was asked for.
    Cancelled,
}

impl Outcome {
    /// As the API has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "Succeeded",
            Self::SucceededWithoutRestore => "SucceededWithoutRestore",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_is_as_far_as_its_last_part() {
        let parts = [Phase::Restoring, Phase::Transferring, Phase::Done];
        assert_eq!(Phase::earliest(parts), Some(Phase::Transferring));
        assert_eq!(Phase::earliest([]), None);
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let text = r#"{"pod": {"name": "web", "uid": "u"}, "target": {"node": "node-b"}}"#;
        let spec: MigrationSpec = serde_json::from_str(text).expect("a spec");
        assert_eq!(
            (spec.mode, spec.cancel, spec.policy),
            (Mode::PreCopy, false, None)
        );
    }
}
