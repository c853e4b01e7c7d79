//! Clients of the workloads, in the lab's client namespace: what a user of the workload would see.

pub mod datagrams;
pub mod http;
pub mod lines;
pub mod load;
pub mod probe;
pub mod resp;
pub mod steady;
pub mod verify;
pub mod writer;
