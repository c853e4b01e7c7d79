//! What is known of a migration from outside: the machine's status, and what the driver measured.

use std::time::Duration;

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::status::Status;

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
    /// The migration that was started in place of this one, which failed; at the source.
    pub successor: Option<MigrationId>,
    /// The workload's root in the target node's pid namespace, once it is known.
    pub pid_at_target: Option<i32>,
    /// What is to be restored has its place, and whoever restores it waits; at the target.
    pub waiting: bool,
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
            successor: None,
            pid_at_target: None,
            waiting: false,
            recovered: false,
        }
    }
}
