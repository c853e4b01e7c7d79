//! The lab: nodes on one machine, workloads that check themselves, scenarios that tests and
//! benchmarks share.
//!
//! Absent on purpose: nothing here links against the daemon. It is driven as its users drive it, by
//! its binaries.

pub mod app;
pub mod bench;
pub mod cases;
pub mod client;
pub mod cluster;
pub mod content;
pub mod lab;
pub mod measure;
pub mod mover;
pub mod scenario;
pub mod sys;
pub mod workload;
pub mod writer;
