//! What the parts of a source failed at, as the machine and the operator are told.

use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::dump::DumpError;
use crate::migration::text::chain;
use crate::net::stream::SendStreamError;
use crate::pages::track::TrackError;
use crate::runtime::cgroup::CgroupError;

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
