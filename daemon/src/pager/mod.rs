//! Skeleton.
pub mod cgroup;
pub mod channel;
pub mod client;
pub mod failure;
pub mod fault;
pub mod fill;
pub mod message;
pub mod plan;
pub mod process;
pub mod restore;
pub mod serve;
pub mod space;
pub mod store;
pub mod watcher;
mod worker;
