//! The self-checking writer as a workload.

use super::WorkloadPlan;
use crate::writer::options::Options;

/// How the lab starts a writer.
pub fn plan(options: &Options) -> WorkloadPlan {
    let mut arguments = vec![PROGRAM.to_owned()];
    arguments.extend(options.arguments());
    WorkloadPlan {
        name: "writer".to_owned(),
        arguments,
        own_pid_mnt: false,
        uid: None,
    }
}

/// Where nodes have it.
pub const PROGRAM: &str = "/usr/local/bin/lab-writer";
