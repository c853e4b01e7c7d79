//! The workload's network: read at the source, made again at the target, closed and opened by us.
//!
//! CRIU never touches links, addresses or routes. At the target a network namespace with the same
//! links (name, MAC, MTU), addresses and routes is prepared while the workload still runs; its veth
//! peers stay off the node's bridge until the hand-off is durable, so nothing of it can answer for
//! the address. At the source the bridge port is closed *before* the freeze: a kernel that has lost
//! the socket would otherwise answer the peer's segments with a reset. What comes then is kept
//! ([`park`]).
//!
//! What its processes say to each other over loopback is held back meanwhile, at both nodes
//! ([`loopback`]).
//!
//! Instead, one that somebody else has made at the target, and attached to nothing, can be joined:
//! then only its links' way onto the bridge is ours. An engine that attaches what it makes is shown
//! a bridge that nobody else is on ([`hold`]).
//!
//! Invariants: of one workload, at most one node's port forwards; every change is undone by
//! [`port::Port::open`] at the source, and at the target by dropping the namespace that was made,
//! or by [`join::JoinedNetwork::detach`].
//! Absent: links that are not veths into a bridge.

pub mod announce;
pub mod conntrack;
pub mod describe;
pub mod hold;
pub mod join;
pub mod loopback;
pub mod netlink;
pub mod park;
pub mod port;
pub mod prepare;
pub mod route;

#[cfg(test)]
mod tests;

use thiserror::Error;

/// Why the workload's network could not be read, made or switched.
#[derive(Debug, Error)]
pub enum LinkError {
    /// A netlink request failed.
    #[error("{action} {object}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// On which link, address or route.
        object: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// A namespace or socket could not be used.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The network has a shape that cannot be moved.
    #[error("{0}")]
    Unfit(String),
}
