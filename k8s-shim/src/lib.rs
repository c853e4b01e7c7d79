//! Kubernetes for pageferry.
//!
//! So far the resources alone: what a person or a controller writes to have a pod moved, and what
//! is said of the move. Absent: controller, agent, and all that acts on them.
#![forbid(unsafe_code)]
#![allow(
    clippy::duplicated_attributes,
    reason = "each column that is printed has the same attributes"
)]

pub mod agent;
pub mod ask;
pub mod eligible;
pub mod lease;
pub mod logging;
pub mod manifest;
pub mod migration;
pub mod names;
pub mod newpod;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod reconcile;
pub mod status;
pub mod trigger;
