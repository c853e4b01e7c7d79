//! What works on a site, one at a time, and what came of it.

use pageferry_proto::id::PodUid;
use pageferry_proto::migration::target::{TargetAction, TargetEvent};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::site::{LetGoError, Site};

/// What works on a site.
#[derive(Debug)]
pub(super) enum Operation {
    Action(Box<TargetAction>),
    /// Wait until the runtime of this pod's container does.
    Expect(PodUid),
    /// Wait for the end of the fill: follows a successful `LetGo` by itself.
    Fill,
    /// Wait until a workload whose memory was lost has been killed.
    Bury(Buried),
}

/// What need not wait for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutBy {
    Abandon,
    Discard,
    Nothing,
}

impl CutBy {
    /// Whether it is this action.
    pub(super) fn is(self, action: &TargetAction) -> bool {
        match self {
            Self::Abandon => matches!(action, TargetAction::Abandon),
            Self::Discard => matches!(action, TargetAction::Discard),
            Self::Nothing => false,
        }
    }
}

/// What is known of a workload whose memory was lost.
#[derive(Debug)]
pub(super) enum Buried {
    /// It has run.
    Ran,
    /// It may have run, before a restart of this daemon.
    MayHaveRun(Failure),
}

impl Operation {
    /// What need not wait for it: a discard for what it undoes, and whoever abandons a workload for
    /// the end of its fill.
    pub(super) fn cut_by(&self) -> CutBy {
        match self {
            Self::Action(action) => match **action {
                TargetAction::Lock | TargetAction::Prepare(_) | TargetAction::Restore { .. } => {
                    CutBy::Discard
                }
                _ => CutBy::Nothing,
            },
            // What it waits for is what a discard does.
            Self::Bury(_) | Self::Expect(_) => CutBy::Discard,
            Self::Fill => CutBy::Abandon,
        }
    }
}

/// What came of an operation: the site again, what follows by itself, and what happened, if that is
/// for the machine.
pub(super) type Performed = (Box<Site>, Option<Operation>, Option<TargetEvent>);

/// Performs an operation.
pub(super) async fn operation(
    site: &mut Site,
    operation: Operation,
) -> (Option<TargetEvent>, Option<Operation>) {
    let (event, follows) = match operation {
        Operation::Expect(pod) => {
            let failed = site.expect(&pod).await.err();
            return (failed.map(TargetEvent::Failure), None);
        }
        Operation::Fill => match site.filled().await {
            Ok(()) => (TargetEvent::Filled, None),
            // What had not come never will.
            Err(failure) if site.is_draining() => (TargetEvent::DrainLost(failure), None),
            Err(failure) => {
                let follows = Operation::Bury(Buried::Ran);
                (TargetEvent::Failure(failure), Some(follows))
            }
        },
        Operation::Bury(buried) => {
            site.emptied().await;
            let event = match buried {
                // Nothing of it is missing any more.
                Buried::Ran => TargetEvent::Filled,
                Buried::MayHaveRun(failure) => TargetEvent::Lost(failure),
            };
            (event, None)
        }
        Operation::Action(action) => match perform(site, *action).await {
            Ok(TargetEvent::Resumed) => (TargetEvent::Resumed, Some(Operation::Fill)),
            Ok(TargetEvent::Lost(failure)) => {
                let follows = Operation::Bury(Buried::MayHaveRun(failure.clone()));
                (TargetEvent::GaveUp(failure), Some(follows))
            }
            Ok(event) => (event, None),
            Err(failure) => (TargetEvent::Failure(failure), None),
        },
    };
    (Some(event), follows)
}

async fn perform(site: &mut Site, action: TargetAction) -> Result<TargetEvent, Failure> {
    match action {
        TargetAction::Prepare(offer) => site
            .prepare(&offer)
            .await
            .map(|state| TargetEvent::Prepared { state }),
        TargetAction::Restore { .. } => site
            .restore()
            .await
            .map(|state| TargetEvent::Restored { state }),
        TargetAction::Lock => Ok(match site.lock().await {
            Ok(()) => TargetEvent::Locked,
            Err(failure) => TargetEvent::NotLocked(failure),
        }),
        TargetAction::Abandon => site.abandon().await.map(|()| TargetEvent::Abandoned),
        TargetAction::LetGo { generation } => match site.let_go().await {
            Ok(()) => {
                site.intake().feed().fill(generation);
                Ok(TargetEvent::Resumed)
            }
            Err(LetGoError::NeverRan(failure)) => Ok(TargetEvent::NeverRan(failure)),
            Err(LetGoError::Lost(failure)) => Ok(TargetEvent::Lost(failure)),
            Err(LetGoError::Unclear(failure)) => Err(failure),
        },
        TargetAction::Discard => Ok(match site.discard().await {
            Ok(()) => TargetEvent::Discarded,
            Err(failure) => TargetEvent::DiscardFailed(failure),
        }),
        TargetAction::AwaitFinal(_)
        | TargetAction::AwaitRound(_)
        | TargetAction::Journal(_)
        | TargetAction::Report(_)
        | TargetAction::Send(_) => Err(Failure::new(
            ErrorCode::Internal,
            "an action that is no operation",
        )),
    }
}
