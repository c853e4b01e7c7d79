//! A Redis under load with everything that watches it: what most scenarios consist of.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::report::Report;
use super::settings::other;
use crate::client::load::{Dataset, Load, LoadPlan};
use crate::client::probe::Prober;
use crate::client::resp::{ANSWER_TIME_MAX, Connection};
use crate::client::verify;
use crate::lab::Lab;
use crate::mover::outcome::{Outcome, millis, round};
use crate::mover::{MoveOptions, Mover, Order};
use crate::workload::{Workload, WorkloadPlan, redis};

/// A Redis of the lab, its load and its prober.
#[derive(Debug)]
pub struct Session {
    mover: &'static dyn Mover,
    pub workload: Workload,
    /// The node it is at.
    pub at: String,
    pub load: Load,
    pub prober: Prober,
    /// As old as the others: reading back happens on a connection that lived through it all.
    connection: Connection,
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
        let net = &lab.client.net;
        let address = workload.link.address;
        let mut connection = Connection::open(net, address)?;
        dataset.populate(&mut connection)?;
        let logs = lab.folder.logs().join(format!("load-{}", workload.number));
        std::fs::create_dir_all(&logs).context("creating the folder of the load's logs")?;
        let load = Load::start(net, address, dataset, plan, &logs)?;
        let prober = Prober::redis(net, address)?;
        let session = Self {
            mover,
            workload,
            at: at.to_owned(),
            load,
            prober,
            connection,
        };
        session.wait_for_writes(WRITES_MIN)?;
        Ok(session)
    }

    /// Waits until the load has had so many more writes acknowledged.
    pub fn wait_for_writes(&self, writes: u64) -> Result<()> {
        let wanted = self.load.writes() + writes;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while self.load.writes() < wanted {
            ensure!(Instant::now() < deadline, "the load came to a stop");
            std::thread::sleep(POLL);
        }
        Ok(())
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

    /// The longest silence since `from`, once the workload answers again.
    pub fn blackout_since(&self, from: Instant) -> Result<Duration> {
        if !self
            .prober
            .wait_for_answer_after(Instant::now(), ANSWER_TIME_MAX)
        {
            bail!("the prober has no answer");
        }
        Ok(self.prober.longest_silence_since(from))
    }

    /// Ends everything and judges what clients saw. The workload stays.
    pub fn finish(self, report: &mut Report) -> Result<Workload> {
        let Self {
            workload,
            load,
            prober,
            mut connection,
            ..
        } = self;
        let written = load.finish();
        let broken = written.broken().map(str::to_owned).chain(prober.finish());
        for reason in broken.collect::<Vec<_>>() {
            report.broken_connections += 1;
            report.fail(format!("broken: {reason}"));
        }
        report.figure("client MB/s", round(written.megabytes_per_second()));
        report.figure("client writes", written.writes);
        let verdict = verify::verify(&mut connection, &written)?;
        report.lost_acks += verdict.lost_acks;
        report.note_contents(verdict.digest_equal);
        for finding in verdict.findings {
            report.fail(finding);
        }
        Ok(workload)
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

/// A load that has not begun to flow is none.
const WRITES_MIN: u64 = 1000;
/// A quarter of a second of the first row.
const WRITES_AROUND: u64 = 3_000;
const PAUSE: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(5);
