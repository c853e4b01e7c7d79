//! What is known of a migration from outside: the machine's status, and what the driver measured.

use std::time::Duration;

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::policy::Mode;
use pageferry_proto::migration::status::Status;
use pageferry_proto::page::PageCount;

/// How long threads waited for pages that had not come, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waited {
    /// How many times.
    pub faults: u64,
    /// The median.
    pub p50_us: u64,
    /// What 99 of 100 took at most.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// A migration as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What the machine says.
    pub status: Status,
    /// How long CRIU held the frozen tasks; at the source.
    pub frozen: Option<Duration>,
    /// How long syncing shared storage took in the freeze, if anything is shared; at the source.
    pub synced: Option<Duration>,
    /// How often the workload stood still for a scan, and for how long at most; at the source.
    pub pauses: u32,
    /// The longest of those.
    pub longest_pause: Option<Duration>,
    /// Pages sent in the final round; at the source.
    pub final_pages: Option<u64>,
    /// How its memory has moved; at the source.
    pub mode: Option<Mode>,
    /// Pages that were not sent before it ran at the target; at the source.
    pub followed: Option<PageCount>,
    /// The migration that was started in place of this one, which failed; at the source.
    pub successor: Option<MigrationId>,
    /// The workload's root in the target node's pid namespace, once it is known.
    pub pid_at_target: Option<i32>,
    /// What is to be restored has its place, and whoever restores it waits; at the target.
    pub waiting: bool,
    /// What has not come yet of a workload that runs, if anything; at the target.
    pub missing: Option<PageCount>,
    /// How long threads waited for what had not come, when all has; at the target.
    pub waited: Option<Waited>,
    /// What the move takes from the workload's clients; at the source.
    pub notes: Vec<String>,
    /// Read from a journal: what was counted and measured before is not known.
    pub recovered: bool,
}

impl Progress {
    /// A status of which nothing has been measured.
    pub fn of(status: Status) -> Self {
        Self {
            status,
            frozen: None,
            synced: None,
            pauses: 0,
            longest_pause: None,
            final_pages: None,
            mode: None,
            followed: None,
            successor: None,
            pid_at_target: None,
            waiting: false,
            missing: None,
            waited: None,
            notes: Vec::new(),
            recovered: false,
        }
    }
}
