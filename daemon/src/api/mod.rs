//! The control API: gRPC on a unix socket of this node.
//!
//! Whoever can open the socket can move workloads, so it belongs to root (mode 0600), and the
//! peer's credentials are checked besides: uid 0 or the daemon's own. There is no other
//! authentication and no way in from the network.
//!
//! Absent: the schema and what is generated from it (`pageferry-api`), and decisions. Every call
//! goes to the registry, every answer is a status.

mod convert;
mod serve;

pub use serve::{LocalControl, ServeError, Served, serve};
