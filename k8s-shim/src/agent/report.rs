//! What an agent says in a Migration, from what its daemon says. Pure.

use pageferry_api as schema;

use super::daemon::reason;
use super::orders::Known;
use crate::plan::{Report, Why};

/// What an agent knows besides what the daemon says.
#[derive(Clone, Debug, Default)]
pub struct Besides {
    /// There is an address for the new pod of this name.
    pub prepared: Option<String>,
    /// The target's daemon was told of this pod.
    pub expected: Option<String>,
    /// Why the source's daemon did not begin.
    pub refused: Option<Why>,
}

/// What is to be known to decide on the next call.
pub fn known(status: Option<&schema::Status>, besides: &Besides) -> Option<Known> {
    if besides.refused.is_some() {
        return Some(Known {
            refused: true,
            ..Known::default()
        });
    }
    let status = status?;
    Some(Known {
        is_final: status.r#final,
        copying: matches!(status.phase.as_str(), "offered" | "copying"),
        receiving: matches!(status.phase.as_str(), "accepted" | "receiving"),
        fence_wanted: status.fence_wanted,
        expected: besides.expected.clone(),
        refused: false,
    })
}

/// What it says. `given_up`: nothing will begin any more, so that nothing is all there will be.
pub fn report(
    status: Option<&schema::Status>,
    besides: &Besides,
    given_up: bool,
    now: i64,
) -> Report {
    if let Some(why) = &besides.refused {
        return Report {
            at: now,
            phase: "refused".to_owned(),
            is_final: true,
            failure: Some(why.clone()),
            ..Report::default()
        };
    }
    let Some(status) = status else {
        return Report {
            at: now,
            phase: "unknown".to_owned(),
            is_final: given_up,
            prepared: besides.prepared.clone(),
            ..Report::default()
        };
    };
    let failure = status.failure.as_ref();
    let failure = failure.map(|failure| Why::new(&reason(&failure.code), failure.text.clone()));
    Report {
        at: now,
        phase: status.phase.clone(),
        is_final: status.r#final,
        moved: status.moved,
        holding: status.holding,
        waiting: status.waiting,
        prepared: besides.prepared.clone(),
        pod_uid: besides.expected.clone(),
        fence_wanted: status.fence_wanted,
        failure,
        round: i32::try_from(status.round).ok(),
        bytes: status
            .wire_bytes
            .and_then(|bytes| i64::try_from(bytes).ok()),
        eta_seconds: eta(status),
        predicted_downtime_ms: status.predicted_downtime_us.and_then(millis),
        downtime_ms: status.downtime_us.and_then(millis),
    }
}

/// How long the first round will still take, by how fast it has been. Later ones are short.
fn eta(status: &schema::Status) -> Option<i32> {
    let (memory, sent) = (status.memory_bytes?, status.sent_bytes?);
    let elapsed = status.elapsed_us?;
    if status.round != 1 || sent == 0 || memory < sent {
        return None;
    }
    let left = u128::from(memory - sent) * u128::from(elapsed) / u128::from(sent);
    i32::try_from(left / 1_000_000).ok()
}

fn millis(micros: u64) -> Option<i32> {
    i32::try_from(micros.div_ceil(1000)).ok()
}

/// Whether it says only that the workload stands still, or is put together: usually over before
/// anybody has heard of it.
pub fn is_passing(report: &Report) -> bool {
    let passes = [
        "freezing",
        "finishing",
        "prepared",
        "committed",
        "restoring",
        "ready",
    ];
    passes.contains(&report.phase.as_str()) && !report.fence_wanted && report.failure.is_none()
}

/// Whether it says only that what was told to hand over has not begun to yet: as short.
pub fn is_about_to_pass(report: &Report, proceed: bool) -> bool {
    let copies = matches!(report.phase.as_str(), "copying" | "receiving");
    proceed && copies && !report.fence_wanted && report.failure.is_none()
}

/// Whether one says more than figures that another does not.
pub fn is_news(report: &Report, last: &Report) -> bool {
    let plain = |report: &Report| Report {
        at: 0,
        round: None,
        bytes: None,
        eta_seconds: None,
        predicted_downtime_ms: None,
        ..report.clone()
    };
    plain(report) != plain(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_final_and_says_why() {
        let besides = Besides {
            refused: Some(Why::new("HostNetwork", "it is in its node's network")),
            ..Besides::default()
        };
        let said = report(None, &besides, false, 7);
        assert!(said.is_final && !said.moved);
        assert_eq!(
            said.failure.map(|why| why.reason).as_deref(),
            Some("HostNetwork")
        );
        assert!(known(None, &besides).is_some_and(|known| known.refused));
    }

    #[test]
    fn nothing_is_final_only_when_nothing_will_begin() {
        let none = Besides::default();
        assert!(!report(None, &none, false, 7).is_final);
        assert!(report(None, &none, true, 7).is_final);
        assert_eq!(known(None, &none), None);
    }

    #[test]
    fn that_it_stands_still_is_said_at_once_only_if_somebody_must_help() {
        let mut report = Report {
            phase: "prepared".to_owned(),
            ..Report::default()
        };
        assert!(is_passing(&report));
        report.fence_wanted = true;
        assert!(!is_passing(&report));
        for said in ["copying", "done", "aborted", "running", "unknown"] {
            said.clone_into(&mut report.phase);
            report.fence_wanted = false;
            assert!(!is_passing(&report), "{said}");
            let told = is_about_to_pass(&report, true);
            assert_eq!(told, said == "copying", "{said}");
            assert!(!is_about_to_pass(&report, false), "{said}");
        }
    }

    #[test]
    fn figures_alone_are_no_news() {
        let status = schema::Status {
            phase: "copying".to_owned(),
            round: 1,
            memory_bytes: Some(1000),
            sent_bytes: Some(250),
            elapsed_us: Some(2_000_000),
            downtime_us: Some(1),
            ..schema::Status::default()
        };
        let first = report(Some(&status), &Besides::default(), false, 7);
        assert_eq!((first.eta_seconds, first.downtime_ms), (Some(6), Some(1)));
        let later = schema::Status {
            round: 2,
            sent_bytes: Some(500),
            wire_bytes: Some(40),
            ..status.clone()
        };
        let later = report(Some(&later), &Besides::default(), false, 8);
        assert!(!is_news(&later, &first));
        let holding = schema::Status {
            holding: true,
            ..status
        };
        assert!(is_news(
            &report(Some(&holding), &Besides::default(), false, 8),
            &first
        ));
    }
}
