//! The daemon and the command line: what drives a migration, and what speaks to the other node.
//!
//! Decisions are made in `pageferry-proto`; this crate performs them, with what the crates below it
//! know of pages, cgroups, CRIU and the pager. See `ARCHITECTURE.md` at the root for the map of
//! crates and modules, and who may use whom.
//!
//! Invariants: nothing here decides who may run the workload; what was decided is in the journal
//! before it is acted on. Absent: unsafe code (`pageferry-sys`), the schema of the control API
//! (`pageferry-api`), and what must outlive the daemon (`pageferry-pager`).

#![forbid(unsafe_code)]

pub mod api;
pub mod args;
pub mod cli;
pub mod config;
pub mod link;
pub mod metrics;
pub mod migration;
pub mod net;
pub mod node;
pub mod runtime;
pub mod telemetry;
