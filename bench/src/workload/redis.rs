//! Redis of the node image as a workload.

use anyhow::{Context, Result};

use super::{Workload, WorkloadPlan};
use crate::lab::Lab;
use crate::lab::init::SHARED;

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

/// A Redis that writes everything to an append-only file, in a folder of its own on the storage
/// that nodes share.
pub fn aof_plan(number: usize) -> WorkloadPlan {
    let mut plan = plan();
    for (name, value) in [
        ("--appendonly", "yes"),
        ("--dir", &*format!("{SHARED}/redis-{number}")),
    ] {
        let at = plan.arguments.iter().position(|argument| argument == name);
        let at = at.expect("the plan of Redis says so");
        value.clone_into(&mut plan.arguments[at + 1]);
    }
    plan
}

/// Makes the folder of such a Redis.
pub fn make_aof_folder(lab: &Lab, number: usize) -> Result<()> {
    let folder = lab.folder.shared().join(format!("redis-{number}"));
    std::fs::create_dir_all(folder).context("creating the folder of an append-only file")
}

/// Takes it away, if there is one.
pub fn remove_aof_folder(lab: &Lab, number: usize) -> Result<()> {
    let folder = lab.folder.shared().join(format!("redis-{number}"));
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("removing the folder of an append-only file")
        }
        _ => Ok(()),
    }
}

/// Starts Redis at a node and waits until it listens.
pub fn start(lab: &mut Lab, node: &str, plan: &WorkloadPlan) -> Result<Workload> {
    let workload = Workload::start(lab, node, plan)?;
    workload.wait_until_it_listens(lab, PORT)?;
    Ok(workload)
}
