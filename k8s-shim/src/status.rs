//! A Migration's status, from what the controller has written down and what agents say. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::migration::{ContainerStatus, MigrationStatus, Phase};
use crate::plan::{Observed, Record, Report, Step, Why};

/// All that the controller writes of a status: what agents write is left out.
pub fn make(
    record: &Record,
    seen: &Observed,
    before: &MigrationStatus,
    containers: &[String],
    generation: Option<i64>,
) -> MigrationStatus {
    let why = record.blocked.as_ref().or(record.why.as_ref());
    let source = seen.source_report.as_ref();
    let target = seen.target_report.as_ref();
    let phase = phase(record, source, target).max(before.phase.unwrap_or(Phase::Processing));
    let bytes = source.and_then(|report| report.bytes).or(before.bytes);
    let known = before.containers.iter().map(|one| one.name.clone());
    let named: Vec<String> = match containers {
        // Its source is gone.
        [] => known.collect(),
        named => named.to_vec(),
    };
    // Nobody counts them for each.
    let of_one = bytes.filter(|_| named.len() == 1);
    MigrationStatus {
        phase: Some(phase),
        result: record.result,
        reason: why.map(|why| why.reason.clone()),
        message: why.map(|why| why.message.clone()),
        source: record.source.clone(),
        target: record.target.clone(),
        new_pod: record.new_pod(),
        // They move together: each is where the pod is.
        containers: named
            .into_iter()
            .map(|name| ContainerStatus {
                name,
                phase,
                bytes: of_one,
            })
            .collect(),
        round: source.and_then(|report| report.round).or(before.round),
        bytes,
        eta_seconds: source
            .filter(|_| record.step < Step::Moving)
            .and_then(|report| report.eta_seconds),
        predicted_downtime_ms: source
            .and_then(|report| report.predicted_downtime_ms)
            .or(before.predicted_downtime_ms),
        downtime_ms: source
            .and_then(|report| report.downtime_ms)
            .or(before.downtime_ms),
        started_at: record.started.and_then(time),
        ended_at: record.ended.and_then(time),
        observed_generation: generation,
        conditions: vec![blocked(record, seen.now, before)],
        budget: before.budget.clone(),
        course: Some(record.clone()),
        source_report: None,
        target_report: None,
    }
}

fn phase(record: &Record, source: Option<&Report>, target: Option<&Report>) -> Phase {
    let at = |report: Option<&Report>, phases: &[&str]| {
        report.is_some_and(|report| phases.contains(&report.phase.as_str()))
    };
    match record.step {
        Step::Waiting => Phase::Processing,
        Step::Copying | Step::Placing if at(source, &["copying"]) => Phase::Checkpointing,
        Step::Copying => Phase::Processing,
        Step::Placing => Phase::Checkpointing,
        Step::Moving if at(source, &["committed"]) || at(target, &["restoring", "ready"]) => {
            Phase::Restoring
        }
        Step::Moving if at(source, &["finishing", "prepared"]) => Phase::Transferring,
        Step::Moving => Phase::Checkpointing,
        Step::Switching => Phase::Restoring,
        Step::Cleaning | Step::Aborting => Phase::Cleaning,
        Step::Ended => Phase::Done,
    }
}

fn blocked(record: &Record, now: i64, before: &MigrationStatus) -> Condition {
    let free = Why::new("Free", "");
    let (status, why) = match &record.blocked {
        Some(why) => ("True", why),
        None => ("False", &free),
    };
    let last = before.conditions.iter().find(|one| one.type_ == BLOCKED);
    let same = last.filter(|last| last.status == status);
    let since = same.map(|last| last.last_transition_time.clone());
    Condition {
        type_: BLOCKED.to_owned(),
        status: status.to_owned(),
        reason: why.reason.clone(),
        message: why.message.clone(),
        last_transition_time: since
            .or_else(|| time(now))
            .unwrap_or(Time(Timestamp::UNIX_EPOCH)),
        observed_generation: None,
    }
}

fn time(seconds: i64) -> Option<Time> {
    Timestamp::from_second(seconds).ok().map(Time)
}

const BLOCKED: &str = "Blocked";

#[cfg(test)]
mod tests {
    use super::*;

    fn report(phase: &str) -> Option<Report> {
        Some(Report {
            phase: phase.to_owned(),
            ..Report::default()
        })
    }

    fn record_of(step: Step) -> Record {
        Record {
            step,
            ..Record::default()
        }
    }

    #[test]
    fn a_phase_never_goes_back() {
        let mut seen = Observed::default();
        let mut status = MigrationStatus::default();
        let mut phases = Vec::new();
        let names = ["web", "db"].map(str::to_owned);
        for (step, source) in [
            (Step::Waiting, ""),
            (Step::Copying, "copying"),
            (Step::Placing, "offered"),
            (Step::Moving, "finishing"),
            (Step::Moving, "copying"),
            (Step::Moving, "committed"),
            (Step::Cleaning, "done"),
            (Step::Ended, "done"),
        ] {
            let record = record_of(step);
            seen.source_report = report(source);
            status = make(&record, &seen, &status, &names, None);
            phases.extend(status.phase);
        }
        assert!(phases.is_sorted(), "{phases:?}");
        assert_eq!(phases.last(), Some(&Phase::Done));
        assert!(phases.contains(&Phase::Transferring));
        // Its source is gone.
        status = make(&record_of(Step::Ended), &seen, &status, &[], None);
        let last = status.containers.iter().map(|one| (&*one.name, one.phase));
        assert!(last.eq([("web", Phase::Done), ("db", Phase::Done)]));
    }

    #[test]
    fn what_it_is_blocked_on_keeps_its_time() {
        let mut record = Record::default();
        let mut seen = Observed {
            now: 5,
            ..Observed::default()
        };
        record.blocked = Some(Why::new("NodeLimit", "two moves"));
        let first = make(&record, &seen, &MigrationStatus::default(), &[], None);
        seen.now = 9;
        let second = make(&record, &seen, &first, &[], None);
        assert_eq!(second.reason.as_deref(), Some("NodeLimit"));
        assert_eq!(
            second.conditions[0].last_transition_time,
            first.conditions[0].last_transition_time
        );
    }
}
