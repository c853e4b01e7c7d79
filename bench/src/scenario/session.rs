//! A Redis under load with everything that watches it: what most scenarios consist of.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::clients::Clients;
use super::report::Report;
use super::settings::other;
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::outcome::{Outcome, millis};
use crate::mover::{MoveOptions, Mover, Order};
use crate::workload::{Workload, WorkloadPlan, redis};

/// A Redis of the lab, and its clients.
#[derive(Debug)]
pub struct Session {
    mover: &'static dyn Mover,
    pub workload: Workload,
    /// The node it is at.
    pub at: String,
    pub clients: Clients,
}

impl Session {
    /// Starts Redis at a node, fills it, and starts its clients.
    pub fn start(
        lab: &mut Lab,
        mover: &'static dyn Mover,
        at: &str,
        dataset: Dataset,
        plan: LoadPlan,
    ) -> Result<Self> {
        Self::start_plan(lab, mover, at, &redis::plan(), dataset, plan)
    }

    /// As [`Session::start`], with another Redis.
    pub fn start_plan(
        lab: &mut Lab,
        mover: &'static dyn Mover,
        at: &str,
        redis: &WorkloadPlan,
        dataset: Dataset,
        plan: LoadPlan,
    ) -> Result<Self> {
        let workload = redis::start(lab, at, redis)?;
        Self::watch(lab, mover, at, workload, dataset, plan)
    }

    /// Fills a Redis that has just been started, and starts its clients.
    pub fn watch(
        lab: &Lab,
        mover: &'static dyn Mover,
        at: &str,
        workload: Workload,
        dataset: Dataset,
        plan: LoadPlan,
    ) -> Result<Self> {
        let logs = format!("load-{}", workload.number);
        let logs = lab.folder.logs().join(logs);
        let address = workload.link.address;
        let clients = Clients::start(&lab.client.net, address, (dataset, plan), &logs)?;
        Ok(Self {
            mover,
            workload,
            at: at.to_owned(),
            clients,
        })
    }

    /// As [`Clients::wait_for_writes`].
    pub fn wait_for_writes(&self, writes: u64) -> Result<()> {
        self.clients.wait_for_writes(writes)
    }

    /// Moves it to the other of two nodes, and waits until it has written more there.
    pub fn move_on(&mut self, lab: &Lab, report: &mut Report) -> Result<bool> {
        let to = other(&self.at);
        let moved = self.move_to(lab, to, &MoveOptions::default(), report)?;
        self.wait_for_writes(WRITES_AROUND)?;
        // What is being filled cannot be moved on.
        std::thread::sleep(PAUSE);
        Ok(moved)
    }

    /// Moves it while the load runs. Whatever fails goes to the report; true when the
    /// workload is at `to` now.
    pub fn move_to(
        &mut self,
        lab: &Lab,
        to: &str,
        flags: &MoveOptions,
        report: &mut Report,
    ) -> Result<bool> {
        let begun = Instant::now();
        let order = Order {
            workload: &self.workload,
            from: &self.at,
            to,
            options: flags,
        };
        let outcome = self.mover.move_workload(lab, &order)?;
        Ok(self.note(outcome, begun, to, report))
    }

    /// Takes the outcome of a move into the report; true when the workload is at `to` now.
    pub fn note(
        &mut self,
        outcome: Outcome,
        begun: Instant,
        to: &str,
        report: &mut Report,
    ) -> bool {
        note_status(&outcome, report);
        let pid = outcome.pid_at_target();
        let Some(mut one) = outcome.moved else {
            let (code, text) = outcome.error.unwrap_or_default();
            report.fail(format!(
                "{} {} -> {to}: {code}: {text}",
                self.workload.name(),
                self.at
            ));
            return false;
        };
        self.workload.pid = pid.unwrap_or(self.workload.pid);
        to.clone_into(&mut self.at);
        match self.blackout_since(begun) {
            Ok(blackout) => one.blackout_ms = Some(millis(blackout)),
            Err(error) => report.fail(format!("after the move to {to}: {error:#}")),
        }
        report.push(one);
        true
    }

    /// As [`Clients::blackout_since`].
    pub fn blackout_since(&self, from: Instant) -> Result<Duration> {
        self.clients.blackout_since(from)
    }

    /// Ends everything and judges what clients saw. The workload stays.
    pub fn finish(self, report: &mut Report) -> Result<Workload> {
        self.clients.finish(report)?;
        Ok(self.workload)
    }
}

/// What only the migration itself knows, where this build prints it.
fn note_status(outcome: &Outcome, report: &mut Report) {
    for (name, words) in [
        ("dirty_pages_per_second", "dirtied pages/s"),
        ("final_round_pages", "pages in the final round"),
    ] {
        if !outcome.object[name].is_null() {
            report.figure_series(words, outcome.object[name].clone());
        }
    }
}

/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
const PAUSE: Duration = Duration::from_millis(100);
