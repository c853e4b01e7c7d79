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
//! The crate is both ends of that conversation. [`client`] is all that a daemon needs; it uses what
//! is said and how ([`message`], [`channel`], [`plan`], `marks`), and nothing of the process, so
//! that nothing of it is linked into whoever only asks. [`process`] is the program's.
//!
//! Invariant: while the tree can run, somebody holds its userfaultfds; if nobody did, it would read
//! zeros. A workload cannot outlive its memory, so little can go wrong here: what the program links
//! is as small as what it does.
//!
//! Absent: network, journal, decisions, and every crate that they need.

#![forbid(unsafe_code)]

mod absent;
mod ahead;
pub mod channel;
pub mod client;
pub mod error;
mod failure;
mod fault;
mod fill;
mod latency;
mod locks;
mod marks;
pub mod message;
pub mod plan;
pub mod process;
mod restore;
mod runtime;
mod serve;
mod shield;
mod signals;
mod space;
mod start;
mod waits;
mod watcher;
mod worker;
