//! `MigrationPolicy`: what holds for the moves of the pods that it selects.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which pods, and within which limits they move.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "pageferry.dev",
    version = "v1alpha1",
    kind = "MigrationPolicy",
    plural = "migrationpolicies",
    doc = "Limits of the live migrations of the pods that it selects.",
    shortname = "migp",
    category = "pageferry",
    derive = "PartialEq",
    printcolumn(
        name = "Downtime ms",
        type_ = "integer",
        json_path = ".spec.downtimeBudgetMs",
        description = "How long a pod may stand still."
    ),
    printcolumn(
        name = "Timeout s",
        type_ = "integer",
        json_path = ".spec.timeouts.moveSeconds"
    ),
    printcolumn(
        name = "Per node",
        type_ = "integer",
        json_path = ".spec.atOnce.perNode"
    ),
    printcolumn(
        name = "Per cluster",
        type_ = "integer",
        json_path = ".spec.atOnce.perCluster"
    ),
    printcolumn(name = "On eviction", type_ = "string", json_path = ".spec.onEviction"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.downtimeBudgetMs <= self.timeouts.frozenMs")
        .message("the downtime budget must not be above timeouts.frozenMs")
)]
pub struct MigrationPolicySpec {
    /// Pods by their labels; an empty one selects all.
    #[serde(default)]
    pub pod_selector: LabelSelector,
    /// Their namespaces; an empty one selects all.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// What a move aims at: copying goes on until it is predicted to take no longer.
    #[serde(default = "defaults::downtime_budget_ms")]
    #[schemars(range(min = 1, max = 60_000))]
    pub downtime_budget_ms: i32,
    #[serde(default)]
    pub timeouts: Timeouts,
    #[serde(default)]
    pub at_once: AtOnce,
    /// What becomes of a pod that is evicted, by a drain or a descheduler. The pod's own annotation
    /// pageferry.dev/on-eviction counts more.
    #[serde(default)]
    pub on_eviction: OnEviction,
}

/// What becomes of a pod that is evicted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum OnEviction {
    /// It ends.
    #[default]
    Evict,
    /// It moves to another node, and is evicted if it cannot.
    Migrate,
}

/// After what time a move is given up.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Timeouts {
    /// All of it, up to the commit.
    #[serde(default = "defaults::move_seconds")]
    #[schemars(range(min = 1, max = 86_400))]
    pub move_seconds: i32,
    /// The time for which the pod stands still before the commit.
    #[serde(default = "defaults::frozen_ms")]
    #[schemars(range(min = 1, max = 60_000))]
    pub frozen_ms: i32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            move_seconds: defaults::move_seconds(),
            frozen_ms: defaults::frozen_ms(),
        }
    }
}

/// How many moves there are at the same time.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.perNode <= self.perCluster")
        .message("perNode must not be above perCluster")
)]
pub struct AtOnce {
    /// From a node or to it.
    #[serde(default = "defaults::per_node")]
    #[schemars(range(min = 1, max = 64))]
    pub per_node: i32,
    #[serde(default = "defaults::per_cluster")]
    #[schemars(range(min = 1, max = 4096))]
    pub per_cluster: i32,
}

impl Default for AtOnce {
    fn default() -> Self {
        Self {
            per_node: defaults::per_node(),
            per_cluster: defaults::per_cluster(),
        }
    }
}

/// What is not said.
mod defaults {
    pub fn downtime_budget_ms() -> i32 {
        300
    }

    pub fn move_seconds() -> i32 {
        600
    }

    pub fn frozen_ms() -> i32 {
        5_000
    }

    pub fn per_node() -> i32 {
        2
    }

    pub fn per_cluster() -> i32 {
        8
    }
}
