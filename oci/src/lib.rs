//! What an engine starts in the place of its OCI runtime, for one container, and what it is told.
//!
//! An engine names the program for the container's life. Once in it, `create` is to become a
//! restore: for that there is an [`Order`] in a folder of ours, by the names that the engine gives
//! to the container. The program takes the order before it does anything, so that there is one
//! restore and no second; all else it passes on to the runtime.
//!
//! ```text
//! (none)  ── Order::write ──► wanted ── Order::take, by `create` ──► taken ── clear ──► (none)
//! create: the runtime's       create: one restore                   create: refused
//!                                                                   start: nothing to do
//! ```
//!
//! A container of a pod is created by Kubernetes, which knows of no order: one whose pod is the
//! destination of a migration waits for it ([`Places`]).
//!
//! Of a pod's containers the kubelet has one after the other started, and all are restored at once.
//! So for all but the last one the program leaves a process of its own to the engine ([`ahead`]),
//! which takes that for the container's: it has the runtime restore the container, and ends as that
//! does.
//!
//! Invariant: between `write` and `clear` the container is created at most once, and by a restore.

#![forbid(unsafe_code)]

pub mod ahead;
mod command;
mod order;
mod pod;

pub use command::{Command, Verb};
pub use order::{Held, Order, OrderError, Orders, Taken};
pub use pod::{Came, Mark, Place, Places};

/// Where the program is that containers name, for as long as one of them lives: `pageferry setup`
/// puts it there.
pub const INSTALLED: &str = "/usr/local/lib/pageferry/pageferry-oci";
