//! The commands of `pageferry`.
//!
//! All but `ca` are calls to this node's daemon, which decides everything. Absent: state of any
//! kind, and the network.

pub mod args;
pub mod ca;
mod client;
mod output;
mod progress;
mod run;

pub use run::run;
