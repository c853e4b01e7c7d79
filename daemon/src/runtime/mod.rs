//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); its freezer cgroup is [`cgroup`],
//! the files it stands on are [`files`]. Nothing here knows the network or the pages.

pub mod build_id;
pub mod cgroup;
pub mod files;
pub mod process;

use pageferry_proto::wire::code::ErrorCode;
use thiserror::Error;

/// A workload that cannot be moved, and why; it was not touched.
#[derive(Debug, Clone, Error)]
#[error("{text}")]
pub struct Refusal {
    /// The named reason.
    pub code: ErrorCode,
    /// What was found, on which object, and what to do.
    pub text: String,
}

impl Refusal {
    /// A refusal for `code`; `text` names the object.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}
