//! The lab: nodes on one machine, workloads that check themselves, scenarios that tests and
//! benchmarks share.
//!
//! Absent on purpose: nothing here links against the daemon. It is driven as its users drive it, by
//! its binaries.

pub mod lab;
pub mod sys;
