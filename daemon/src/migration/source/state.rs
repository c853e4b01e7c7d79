//! What of a site is kept in the journal.

use std::path::PathBuf;

use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::Failure;
use serde::{Deserialize, Serialize};

use crate::migration::text::internal;
use crate::runtime::shared::marker::Written;

/// What a restarted daemon needs to know of a workload: kept in the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SiteState {
    pub(super) root: i32,
    pub(super) freezer: PathBuf,
    /// The freezer cgroup the tree came from, if it was moved.
    pub(super) origin: Option<PathBuf>,
    /// Names of this node's link ends, with their bridges.
    pub(super) ports: Vec<(String, String)>,
    /// Files by which the target was to know shared storage.
    #[serde(default)]
    pub(super) markers: Vec<Written>,
}

/// As the journal keeps it.
pub(super) fn encode_state(state: &SiteState) -> Result<DriverState, Failure> {
    let bytes = serde_json::to_vec(state).map_err(|error| internal(&error))?;
    DriverState::new(bytes).map_err(|error| internal(&error))
}
