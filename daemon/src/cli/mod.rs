//! The commands of `pageferry`.
//!
//! All but `ca` and `setup` are calls to this node's daemon, which decides everything. Absent:
//! state of any kind, and the network.

pub mod args;
pub mod ca;
mod client;
mod output;
mod progress;
mod run;
mod setup;
mod timeline;

pub use run::run;
