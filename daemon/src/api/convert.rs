//! Between the schema's messages and the types of this program.

use std::time::{Duration, UNIX_EPOCH};

use pageferry_api as schema;
use pageferry_proto::id::NodeName;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::status::{Parts, Phase};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::migration::progress::{Progress, Waited};
use crate::migration::refusals::Refusal;

pub(super) fn status(node: &NodeName, progress: &Progress) -> schema::Status {
    let status = &progress.status;
    let counted = |count: u64| (!progress.recovered).then_some(count);
    let sent = |count: u64| counted(count).filter(|_| status.role == Side::Source);
    schema::Status {
        id: status.id.to_string(),
        generation: status.generation,
        workload: status
            .workload
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        role: side(status.role).into(),
        phase: status.phase.name().to_owned(),
        r#final: status.phase.is_final(),
        moved: status.phase == Phase::Done,
        peer: status.peer.to_string(),
        node: node.to_string(),
        round: status.round.map_or(0, |round| round.number()),
        memory_bytes: counted(status.memory_bytes),
        sent_bytes: sent(status.sent_bytes),
        wire_bytes: sent(status.wire_bytes),
        dirty_pages_per_second: status.dirty_pages_per_second,
        predicted_downtime_us: status.predicted_downtime.map(micros),
        downtime_us: status.parts.downtime().map(micros),
        parts: Some(parts(&status.parts)),
        frozen_us: progress.frozen.map(micros),
        synced_us: progress.synced.map(micros),
        pauses: sent(progress.pauses.into()).map(|_| progress.pauses),
        longest_pause_us: progress.longest_pause.map(micros),
        elapsed_us: counted(micros(status.elapsed)),
        failure: status.failure.as_ref().map(failure),
        fence_wanted: status.fence_wanted,
        final_pages: progress.final_pages,
        successor: progress
            .successor
            .map(|id| id.to_string())
            .unwrap_or_default(),
        pid_at_target: progress.pid_at_target,
        unsettled: status.unsettled,
        retries: status.retries,
        frozen_max_us: status.frozen_max.map(micros),
        holding: status.holding,
        waiting: progress.waiting,
        notes: progress.notes.clone(),
        drains: status.drains,
        followed_bytes: progress.followed.map(|pages| pages.bytes()),
        mode: progress.mode.map(|mode| mode.to_string()),
        waited: progress.waited.map(waited),
        missing_bytes: progress.missing.map(|pages| pages.bytes()),
    }
}

pub(super) fn refused(refusal: &Refusal) -> schema::Refusal {
    let since = refusal.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    schema::Refusal {
        at_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        workload: refusal.workload.to_string(),
        to: refusal.target.to_string(),
        failure: Some(failure(&refusal.failure)),
    }
}

/// A failure as a gRPC status: its message is `code: text`.
pub(super) fn refusal(failure: &Failure) -> tonic::Status {
    let message = failure.to_string();
    match failure.code() {
        ErrorCode::MigrationUnknown | ErrorCode::WorkloadGone => tonic::Status::not_found(message),
        ErrorCode::PeerUnknown => tonic::Status::invalid_argument(message),
        ErrorCode::Limit | ErrorCode::TargetBusy => tonic::Status::resource_exhausted(message),
        ErrorCode::Internal | ErrorCode::JournalFailed => tonic::Status::internal(message),
        _ => tonic::Status::failed_precondition(message),
    }
}

fn parts(parts: &Parts) -> schema::Parts {
    schema::Parts {
        freeze_us: parts.freeze.map(micros),
        final_round_us: parts.final_round.map(micros),
        restore_us: parts.restore.map(micros),
        commit_us: parts.commit.map(micros),
        handoff_us: parts.handoff.map(micros),
    }
}

fn waited(waited: Waited) -> schema::Waited {
    schema::Waited {
        faults: waited.faults,
        p50_us: waited.p50_us,
        p99_us: waited.p99_us,
        max_us: waited.max_us,
    }
}

fn failure(failure: &Failure) -> schema::Failure {
    schema::Failure {
        code: failure.code().to_string(),
        text: failure.text().to_owned(),
    }
}

fn side(side: Side) -> schema::Side {
    match side {
        Side::Source => schema::Side::Source,
        Side::Target => schema::Side::Target,
    }
}

/// The side that a request names; unspecified is none.
pub(super) fn named_side(number: i32) -> Option<Side> {
    match schema::Side::try_from(number) {
        Ok(schema::Side::Source) => Some(Side::Source),
        Ok(schema::Side::Target) => Some(Side::Target),
        Ok(schema::Side::Unspecified) | Err(_) => None,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
