//! Kubernetes for pageferry.
//!
//! What a person or an eviction asks for becomes a Migration; the controller plans it, and the
//! agents have the nodes' daemons do it. Absent: all that is known of processes and memory.
#![forbid(unsafe_code)]
#![allow(
    clippy::duplicated_attributes,
    reason = "each column that is printed has the same attributes"
)]

pub mod agent;
pub mod ask;
pub mod eligible;
pub mod evict;
pub mod invariants;
pub mod lease;
pub mod logging;
pub mod manifest;
pub mod metrics;
pub mod migration;
pub mod names;
pub mod newpod;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod probes;
pub mod reconcile;
pub mod room;
pub mod status;
pub mod surroundings;
pub mod target;
pub mod trigger;
pub mod webhook;
