//! Calls that are repeated: whoever chose a migration's id, and does not know whether the call was
//! heard, asks again and changes nothing.
//!
//! Invariant: an id names one migration for as long as anything is known of it, and what was asked
//! for under it is compared whole.

use std::sync::Arc;

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::record::{Entry as Written, OfferedEntry};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::{MigrateRequest, Registry};
use crate::migration::journal::remains::Remains;
use crate::migration::source::site::Asked;

impl Registry {
    /// The migration that `request` has begun already, if it has.
    pub(super) fn repeated(
        &self,
        request: &MigrateRequest,
    ) -> Result<Option<MigrationId>, Failure> {
        let Some(id) = request.id else {
            return Ok(None);
        };
        let known = self.lock().get(&id).cloned();
        let first = match known {
            Some(entry) => match entry.departing {
                Some(departing) => departing.request,
                None => return Err(comes_here(id)),
            },
            None if self.answers().contains(&id) => return Err(comes_here(id)),
            None if self.outcomes().contains(&id) => Arc::new(self.asked_of_outcome(id)?),
            None => return Ok(None),
        };
        match difference(&first, request) {
            None => Ok(Some(id)),
            Some(what) => Err(taken(format!(
                "migration {id} was asked for before, with {what}: an id names one migration"
            ))),
        }
    }

    fn asked_of_outcome(&self, id: MigrationId) -> Result<MigrateRequest, Failure> {
        let records = self.read_kept(Remains::Outcome, id)?;
        match records.first().map(|record| &record.entry) {
            Some(Written::Offered(offered)) => asked(id, offered),
            Some(_) | None => Err(unreadable(id, &"it does not begin with an offer")),
        }
    }
}

/// What was asked for, as its journal says.
pub(super) fn asked(id: MigrationId, offered: &OfferedEntry) -> Result<MigrateRequest, Failure> {
    Ok(MigrateRequest {
        id: Some(id),
        workload: offered.workload.clone(),
        target: offered.peer.clone(),
        policy: offered.policy,
        hold: offered.hold,
        asked: Asked::of(&offered.state).map_err(|error| unreadable(id, &error))?,
    })
}

/// What was different in the first of two requests.
fn difference(first: &MigrateRequest, now: &MigrateRequest) -> Option<String> {
    if first.workload != now.workload {
        return Some(format!("{} for {}", first.workload, now.workload));
    }
    if first.target != now.target {
        return Some(format!("node {} for node {}", first.target, now.target));
    }
    let (policy, other) = (&first.policy, &now.policy);
    let (asked, wanted) = (&first.asked, &now.asked);
    // In whose place it is nobody asks for.
    let same = [
        ("--copy", asked.copied == wanted.copied),
        ("--downtime-max", policy.downtime_max == other.downtime_max),
        ("--force-cpu", asked.force_cpu == wanted.force_cpu),
        ("--force-eager", policy.force_eager == other.force_eager),
        ("--force-ipc", asked.force_ipc == wanted.force_ipc),
        ("--frozen-max", policy.frozen_max == other.frozen_max),
        ("--hold", first.hold == now.hold),
        ("--join-network", asked.network == wanted.network),
        ("--mode", policy.mode == other.mode),
        ("--on-timeout", policy.on_timeout == other.on_timeout),
        ("--rounds-max", policy.rounds_max == other.rounds_max),
        ("--shared", asked.shared == wanted.shared),
        ("--timeout", policy.timeout == other.timeout),
        ("--verify", policy.verify == other.verify),
    ];
    let (flag, _) = same.iter().find(|(_, same)| !same)?;
    Some(format!("another {flag}"))
}

fn comes_here(id: MigrationId) -> Failure {
    taken(format!(
        "migration {id} has come to this node, or is about to: choose another id"
    ))
}

fn taken(text: String) -> Failure {
    Failure::new(ErrorCode::IdTaken, text)
}

fn unreadable(id: MigrationId, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        ErrorCode::JournalFailed,
        format!("the journal of {id} is not readable: {why}"),
    )
}
