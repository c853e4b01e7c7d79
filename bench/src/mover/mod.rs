//! Movers: whoever moves a workload from node to node, in a file each.
//!
//! A scenario asks a [`Mover`] for a move and reads its [`Outcome`]; what clients saw meanwhile is
//! the scenario's to measure. Invariants: a move that ended in a refusal left the workload running
//! at its node, with its link open; an error is the lab's own trouble, and says nothing about the
//! workload.

pub mod child;
pub mod criu;
pub mod criu_lazy;
pub mod criu_page_server;
pub mod disk_tar;
pub mod images;
pub mod outcome;
pub mod pageferry;
pub mod redis_aof;
pub mod redis_replica;
pub mod runc_checkpoint;
pub mod stock_criu;

use std::fmt::Debug;
use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::workload::Workload;
use outcome::Outcome;

/// Whoever moves workloads.
pub trait Mover: Debug + Sync {
    /// What it is called in reports.
    fn name(&self) -> &'static str;

    /// Whether the nodes run `pageferryd` for it.
    fn needs_daemons(&self) -> bool;

    /// Why it can move nothing here, if it cannot: what this kernel or these nodes lack.
    ///
    /// # Errors
    /// It could not be found out.
    fn unfit(&self, _: &Lab) -> Result<Option<String>> {
        Ok(None)
    }

    /// Moves a workload and waits until it runs at the other node, or stays.
    ///
    /// # Errors
    /// Nothing is known of how the move ended.
    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome>;

    /// Waits until nothing of earlier moves is under way any more.
    ///
    /// # Errors
    /// Something still is after `time_max`.
    fn wait_settled(&self, lab: &Lab, time_max: Duration) -> Result<()>;
}

/// One move that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    pub workload: &'a Workload,
    /// The node it is at.
    pub from: &'a str,
    pub to: &'a str,
    pub options: &'a MoveOptions,
}

/// What else may be asked of a move. A mover that has nothing of the kind leaves it aside.
#[derive(Clone, Debug, Default)]
pub struct MoveOptions {
    /// What it is to be called.
    pub id: Option<String>,
    /// Go on only when that is asked for.
    pub hold: bool,
    /// Compare every page.
    pub verify: bool,
    /// Move although more memory than the budget is copied in the freeze.
    pub force_eager: bool,
    /// Move although something of System V objects is lost.
    pub force_ipc: bool,
    /// How its memory moves: absent, all of it before it runs at the target.
    pub mode: Option<String>,
    /// A time as the command line takes it ("60s").
    pub timeout: Option<String>,
    pub downtime_max: Option<String>,
    pub frozen_max: Option<String>,
    /// Paths that are the same storage at both nodes.
    pub shared: Vec<String>,
    /// Folders that travel along.
    pub copied: Vec<String>,
}
