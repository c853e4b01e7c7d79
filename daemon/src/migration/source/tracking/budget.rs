//! How much memory CRIU may copy in the freeze.

use std::time::Duration;

use pageferry_pages::track::Eager;
use pageferry_proto::migration::policy::{EAGER_BYTES_PER_SECOND, Policy};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::migration::text::mebibytes;

/// What CRIU copies in the downtime allowed is accepted.
#[derive(Debug)]
pub struct Budget {
    downtime_max: Duration,
    /// Bytes of one workload that this node lets CRIU copy, whatever the downtime.
    node_max: u64,
    /// Everything is accepted.
    is_forced: bool,
}

impl Budget {
    /// That of a migration under `policy`, at a node that allows `node_max` bytes.
    pub fn new(policy: &Policy, node_max: u64) -> Self {
        Self {
            downtime_max: policy.downtime_max,
            node_max,
            is_forced: policy.force_eager,
        }
    }

    /// Refuses what is above it.
    pub fn check(&self, eager: &Eager) -> Result<(), Failure> {
        let budget = self.downtime_max.as_millis() as u64 * EAGER_BYTES_PER_SECOND / 1000;
        let budget = budget.min(self.node_max);
        if eager.bytes() <= budget || self.is_forced {
            return Ok(());
        }
        let largest = eager.shared.iter().max_by_key(|object| object.bytes);
        let which = largest.map_or(String::new(), |object| {
            format!(
                ", the largest {} of {}",
                object.name,
                mebibytes(object.bytes)
            )
        });
        let advice = if budget == self.node_max {
            "limits.eager_memory_max, whatever the downtime: raise it".to_owned()
        } else {
            format!(
                "what fits into {} ms of downtime: allow more of that",
                self.downtime_max.as_millis()
            )
        };
        Err(Failure::new(
            ErrorCode::SharedMemoryBudget,
            format!(
                "{} of shared, locked or executable memory can only be copied in the \
                 freeze{which}; {} may be, which is {advice}, or use --force-eager",
                mebibytes(eager.bytes()),
                mebibytes(budget)
            ),
        ))
    }
}
