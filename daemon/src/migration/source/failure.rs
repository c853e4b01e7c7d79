//! What the parts of a source failed at, as the machine and the operator are told.

use pageferry_cgroup::freezer::CgroupError;
use pageferry_pages::track::TrackError;
use pageferry_proto::id::NodeName;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::dump::DumpError;
use crate::migration::text::chain;
use crate::net::lanes::LanesError;
use crate::net::stream::SendStreamError;

/// CRIU, or what starts it, failed.
pub(super) fn criu_failed(error: &DumpError) -> Failure {
    Failure::new(ErrorCode::CriuFailed, chain(error))
}

/// Tracking failed; some failures only ask for another round.
pub(super) fn failed_to_track(error: &TrackError) -> Failure {
    Failure::new(error.code(), chain(error))
}

/// The freezer cgroup failed.
pub(super) fn freeze_failed(error: &CgroupError) -> Failure {
    Failure::new(ErrorCode::FreezeFailed, chain(error))
}

/// A stream could not be sent.
pub(super) fn lost(error: &SendStreamError) -> Failure {
    Failure::new(ErrorCode::PeerLost, chain(error))
}

/// The target could not be connected to.
pub(super) fn unreachable(error: &LanesError) -> Failure {
    if let Some(text) = error.untrusted() {
        return Failure::new(ErrorCode::PeerUntrusted, text);
    }
    match error {
        LanesError::Refused { peer, code, .. } => refused(peer, *code),
        _ => None,
    }
    .unwrap_or_else(|| {
        let code = match error.code() {
            // Nothing took long but to find that nobody is there.
            ErrorCode::Timeout => ErrorCode::PeerLost,
            code => code,
        };
        Failure::new(
            code,
            format!("the target cannot be reached: {}", chain(error)),
        )
    })
}

/// What a peer said when it closed the connection, if it says more than that it is closed.
pub(super) fn refused(peer: &NodeName, code: ErrorCode) -> Option<Failure> {
    let why = match code {
        ErrorCode::PeerLost
        | ErrorCode::Finished
        | ErrorCode::Superseded
        | ErrorCode::Restarted => return None,
        ErrorCode::TargetBusy => "it takes in no more migrations at the moment",
        ErrorCode::Limit => "it is at a limit: its log, and `pageferry list --all` there, say more",
        ErrorCode::PeerUnknown => "this node is not among the peers in its configuration",
        ErrorCode::IdTaken => "a migration of this id leaves that node, or has left it",
        ErrorCode::Version => "it speaks another version",
        _ => "its log says more",
    };
    let text = format!("node {peer} closed the connection ({code}): {why}");
    Some(Failure::new(code, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_pages::track::InjectError;

    /// There was a second map from errors to codes, which called all of these `untrackable`.
    #[test]
    fn a_failure_to_track_arrives_under_the_code_of_its_error() {
        let (pid, start, end) = (7, 0x1000, 0x2000);
        let (tid, tracer) = (8, 9);
        let source = InjectError::Traced { tid, tracer };
        for (error, code) in [
            (
                TrackError::Foreign { pid, start, end },
                ErrorCode::WorkloadBusy,
            ),
            (TrackError::Inject { pid, source }, ErrorCode::Traced),
            (TrackError::Exec { pid }, ErrorCode::RetryRound),
            (
                Failure::new(ErrorCode::DirectIo, "a file").into(),
                ErrorCode::DirectIo,
            ),
        ] {
            let told = failed_to_track(&error);
            assert_eq!(told.code(), code, "{error}");
            assert!(told.text().starts_with(&error.to_string()), "{told}");
        }
    }
}
