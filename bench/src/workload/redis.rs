//! Redis of the node image as a workload.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{Workload, WorkloadPlan};
use crate::client::resp::{Connection, Reply};
use crate::lab::Lab;

/// How the lab starts Redis: nothing on disk, so that memory is all there is to move.
pub fn plan() -> WorkloadPlan {
    let arguments = [
        "/usr/bin/redis-server",
        "--save",
        "",
        "--appendonly",
        "no",
        "--protected-mode",
        "no",
        "--enable-debug-command",
        "yes",
        "--bind",
        "0.0.0.0",
        "--dir",
        "/",
    ];
    WorkloadPlan {
        name: "redis".to_owned(),
        arguments: arguments.map(str::to_owned).to_vec(),
        own_pid_mnt: false,
        uid: None,
    }
}

/// Starts Redis at a node and waits until it answers.
pub fn start(lab: &mut Lab, node: &str, plan: &WorkloadPlan) -> Result<Workload> {
    let workload = Workload::start(lab, node, plan)?;
    let deadline = Instant::now() + START_TIME_MAX;
    loop {
        match ping(&lab.client.net, &workload) {
            Ok(()) => return Ok(workload),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context("Redis does not answer"));
            }
            Err(_) => std::thread::sleep(START_POLL),
        }
    }
}

fn ping(net: &OwnedFd, workload: &Workload) -> Result<()> {
    match Connection::open(net, workload.link.address)?.call(&[b"PING"])? {
        Reply::Simple(word) if word == "PONG" => Ok(()),
        other => bail!("Redis answered {other:?} to PING"),
    }
}

const START_TIME_MAX: Duration = Duration::from_secs(10);
const START_POLL: Duration = Duration::from_millis(20);
