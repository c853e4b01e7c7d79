//! The IO half of pageferry: everything that touches the kernel, CRIU, the network or a disk.
//!
//! Decisions are made in `pageferry-proto`; this crate performs them. See `ARCHITECTURE.md` for the
//! map of modules and who may use whom.

pub mod api;
pub mod args;
pub mod cli;
pub mod config;
pub mod link;
pub mod migration;
pub mod net;
pub mod node;
pub mod pager;
pub mod pages;
pub mod runtime;
pub mod sys;
pub mod telemetry;
