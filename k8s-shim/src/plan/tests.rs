//! What the simulation does not bring about.

use super::*;
use crate::migration::Outcome;

fn seen(step: Step) -> Observed {
    let source = SourcePod {
        node: "node-a".to_owned(),
        ready: true,
        ..SourcePod::default()
    };
    Observed {
        now: 1000,
        held: true,
        record: Record {
            step,
            since: 990,
            started: Some(900),
            source: Some("node-a".to_owned()),
            target: Some("node-b".to_owned()),
            new_name: Some("web-m1".to_owned()),
            proceed: Step::Placing < step,
            ..Record::default()
        },
        source: Some(source),
        source_report: Some(report("copying")),
        target_report: Some(report("receiving")),
        ..Observed::default()
    }
}

fn report(phase: &str) -> Report {
    Report {
        at: 995,
        phase: phase.to_owned(),
        ..Report::default()
    }
}

fn with_new(step: Step, adoption: Adoption) -> Observed {
    let mut seen = seen(step);
    seen.record.new_uid = Some("new".to_owned());
    seen.new = Some(NewPod {
        uid: "new".to_owned(),
        ours: true,
        node: Some("node-b".to_owned()),
        running: true,
        ready: true,
        restored: true,
        adoption,
        ..NewPod::default()
    });
    seen
}

fn blocked(seen: &Observed) -> Option<Why> {
    plan(seen).record.and_then(|record| record.blocked)
}

fn why(seen: &Observed) -> (Step, String) {
    let record = plan(seen).record.expect("a record");
    let why = record.why.map(|why| why.reason);
    (record.step, why.unwrap_or_default())
}

#[test]
fn a_silent_node_without_an_object_wants_a_person() {
    let mut seen = with_new(Step::Moving, Adoption::Nobody);
    seen.absent = vec![Side::Target];
    assert_eq!(blocked(&seen), None);
    seen.now += 100;
    seen.source_report = Some(Report {
        at: seen.now,
        ..report("committed")
    });
    let why = blocked(&seen).expect("it is blocked");
    assert_eq!(why.reason, "FenceWanted");
    assert!(why.message.contains("pageferry.dev/resolve=target"));
}

#[test]
fn a_source_that_forgot_is_no_silent_agent() {
    for (step, is_final) in [(Step::Moving, false), (Step::Aborting, true)] {
        let mut seen = with_new(step, Adoption::Nobody);
        seen.record.proceed = true;
        seen.source_report = Some(Report {
            is_final,
            ..report("unknown")
        });
        seen.now += 100;
        let why = blocked(&seen).expect("it is blocked");
        assert_eq!(why.reason, "SourceForgot", "{step:?}");
        assert!(why.message.contains("pageferry.dev/resolve=source"));
    }
}

#[test]
fn what_the_target_lost_has_not_moved() {
    let mut seen = with_new(Step::Cleaning, Adoption::Nobody);
    seen.source = None;
    let done = |phase| Report {
        is_final: true,
        moved: phase == "done",
        ..report(phase)
    };
    seen.source_report = Some(done("done"));
    seen.target_report = Some(Report {
        failure: Some(Why::new("PagesLost", "the source went")),
        ..done("aborted")
    });
    let lost = plan(&seen).record.expect("a record");
    assert_eq!(lost.result, Some(Outcome::SucceededWithoutRestore));
    assert_eq!(why(&seen), (Step::Ended, "PagesLost".to_owned()));
    seen.target_report = Some(report("running"));
    seen.record.fenced = Some(Side::Target);
    assert_eq!(why(&seen), (Step::Ended, "TargetLost".to_owned()));
    seen.target_report = Some(done("done"));
    assert_eq!(why(&seen), (Step::Ended, "Moved".to_owned()));
    // Nobody waits for ever without a word.
    seen.record.fenced = None;
    seen.now += 900;
    seen.target_report = Some(Report {
        at: seen.now,
        ..report("running")
    });
    let why = blocked(&seen).expect("it is blocked");
    assert_eq!(why.reason, "CleaningTakesLong");
}

#[test]
fn another_owner_than_the_new_pods_ends_it_before_the_word() {
    let seen = with_new(Step::Placing, Adoption::Moot);
    let changed = (Step::Aborting, "OwnerChanged".to_owned());
    assert_eq!(why(&seen), changed);
    let mut seen = with_new(Step::Placing, Adoption::Nobody);
    assert_eq!(plan(&seen).record, None);
    if let Some(source) = &mut seen.source {
        source.owned = true;
    }
    assert_eq!(why(&seen), changed);
    // After it the new pod is nobody's, and the source goes.
    let seen = with_new(Step::Switching, Adoption::Moot);
    assert_eq!(plan(&seen).actions, [Action::DeleteSource]);
}

#[test]
fn a_new_pod_that_is_not_taken_ends_it() {
    let mut seen = seen(Step::Placing);
    assert!(matches!(
        plan(&seen).actions[..],
        [Action::CreatePod { .. }]
    ));
    let refused = new_pod_refused(&seen, "exceeded quota: few").expect("a record");
    assert_eq!(refused.step, Step::Aborting);
    let said = refused.why.expect("why");
    assert_eq!(said.reason, "NewPodRefused");
    assert!(said.message.contains("exceeded quota"));
    // One that only fails is not tried for ever.
    seen.now = seen.record.since + seen.timeouts.place;
    seen.record.started = Some(seen.now);
    assert_eq!(why(&seen), (Step::Aborting, "NewPodTimedOut".to_owned()));
    seen.record.step = Step::Moving;
    assert_eq!(new_pod_refused(&seen, "late"), None);
}

#[test]
fn a_pod_that_stays_is_evicted_by_nobody() {
    let mut seen = seen(Step::Ended);
    seen.held = false;
    seen.record.result = Some(Outcome::Failed);
    assert_eq!(plan(&seen).actions, []);
    if let Some(source) = &mut seen.source {
        source.evicting = true;
    }
    assert_eq!(plan(&seen).actions, [Action::EndEviction]);
    seen.record.result = Some(Outcome::Succeeded);
    assert_eq!(plan(&seen).actions, []);
}

#[test]
fn a_freeze_that_probes_cut_short_says_so() {
    let probe = "the liveness probe of container web has the kubelet end it after 1 s";
    for (reason, said) in [("FrozenTooLong", true), ("CriuFailed", false)] {
        let mut seen = with_new(Step::Moving, Adoption::Nobody);
        seen.eager = Some(probe.to_owned());
        seen.source_report = Some(Report {
            is_final: true,
            failure: Some(Why::new(reason, "the freeze was given up after 0.8 s")),
            ..report("aborted")
        });
        let record = plan(&seen).record.expect("a record");
        let why = record.why.expect("why");
        assert_eq!((record.step, &*why.reason), (Step::Aborting, reason));
        assert!(
            why.message.starts_with("the freeze was given up"),
            "{why:?}"
        );
        assert_eq!(why.message.contains(probe), said, "{why:?}");
    }
}
