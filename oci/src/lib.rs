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
//! Invariant: between `write` and `clear` the container is created at most once, and by a restore.

#![forbid(unsafe_code)]

mod command;
mod order;
mod pod;

pub use command::{Command, Verb};
pub use order::{Order, OrderError, Orders, Taken};
pub use pod::{Came, Mark, Place, Places};

/// Where the program is that containers name, for as long as one of them lives: `pageferry setup`
/// puts it there.
pub const INSTALLED: &str = "/usr/local/lib/pageferry/pageferry-oci";
