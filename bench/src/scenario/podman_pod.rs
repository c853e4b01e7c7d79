//! `containers --only podman-pod`: a pod of three containers in the network that podman gives,
//! moved to and fro under load, with a connection over its loopback that never breaks.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::client::writer::WriterClient;
use crate::lab::Lab;
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::workload::{bridged, container, podman_pod};
use crate::writer::options::Options;

/// A pod that is watched: from outside, and its writer, and what its containers say to each other.
#[derive(Debug)]
pub(super) struct PodSession {
    pub(super) session: Session,
    writer: WriterClient,
    inner: u64,
}

/// Moves there and back, twice.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    bridged::join_segment(&lab)?;
    let earlier = report.moves.len();
    let mut pod = PodSession::start(&mut lab, settings)?;
    // What is looked at after each move is so before the first.
    pod.check(&lab)?;
    for _ in 0..MOVES {
        ensure!(pod.session.move_on(&lab, report)?, "it has not moved");
        settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
        pod.check(&lab)?;
    }
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(NAME, &moved);
    report.print_figures(NAME);
    pod.end(&lab, report)
}

impl PodSession {
    /// Starts a pod at node a, and whoever watches it.
    pub(super) fn start(lab: &mut Lab, settings: &Settings) -> Result<Self> {
        let mut options = Options::new(WRITER_BYTES);
        (options.hot, options.rate) = (WRITER_BYTES / 4, WRITER_RATE);
        let pod = podman_pod::start(lab, "a", &options)?;
        let writer = WriterClient::connect(&lab.client.net, &pod, START_TIME_MAX)?;
        let inner = podman_pod::inner_connection(lab.node("a")?, &pod)?;
        let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
        let session = Session::watch(lab, settings.mover, "a", pod, dataset, load)?;
        Ok(Self {
            session,
            writer,
            inner,
        })
    }

    /// Whether all of it is as it is to be, where it is now, and nothing of it elsewhere.
    pub(super) fn check(&mut self, lab: &Lab) -> Result<()> {
        let Session { workload, at, .. } = &self.session;
        for node in &lab.nodes {
            match node.name() == at {
                true => podman_pod::check_here(node, workload)?,
                false => podman_pod::check_gone(node, workload)?,
            }
        }
        let inner = podman_pod::inner_connection(lab.node(at)?, workload)?;
        ensure!(
            inner == self.inner,
            "the connection over loopback was {}, and is {inner}",
            self.inner
        );
        let pages = self.writer.verify().context("the pod's writer")?;
        ensure!(0 < pages, "the pod's writer has no memory");
        Ok(())
    }

    /// Ends it as an operator would.
    pub(super) fn end(self, lab: &Lab, report: &mut Report) -> Result<()> {
        let at = self.session.at.clone();
        let workload = self.session.finish(report)?;
        podman_pod::end(lab.node(&at)?, &workload)
    }
}

const NAME: &str = "podman-pod";
const MOVES: usize = 4;
const BYTES: u64 = 64 << 20; // 64 MiB
const WRITER_BYTES: usize = 16 << 20; // 16 MiB
/// Pages a second: 4 MB/s.
const WRITER_RATE: u32 = 1_000;
const START_TIME_MAX: Duration = Duration::from_secs(30);
