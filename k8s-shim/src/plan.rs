//! What is to be done for one Migration: observed state in, next step out. No IO, no clock.
//!
//! ```text
//!   Waiting ─► Copying ─► Placing ─► Moving ─► Switching ─► Cleaning ─► Ended
//!                 │          │          │          ▲
//!                 └──────────┴──────────┴─► Aborting ─► Ended
//! ```
//! A step is written down (compare-and-swap on the Migration) before anything is done that belongs
//! to it, so that whoever comes after a crash does the same again; all that is done may be done
//! twice. What is seen may be old, but for what was written down: the write of who decided by old
//! news fails.
//!
//! Invariants:
//! - The source's daemon is told to freeze ([`Record::proceed`]) only when the new pod waits at the
//!   target. Before that word a move is given up here; after it the daemons alone decide how it
//!   ended, and here it is followed.
//! - The new pod is deleted only where that word was never given, or the source has said that it
//!   goes on. The source pod is deleted only when the target has said that it has taken over.
//! - A ReplicaSet never sees fewer pods than it had: it gets the new pod before it loses the old.
//! - A Migration that has not ended does something, waits for something with a time, or is blocked
//!   and says on what.
//!
//! Absent: whether a pod may move at all (`eligible.rs`), and doing any of it (`reconcile.rs`).

mod abort;
mod course;
mod observed;
mod record;
mod switch;
#[cfg(test)]
mod tests;
mod turn;

pub use observed::{
    Adoption, Disruption, Limits, NewPod, Observed, Other, Report, SourcePod, Target, Timeouts,
};
pub use record::{Record, Side, Step, Why};
pub use turn::DISRUPTION;

/// What to do: either the record changes, and then it is looked again, or all of the actions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// To be written down; nothing else is done before it is.
    pub record: Option<Record>,
    pub actions: Vec<Action>,
    /// To be looked at again after so many seconds, even if nothing changes.
    pub again: Option<i64>,
}

/// Something to be done. Each may be done again, and does no more then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The Migration is to stay until nothing is left of it.
    Hold,
    /// It may go.
    LetGo,
    /// Make the new pod, from the source's, under this name, for this node.
    CreatePod { name: String, node: String },
    /// The new pod, which must be this one.
    DeleteNew { name: String, uid: String },
    /// The new pod stays, whatever becomes of the Migration.
    Release { name: String, uid: String },
    /// Say of the new pod that it is what it was.
    SetRestored { name: String, uid: String },
    /// Have the source's owner rather lose the source than the new pod.
    MarkSource,
    /// Give the new pod to the owner of the source.
    Adopt { name: String, uid: String },
    /// The source pod, at once.
    DeleteSource,
    /// The source pod stays: nobody is to wait for it to go.
    EndEviction,
}

/// A rule that a test breaks, to see that somebody notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The word is given as soon as the new pod is there.
    ProceedEarly,
    /// The source pod is deleted as soon as the source has committed.
    DeleteSourceEarly,
    /// The new pod is deleted when the move is to be given up, whatever the daemons say.
    DeleteNewAlways,
    /// The source pod is deleted before the owner has the new one.
    DeleteBeforeAdoption,
    /// The new pod is said to be restored when it runs.
    RestoredEarly,
    /// What is left after the end stays.
    LeaveNew,
    /// The new pod is adopted whatever the owner would make of it.
    AdoptBlindly,
    /// A node that the cluster does not know any more is taken for dead.
    AbsentIsDown,
    /// What the target could not keep is said to have moved.
    LostIsMoved,
}

/// The next step of a Migration.
pub fn plan(observed: &Observed) -> Decision {
    plan_broken(observed, None)
}

/// What is written down when the API server does not take the new pod, whenever it is asked. None
/// where that changes nothing.
pub fn new_pod_refused(observed: &Observed, message: &str) -> Option<Record> {
    let broken = None;
    let course = course::Course { observed, broken };
    let text = format!("the API server does not take the new pod: {message}");
    let why = Why::new("NewPodRefused", text);
    (observed.record.step == Step::Placing).then(|| course.give_up(why, false))
}

/// The same with a rule broken, for the simulation's own test.
#[doc(hidden)]
pub fn plan_broken(observed: &Observed, broken: Option<Broken>) -> Decision {
    course::Course { observed, broken }.next()
}
