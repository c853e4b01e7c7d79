//! What each side consists of besides its machine.

use std::collections::{BTreeMap, VecDeque};

use super::course::Taken;
use super::journal::Journal;
use super::memory::{Memory, TrackedMemory};
use pageferry_proto::id::{Generation, Round, SpaceId};
use pageferry_proto::migration::absent::Absent;
use pageferry_proto::migration::ledger::Ledger;
use pageferry_proto::migration::source::{SourceAction, SourceEvent, SourceMachine};
use pageferry_proto::migration::target::{TargetAction, TargetEvent, TargetMachine};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::control::Fetch;

#[derive(Debug)]
pub(super) struct SourceNode {
    /// None while the daemon is not running.
    pub(super) machine: Option<SourceMachine>,
    pub(super) journal: Journal,
    pub(super) workload: SourceWorkload,
    pub(super) memory: TrackedMemory,
    pub(super) actions: VecDeque<SourceAction>,
    pub(super) jobs: Vec<SourceJob>,
    pub(super) fail_next: bool,
    pub(super) hang_next: bool,
    /// A thaw has ended the tracking.
    pub(super) untracked: bool,
    /// When the present freeze began.
    pub(super) frozen_at: Option<Time>,
    /// The freeze is given up after so many of its steps.
    pub(super) retry_after: Option<u8>,
    /// It let go of its lock, and has not taken it back.
    pub(super) let_go: bool,
    /// This daemon knows that the copy is maimed, as letting go has failed for that.
    pub(super) knows_maimed: bool,
    /// The operator has asked this daemon for an abort.
    pub(super) abort_asked: bool,
    /// It got a maimed copy back.
    pub(super) back_in_part: bool,
    /// The driver was told that the target fetches what it lacks.
    pub(super) drain_asked: bool,
    /// Without power for good.
    pub(super) dead: bool,
}

#[derive(Debug)]
pub(super) struct TargetNode {
    /// None while the daemon is not running.
    pub(super) machine: Option<TargetMachine>,
    pub(super) journal: Journal,
    pub(super) workload: TargetWorkload,
    /// Pages that have arrived, and what is known of them.
    pub(super) store: Memory,
    pub(super) ledger: Option<Ledger>,
    pub(super) taken: Taken,
    /// What has arrived of the attempt that the ledger collects.
    pub(super) attempt: Attempt,
    /// What was restored from the store, and from which images; later what has followed, too.
    pub(super) restored: (Memory, Images),
    /// What is still to follow, as the pager knows it.
    pub(super) absent: Absent,
    /// What the workload has written here.
    pub(super) written: Memory,
    pub(super) actions: VecDeque<TargetAction>,
    pub(super) jobs: Vec<TargetJob>,
    pub(super) fail_next: bool,
    pub(super) hang_next: bool,
    pub(super) dead: bool,
    pub(super) incarnations: u64,
    /// How often letting go has failed: the machine gives up after some tries.
    pub(super) let_go_failures: u32,
}

/// The folder of image files: what is in each says which attempt wrote it.
pub(super) type Images = BTreeMap<u8, Generation>;

/// What the target keeps of one attempt, besides pages.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    pub(super) generation: Option<Generation>,
    pub(super) images: Images,
    pub(super) digests: Vec<(SpaceId, Vec<(u64, u32)>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceWorkload {
    Running,
    Frozen,
    /// Frozen, and a process of it has died since the commit.
    Maimed,
    /// Killed after the hand-off, or by a loss of power.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetWorkload {
    Nothing,
    Held,
    /// It was held and has died; that it never ran is known.
    Dropped,
    Running,
    /// Lost with the power.
    Lost,
    /// It ran, and was frozen for good.
    Ended,
}

/// An action of the source that is under way.
#[derive(Debug)]
pub(super) enum SourceJob {
    CompareSmaps,
    Connect,
    /// The target asks for pages.
    Fetch(Fetch),
    Freeze,
    /// Under way until it is undone.
    Hung,
    Journal {
        action: SourceAction,
        place: usize,
    },
    Late(SourceEvent),
    Release,
    Send(Sending),
    Thaw {
        untrack: bool,
    },
    Track,
    Unlock,
}

/// A round, final or not, of which some parcels are still to be read and sent.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) round: Round,
    pub(super) parcels: VecDeque<(SpaceId, PageSet)>,
    /// Pages that are not sent.
    pub(super) absent: Vec<(SpaceId, PageSet)>,
    pub(super) sent: u32,
    pub(super) pages: u64,
    /// What follows the parcels of the final round.
    pub(super) last: Option<Last>,
}

/// What an attempt at the final round sends besides parcels.
#[derive(Debug)]
pub(super) struct Last {
    pub(super) live_sets: u32,
    pub(super) images: u32,
    pub(super) digests: u32,
    pub(super) unsent: VecDeque<Stream>,
}

/// An action of the target that is under way.
#[derive(Debug)]
pub(super) enum TargetJob {
    Abandon,
    Discard,
    Fill,
    /// Under way until it is undone.
    Hung,
    Journal {
        action: TargetAction,
        place: usize,
    },
    Late(TargetEvent),
    LetGo,
    Lock {
        has_lock: bool,
    },
    Prepare,
    Restore,
    Stored(TargetEvent),
}

/// A data stream in flight.
#[derive(Clone, Debug)]
pub(super) enum Stream {
    AbsentSet {
        generation: Generation,
        space: SpaceId,
        absent: PageSet,
    },
    Fetched {
        space: SpaceId,
        pages: Vec<(u64, u32)>,
    },
    Digests {
        generation: Generation,
        space: SpaceId,
        pages: Vec<(u64, u32)>,
    },
    Image {
        generation: Generation,
        name: u8,
    },
    LiveSet {
        generation: Generation,
        space: SpaceId,
        live: PageSet,
    },
    Parcel {
        space: SpaceId,
        round: Round,
        pages: Vec<(u64, u32)>,
    },
}

impl SourceNode {
    /// A step of the freeze: whether it is given up here.
    pub(super) fn gives_up(&mut self) -> bool {
        self.retry_after = match self.retry_after {
            Some(0) => {
                self.retry_after = None;
                return true;
            }
            Some(steps) => Some(steps - 1),
            None => None,
        };
        false
    }

    /// The daemon is killed: what it was doing stops where it is.
    pub(super) fn crash(&mut self, found: u8) {
        self.machine = None;
        self.actions.clear();
        self.jobs.clear();
        self.fail_next = false;
        self.hang_next = false;
        self.retry_after = None;
        self.knows_maimed = false;
        self.abort_asked = false;
        self.back_in_part = false;
        self.drain_asked = false;
        self.journal.crash(found);
    }
}

impl TargetNode {
    /// The daemon is killed. What the pager holds stays.
    pub(super) fn crash(&mut self, found: u8) {
        self.machine = None;
        self.actions.clear();
        self.jobs.clear();
        self.ledger = None;
        self.attempt = Attempt::default();
        // The pager keeps what is missing; who asked for it is gone.
        self.absent.disconnected();
        self.fail_next = false;
        self.hang_next = false;
        self.journal.crash(found);
    }
}
