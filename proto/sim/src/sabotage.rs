//! Rules that are broken on purpose, to see that an oracle catches it.

use super::node::SourceWorkload;
use super::world::World;
use pageferry_proto::migration::ledger::Account;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::set::PageSet;

/// What a node does wrong, of what it does for a workload that runs with pages missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The source kills its copy as soon as the workload runs at the target.
    KillsAtStarted,
    /// The source thaws its copy when the target is declared dead.
    ThawsByFence,
    /// The target keeps outdated versions of pages that are to come.
    KeepsOutdated,
    /// The target writes over what the workload has written, when a page comes twice.
    OverwritesWritten,
    /// The target says that all is there while pages are missing.
    FillsEarly,
    /// The target takes its record of that for durable when it is not.
    RecordsLate,
    /// The target does not ask again for what a lost connection has cost.
    AsksOnce,
    /// The target takes a lost connection for lost pages.
    LosesByLink,
    /// The target lets run what is lost.
    RunsOn,
}

impl Sabotage {
    /// Every one, and what an oracle says of it.
    pub const ALL: [(Self, &'static str); 9] = [
        (
            Self::KillsAtStarted,
            "the source kills a copy of which the target lacks pages",
        ),
        (
            Self::ThawsByFence,
            "the source thaws what has run at the target with pages missing",
        ),
        (
            Self::KeepsOutdated,
            "the memory at the target is not the memory at the source",
        ),
        (
            Self::OverwritesWritten,
            "what runs at the target reads a page that is not the newest",
        ),
        (
            Self::FillsEarly,
            "the target says filled while it lacks pages",
        ),
        (
            Self::RecordsLate,
            "the target says filled before that is on disk",
        ),
        (Self::AsksOnce, "the migration does not come to an end"),
        (
            Self::LosesByLink,
            "the workload is lost in the drain without a cause",
        ),
        (Self::RunsOn, "what is lost in the drain runs on"),
    ];
}

impl World {
    pub(super) fn says_filled_early(&self) -> bool {
        self.sabotage == Some(Sabotage::FillsEarly)
    }

    /// What the target drops of what it holds.
    pub(super) fn sabotaged_surplus(&self, account: &Account) -> PageSet {
        match self.sabotage {
            Some(Sabotage::KeepsOutdated) => account.surplus.difference(&account.absent),
            _ => account.surplus.clone(),
        }
    }

    pub(super) fn spoils_record(&self, entry: &Entry) -> bool {
        self.sabotage == Some(Sabotage::RecordsLate) && matches!(entry, Entry::Filled { .. })
    }

    pub(super) fn thaws_by_fence(&self) -> bool {
        self.sabotage == Some(Sabotage::ThawsByFence)
            && self.source.workload == SourceWorkload::Frozen
            && self.has_heard_started()
    }
}
