//! All that a Redis has to do with while it moves: a write load, a prober, and a connection as old
//! as both.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::report::Report;
use crate::client::load::{Dataset, Load, LoadPlan};
use crate::client::probe::Prober;
use crate::client::resp::{ANSWER_TIME_MAX, Connection};
use crate::client::verify;
use crate::mover::outcome::round;

/// The clients of a Redis. They are connected from first to last.
#[derive(Debug)]
pub struct Clients {
    pub load: Load,
    pub prober: Prober,
    /// Reading back happens on a connection that lived through it all.
    connection: Connection,
}

impl Clients {
    /// Fills a Redis that has just been started, and starts its clients in the network `net`. The
    /// load logs into a folder.
    pub fn start(
        net: &OwnedFd,
        address: Ipv4Addr,
        (dataset, plan): (Dataset, LoadPlan),
        logs: &Path,
    ) -> Result<Self> {
        let mut connection = Connection::open(net, address)?;
        dataset.populate(&mut connection)?;
        std::fs::create_dir_all(logs).context("creating the folder of the load's logs")?;
        let clients = Self {
            load: Load::start(net, address, dataset, plan, logs)?,
            prober: Prober::redis(net, address)?,
            connection,
        };
        clients.wait_for_writes(WRITES_MIN)?;
        Ok(clients)
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

    /// Ends them, and judges what they saw: connections that broke, writes that are lost, contents
    /// that changed.
    pub fn finish(self, report: &mut Report) -> Result<()> {
        let Self {
            load,
            prober,
            mut connection,
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
        Ok(())
    }
}

/// A load that has not begun to flow is none.
const WRITES_MIN: u64 = 1000;
const POLL: Duration = Duration::from_millis(5);
