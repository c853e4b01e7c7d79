//! The self-checking writer as a workload.

use std::time::Duration;

use anyhow::Result;

use super::{Workload, WorkloadPlan};
use crate::client::writer::WriterClient;
use crate::lab::Lab;
use crate::writer::options::Options;

/// Starts a writer at a node and waits until it has its memory and answers.
pub fn start(
    lab: &mut Lab,
    node: &str,
    options: &Options,
    change: impl FnOnce(&mut WorkloadPlan),
) -> Result<(Workload, WriterClient)> {
    let mut arguments = vec!["/usr/local/bin/lab-writer".to_owned()];
    arguments.extend(options.arguments());
    let mut plan = WorkloadPlan {
        name: "writer".to_owned(),
        arguments,
        own_pid_mnt: false,
        uid: None,
    };
    change(&mut plan);
    let workload = Workload::start(lab, node, &plan)?;
    let gib = options.memory >> 30;
    let time_max = START_TIME_MAX + START_TIME_PER_GIB * u32::try_from(gib).unwrap_or(u32::MAX);
    let client = WriterClient::connect(&lab.client.net, &workload, time_max)?;
    Ok((workload, client))
}

const START_TIME_MAX: Duration = Duration::from_secs(20);
/// A virtual machine touches memory for the first time at some 0.4 GB/s.
const START_TIME_PER_GIB: Duration = Duration::from_secs(10);
