//! Real applications: each is started as a workload, has a load of its own, and proves at the end
//! that nothing was lost.
//!
//! An application is moved by others; here is what it takes to say that it did not notice. What was
//! acknowledged to a client is accounted for outside of it, and compared with what it holds in the
//! end. Invariants: nobody connects anew while the load runs, but where that is what the load is
//! about (nginx, pgbench); each server runs as a user of its own where it is meant to.

pub mod jvm;
pub mod layer;
pub mod mariadb;
pub mod memcached;
pub mod nginx;
pub mod numpy;
pub mod postgresql;
pub mod state;
pub mod user;
pub mod valkey;

use std::fmt::Debug;
use std::time::Duration;

use anyhow::Result;

use crate::client::steady::Window;
use crate::lab::Lab;
use crate::workload::Workload;

/// An application and its load, both running.
pub trait App: Debug {
    fn workload(&mut self) -> &mut Workload;

    /// Has the load flow, and forgets what clients have seen so far.
    ///
    /// # Errors
    /// The load does not flow.
    fn before_move(&mut self, lab: &Lab) -> Result<()>;

    /// Waits until every client is answered again: what clients have seen since the call before.
    ///
    /// # Errors
    /// A client is not answered, or wrongly.
    fn after_move(&mut self) -> Result<Seen>;

    /// Ends the load and compares what was acknowledged with what is there.
    ///
    /// # Errors
    /// It cannot be compared.
    fn prove(self: Box<Self>, lab: &Lab) -> Result<Proof>;
}

/// What clients have seen of a move.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The longest time in which nobody had an answer.
    pub blackout: Duration,
    /// The longest time for which anybody waited.
    pub pause: Duration,
}

impl From<Window> for Seen {
    fn from(window: Window) -> Self {
        Self {
            blackout: window.silence,
            pause: window.pause,
        }
    }
}

/// What became of all that was acknowledged.
#[derive(Clone, Debug)]
pub struct Proof {
    /// What was compared, with its figures, if nothing is wrong.
    pub text: String,
    /// Whatever is wrong.
    pub wrong: Vec<String>,
}

/// One of the applications.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    /// Starts it at a node, and its load, which flows when this returns.
    pub start: fn(&mut Lab, &str) -> Result<Box<dyn App>>,
}

const fn app(name: &'static str, start: Start) -> Kind {
    Kind { name, start }
}

type Start = fn(&mut Lab, &str) -> Result<Box<dyn App>>;

pub const ALL: [Kind; 7] = [
    app("nginx", nginx::start),
    app("memcached", memcached::start),
    app("valkey", valkey::start),
    app("jvm", jvm::start),
    app("numpy", numpy::start),
    app("postgresql", postgresql::start),
    // It locks each of its files.
    app("mariadb", mariadb::start),
];

/// Enough to see a pattern.
const WRONG_MAX: usize = 16;
