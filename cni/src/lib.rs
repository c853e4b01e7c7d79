//! `pageferry-ipam`: a CNI program for addresses, between a network plugin and its *delegate*, the
//! one that has the node's range.
//!
//! A pod that moves keeps its address, which is of the range of the node where it was made. Three
//! things follow, and they are all that is done here; whatever else is asked goes to the delegate:
//! - Where it comes to, it gets that address, with routes that work there, and the range of that
//!   node is not asked.
//! - Where it was made, the address stays reserved in the range, although the pod's sandbox is
//!   gone, for as long as it is away.
//! - Where it has left, the same pod gets no address any more: it runs elsewhere as another one,
//!   and a kubelet that comes up anew may not know that yet.
//!
//! Who tells what, by the functions of [`Folders`]: whoever expects a pod writes a file for it
//! ([`Folders::expect`]), whoever sends one away another one ([`Folders::away`]), and
//! one for the pod ([`Folders::leave`]).
//!
//! Invariants: an address that is away is given to nobody by this node, but to the pod that comes
//! back with it, which is known by its UID: a pod that is expected gets its address or none. What
//! is away is on disk, under its final name, before [`Folders::away`] returns.
//! Decisions of programs that run at once follow each other ([`Folders`] has a lock). Every wait
//! for a delegate ends.
//!
//! Not here: routes and neighbours of the node, and who may have which address, which are the
//! daemon's; addresses of version 6; ranges.

#![forbid(unsafe_code)]

mod act;
mod delegate;
mod failure;
mod folders;
mod range;
mod request;

pub use act::{Outcome, act, release};
pub use failure::Failure;
pub use folders::{AWAY, Away, EXPECTED, Expected, Folders, Left, RUN, STATE, StoreError};
pub use request::Request;
