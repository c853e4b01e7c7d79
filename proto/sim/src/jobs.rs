//! Which of the actions under way may get further.

use super::node::{SourceJob, TargetJob};
use super::world::World;

impl World {
    /// The jobs that may get further: none that hangs, and of the records being written the first.
    pub(super) fn source_jobs(&self) -> Vec<usize> {
        let writes = |job: &SourceJob| matches!(job, SourceJob::Journal { .. });
        let hangs = |job: &SourceJob| matches!(job, SourceJob::Hung);
        allowed(&self.source.jobs, writes, hangs)
    }

    pub(super) fn target_jobs(&self) -> Vec<usize> {
        let writes = |job: &TargetJob| matches!(job, TargetJob::Journal { .. });
        let lacks = !self.target.absent.is_empty() && !self.says_filled_early();
        let hangs = |job: &TargetJob| match job {
            TargetJob::Fill => lacks,
            job => matches!(job, TargetJob::Hung),
        };
        allowed(&self.target.jobs, writes, hangs)
    }
}

fn allowed<Job>(
    jobs: &[Job],
    writes: impl Fn(&Job) -> bool,
    hangs: impl Fn(&Job) -> bool,
) -> Vec<usize> {
    let first = jobs.iter().position(&writes);
    (0..jobs.len())
        .filter(|place| !writes(&jobs[*place]) || Some(*place) == first)
        .filter(|place| !hangs(&jobs[*place]))
        .collect()
}
