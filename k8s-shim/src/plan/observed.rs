//! What is known of the world, as far as one move goes. All of it but the record may be old.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::record::{Record, Side, Why};

/// The world around one Migration.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Seconds of Unix time.
    pub now: i64,
    /// When the Migration was made.
    pub created: i64,
    /// Somebody asks to give it up, or has deleted it.
    pub cancel: bool,
    /// It is held by our finalizer.
    pub held: bool,
    /// It is deleted, and stays for our finalizer alone.
    pub deleting: bool,
    /// Somebody says that this side is dead and stays so.
    pub resolve: Option<Side>,
    pub record: Record,
    /// Why the pod cannot move at all.
    pub refusal: Option<Why>,
    /// Where it would go now.
    pub target: Target,
    /// The source pod, if it is there still.
    pub source: Option<SourcePod>,
    /// The name that the new pod would get.
    pub new_name: String,
    /// The pod of the recorded or that name.
    pub new: Option<NewPod>,
    pub source_report: Option<Report>,
    pub target_report: Option<Report>,
    /// Nodes of which somebody has made sure that they are down.
    pub down: Vec<Side>,
    /// Nodes that the cluster does not know any more. Whether they run is not known.
    pub absent: Vec<Side>,
    /// Other moves that go on, or wait and came before this one.
    pub others: Vec<Other>,
    /// Disruption budgets that count the pod.
    pub budgets: Vec<Disruption>,
    pub limits: Limits,
    pub timeouts: Timeouts,
    /// How long the pod may stand still, and for which probe of its own, where that is little.
    pub eager: Option<String>,
}

/// Where a pod would go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Node(String),
    /// None will do, and why.
    None(Why),
}

impl Default for Target {
    fn default() -> Self {
        Self::None(Why::new("NoTarget", "no node was looked at"))
    }
}

/// The pod that moves.
#[derive(Clone, Debug, Default)]
pub struct SourcePod {
    pub node: String,
    pub address: Option<String>,
    /// Somebody has deleted it.
    pub deleting: bool,
    /// It is as ready as a pod can be.
    pub ready: bool,
    /// It has the lowest cost of deletion.
    pub marked: bool,
    /// It has an owner that counts its pods, and would replace it.
    pub owned: bool,
    /// Its owner wants other pods by now, and why that is known.
    pub outdated: Option<String>,
    /// It says of itself that this move is its eviction.
    pub evicting: bool,
}

/// The pod that comes.
#[derive(Clone, Debug, Default)]
pub struct NewPod {
    pub uid: String,
    /// It was made for this Migration, and not by somebody else under the same name.
    pub ours: bool,
    pub node: Option<String>,
    /// Seconds of Unix time.
    pub created: i64,
    pub deleting: bool,
    /// The scheduler has no place for it, and why.
    pub unschedulable: Option<String>,
    /// Its container will not come up, and why.
    pub stuck: Option<Why>,
    pub running: bool,
    pub ready: bool,
    /// It was said that it is what it was.
    pub restored: bool,
    /// It goes with the Migration, should that be gone: who makes it by old news leaves nothing.
    pub bound: bool,
    /// A container of it has run and ended: what runs now began anew.
    pub restarted: bool,
    pub adoption: Adoption,
}

/// How a pod that comes is to its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adoption {
    /// It will have none.
    #[default]
    Nobody,
    /// Not yet its.
    Pending,
    /// The owner of old is gone or goes, or the source has another one by now.
    Moot,
    Done,
}

/// What a node's agent says that its daemon says.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Report {
    /// When it was said, in seconds of Unix time.
    pub at: i64,
    /// The daemon's name of the phase; `unknown` where it has no such migration.
    pub phase: String,
    pub is_final: bool,
    pub moved: bool,
    pub holding: bool,
    pub waiting: bool,
    /// The name of the new pod, for which there is an address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepared: Option<String>,
    /// The new pod that the daemon was told of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    pub fence_wanted: bool,
    /// Why it failed, or was refused before it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Why>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round: Option<i32>,
    /// Bytes on the wire.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_ms: Option<i32>,
    /// How long the pod stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<i32>,
}

impl Report {
    /// The new pod is the workload: its daemon has it on disk.
    pub fn has_taken(&self, side: Side) -> bool {
        match side {
            Side::Source => self.moved,
            Side::Target => self.moved || self.phase == "running",
        }
    }
}

/// Another move.
#[derive(Clone, Debug, Default)]
pub struct Other {
    pub nodes: Vec<String>,
    /// Not both of its nodes are known yet: it may be of any.
    pub anywhere: bool,
}

/// What a disruption budget says of the pods that it counts.
#[derive(Clone, Debug, Default)]
pub struct Disruption {
    pub name: String,
    /// How many of them are as ready as pods can be; copies that come do not count twice.
    pub healthy: usize,
    /// How many of them must be.
    pub wanted: usize,
    /// How many of them move, or come first.
    pub moving: usize,
}

/// How many moves there are at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub per_node: usize,
    pub per_cluster: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_node: 2,
            per_cluster: 8,
        }
    }
}

/// After what time something is given up, or said; in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Up to the word that the source may freeze.
    pub copy: i64,
    /// For the new pod to get to where it waits.
    pub place: i64,
    /// For an agent to say something.
    pub silent: i64,
    /// For the daemons to bring the last of the memory, and to remove what is left.
    pub clean: i64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            copy: 600,
            place: 90,
            silent: 30,
            clean: 900,
        }
    }
}
