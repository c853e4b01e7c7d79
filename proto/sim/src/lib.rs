//! The protocol in a bottle: both machines, a link, two journals, two workloads and an operator,
//! without time, threads or IO.
//!
//! A [`World`] is moved on by [`Step`]s, of which it names those that are possible now, and
//! disturbed by [`Op`]s: crashes, power losses, broken connections, failing actions, aborts and
//! fences, and journals that are removed once nobody needs them. Whoever chooses them decides
//! everything; nothing here is random. After each one the oracles are asked:
//!
//! - at most one side runs the workload;
//! - after a durable commit the source thaws only with a durable refusal at the target or a
//!   durable fence of its own;
//! - the target lets the workload go at most once, never after refusing, and never without the
//!   source's commit or a fence;
//! - nothing is said that is not on disk: `Ready`, `Go`, `Refused`, `Settled`;
//! - the target does not forget what a source may still ask;
//! - what runs at the target is what was frozen at the source, page by page;
//! - the source sends a round when the one before is held, and none after `Final`, of whose attempt
//!   the commit is;
//! - the target collects the attempt of `Final`, and holds none to which a stray stream came;
//! - the generation of the status only grows, and no machine piles up actions;
//! - nobody runs without the workload's file lock, which the source lets go when the commit is
//!   durable and before `Go`, and which others may take then;
//! - a workload that has stood still for as long as the policy allows, and is not committed, is
//!   asked back: whatever hangs then is cut;
//! - of a workload that started with pages missing, each page that it can read is that of the
//!   freeze or what it has written since, and each other one is still to come;
//! - a copy of which the target lacks pages is neither thawed nor killed, and that all are there is
//!   on the target's disk before the source hears it;
//! - what is lost in a drain has a cause that is not a link or a daemon, runs nowhere, and is said
//!   to be lost by every node that lives.
//!
//! [`Sabotage`] breaks each of the last three once on purpose: a test sees it caught.
//!
//! [`World::settle`] ends all faults, and demands that both machines finish in a bounded number
//! of steps and that exactly one workload runs, unless what ran it, or had pages of it, lost its
//! power.
//!
//! What is modelled of the disk: a record that was fsynced survives; one that was not, or whose
//! fsync failed, may or may not be found, at every crash anew. What is modelled of the link: the
//! control stream is ordered and loses what is in flight when the connection breaks; data
//! streams arrive in any order. What is modelled of the driver: long actions are under way while
//! other events happen, their effect may precede their report, and an undone one may still
//! report; any of them may hang until it is undone. Not modelled: two
//! connections at once, bytes that change on the way (checksums), and operators who declare a
//! living side dead.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod attempt;
mod course;
mod deaths;
mod drain;
mod driver;
mod end;
mod expire;
mod intake;
mod jobs;
mod journal;
mod lock;
mod memory;
mod node;
mod offer;
mod oracle;
mod sabotage;
mod step;
mod world;

pub use course::Strayed;
pub use oracle::Violation;
pub use sabotage::Sabotage;
pub use step::{Op, Step};
pub use world::{Setup, Survivor, World};
