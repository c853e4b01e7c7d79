//! What two pageferry nodes say to each other, and what must follow from it.
//!
//! This crate holds the part of a live migration that is true without any IO: names and numbers
//! ([`id`], [`page`]), sets of pages ([`set`]), the bytes on the wire ([`wire`]) and the two state
//! machines that decide who may run the workload ([`migration`]).
//! The numbered clauses of `PROTOCOL.md` say the same in words; each is named by a test.
//!
//! Absent on purpose: sockets, files, clocks and randomness. Time is an argument
//! ([`migration::timer::Time`]), identities are made by the caller, and every input that came
//! from a peer or from a disk is parsed into a type whose values are all legal.
//!
//! A crate beside it, `pageferry-sim`, has both machines over a link that loses what is in flight,
//! journals that survive crashes, and the oracles that say what must never happen.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod id;
#[deny(clippy::wildcard_enum_match_arm)]
pub mod migration;
pub mod page;
pub mod set;
pub mod wire;
