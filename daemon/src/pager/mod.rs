//! The pager: the small process that holds the memory of a workload that has come in.
//!
//! ```text
//!   daemon: client ══ message, channel ══► process ─► restore ─► serve ─► worker ─► space
//!                                             │        CRIU        userfaultfd: faults, fill
//!                                             └─► watcher: freezes the tree if the pager dies
//! ```
//!
//! It takes the stores from the daemon, has CRIU restore the tree, holds it before its first
//! instruction, lets it go when told to, and fills its memory from the stores: faults first.
//!
//! Invariant: while the tree can run, somebody holds its userfaultfds; if nobody did, it would read
//! zeros. Absent: network, journal, decisions.

mod ahead;
pub mod channel;
pub mod client;
pub mod error;
pub mod failure;
pub mod fault;
pub mod fill;
pub mod message;
pub mod plan;
pub mod process;
pub mod restore;
pub mod serve;
mod signals;
pub mod space;
pub mod store;
pub mod watcher;
mod worker;
