//! What works on a site, one at a time, and what came of it.

use pageferry_proto::migration::source::{SourceAction, SourceEvent};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::site::Site;

/// Whether what is under way ends for this.
pub(super) fn ends_others(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Thaw { .. } | SourceAction::Release)
}

/// What came of an operation: the site again, and what happened, if that is for the machine.
pub(super) type Performed = (Box<Site>, Option<SourceEvent>);

/// Performs an operation.
pub(super) async fn operation(site: &mut Site, action: SourceAction) -> Option<SourceEvent> {
    if action == SourceAction::Drain {
        let failed = site.begin_draining().await.err();
        return failed.map(SourceEvent::DrainLost);
    }
    Some(answered(site, action).await)
}

/// Performs an action that is answered.
async fn answered(site: &mut Site, action: SourceAction) -> SourceEvent {
    let done = match action {
        SourceAction::Track => site.track().await.map(|()| SourceEvent::TrackingReady {
            memory: site.memory(),
        }),
        SourceAction::SendRound {
            round,
            folders,
            pages,
        } => {
            let sent = site.round(round, (folders, pages)).await;
            sent.map(SourceEvent::RoundSent)
        }
        SourceAction::Freeze { .. } => site.freeze().await,
        SourceAction::Finish {
            generation,
            round,
            absent,
        } => site.finish(generation, round, absent).await,
        SourceAction::CompareSmaps => site.compare_smaps().await.map(|()| SourceEvent::SmapsEqual),
        SourceAction::Thaw { untrack } => site.thaw(untrack).await.map(|lost| match lost {
            None => SourceEvent::Thawed { untrack },
            Some(lost) => SourceEvent::ThawedInPart { untrack, lost },
        }),
        SourceAction::Release => site.release().await.map(|()| SourceEvent::Released),
        SourceAction::Unlock => site.unlock().await.map(|()| SourceEvent::Unlocked),
        SourceAction::Connect
        | SourceAction::Drain
        | SourceAction::Journal(_)
        | SourceAction::Report(_)
        | SourceAction::Send(_) => Err(Failure::new(
            ErrorCode::Internal,
            "an action that is no operation",
        )),
    };
    let failure = match done {
        Ok(event) => return event,
        Err(failure) => failure,
    };
    if failure.code() == ErrorCode::PeerLost {
        site.hear_why().await;
    }
    SourceEvent::Failure(failure)
}
