//! Redis of the node image as a workload.

use anyhow::Result;

use super::{Workload, WorkloadPlan};
use crate::lab::Lab;

/// Where it listens.
pub const PORT: u16 = 6379;

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

/// Starts Redis at a node and waits until it listens.
pub fn start(lab: &mut Lab, node: &str, plan: &WorkloadPlan) -> Result<Workload> {
    let workload = Workload::start(lab, node, plan)?;
    workload.wait_until_it_listens(lab, PORT)?;
    Ok(workload)
}
