//! What of a site is kept in the journal.

use std::path::PathBuf;

use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::Failure;
use serde::{Deserialize, Serialize};

use crate::link::port::Port;
use crate::migration::text::internal;
use crate::runtime::shared::marker::Written;

/// What a restarted daemon needs to know of a workload: kept in the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SiteState {
    /// The pid of the root.
    pub(super) root: i32,
    /// When the root started, in clock ticks since the boot.
    pub(super) started: u64,
    /// Which boot that was.
    pub(super) boot: String,
    pub(super) freezer: PathBuf,
    /// The freezer cgroup the tree came from, if it was moved.
    pub(super) origin: Option<PathBuf>,
    pub(super) ports: Vec<PortState>,
    /// Files by which the target was to know shared storage.
    #[serde(default)]
    pub(super) markers: Vec<Written>,
}

/// This node's end of a link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PortState {
    /// Its index, and that of the workload's end.
    pub(super) ends: (u32, u32),
    /// For whoever reads the journal.
    pub(super) name: String,
    pub(super) bridge: String,
}

impl PortState {
    pub(super) fn of(port: &Port) -> Self {
        Self {
            ends: port.ends(),
            name: port.name().to_owned(),
            bridge: port.bridge().to_owned(),
        }
    }
}

/// As the journal keeps it.
pub(super) fn encode_state(state: &SiteState) -> Result<DriverState, Failure> {
    let bytes = serde_json::to_vec(state).map_err(|error| internal(&error))?;
    DriverState::new(bytes).map_err(|error| internal(&error))
}
