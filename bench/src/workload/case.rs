//! A case of `lab-cases` as a workload.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Workload, WorkloadPlan};
pub use crate::cases::echo::{DATAGRAMS, LINES, UNREAD};
use crate::cases::{Verdict, Watched};
use crate::lab::Lab;
use crate::lab::init::SHARED;

/// A case, wherever it is.
#[derive(Debug)]
pub struct CaseWorkload {
    pub workload: Workload,
    case: Watched,
}

impl CaseWorkload {
    /// Starts the case `name` at a node and waits until its state is arranged.
    pub fn start(lab: &mut Lab, node: &str, name: &str) -> Result<Self> {
        // A folder that no earlier one had.
        let folder = format!("case-{}", lab.workloads());
        let plan = WorkloadPlan {
            name: "case".to_owned(),
            arguments: vec![
                "/usr/local/bin/lab-cases".to_owned(),
                name.to_owned(),
                format!("{SHARED}/{folder}"),
            ],
            own_pid_mnt: false,
            uid: None,
        };
        let workload = Workload::start(lab, node, &plan)?;
        let case = Watched::new(lab.folder.shared().join(folder));
        let started = Self { workload, case };
        started
            .wait_ready()
            .with_context(|| format!("starting the case {name}"))?;
        Ok(started)
    }

    /// Asks what has become of its state, and waits until it is arranged anew.
    pub fn verdict(&self) -> Result<Verdict> {
        self.case.ask()?;
        let deadline = Instant::now() + ANSWER_MAX;
        let verdict = loop {
            if let Some(verdict) = self.case.verdict()? {
                break verdict;
            }
            ensure!(Instant::now() < deadline, "it gives no verdict");
            std::thread::sleep(POLL);
        };
        self.wait_ready()?;
        Ok(verdict)
    }

    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + ANSWER_MAX;
        while !self.case.is_ready()? {
            ensure!(Instant::now() < deadline, "its state is not arranged");
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

/// A check waits for all that should come and does not, some seconds for each.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
