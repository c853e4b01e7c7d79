//! What becomes of a pod that somebody evicts: it moves, if it was asked for. Pure.
//!
//! The one who evicts is told to ask again as long as the pod is on its way, and finds it gone
//! then. What was not asked for, and what cannot move, is evicted as ever. Absent: whether a pod
//! can move (`eligible.rs`), and where to (`target.rs`).

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::Value;

use crate::migration::{Migration, Outcome};
use crate::names::{BY_EVICTION, EVACUATION, MIGRATION, ON_EVICTION, REQUESTED_BY, daemon_id};
use crate::observe::record;
use crate::plan::{Step, Why};
use crate::policy::{MigrationPolicySpec, OnEviction};
use crate::room::has_ended;

/// A pod that somebody evicts, and what is known of its moves.
#[derive(Debug)]
pub struct Asked<'a> {
    pub pod: &'a Pod,
    /// Those of pods of its name.
    pub migrations: &'a [Migration],
    /// The one that it came by, if that is there still.
    pub came_by: Option<&'a Migration>,
    /// The policy that selects it.
    pub policy: Option<&'a MigrationPolicySpec>,
    /// Seconds of Unix time.
    pub now: i64,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// As if nobody had asked here. With a reason where it was to move.
    Evict(Option<Why>),
    /// It stays for now; whoever evicts asks again.
    Wait(String),
    /// It is to move, if it can.
    Move,
}

/// What becomes of a pod, as far as it is to be said by its moves and by what was asked for.
pub fn answer(asked: &Asked<'_>) -> Answer {
    let pod = asked.pod;
    if pod.metadata.deletion_timestamp.is_some() || has_ended(pod) {
        return Answer::Evict(None);
    }
    let uid = pod.uid().unwrap_or_default();
    let own = || {
        asked
            .migrations
            .iter()
            .filter(|one| one.spec.pod.uid == uid)
    };
    if let Some(open) = own().find(|one| record(one).step != Step::Ended) {
        return Answer::Wait(moving(pod, open));
    }
    if let Some(came_by) = asked.came_by.filter(|one| is_arriving(pod, one)) {
        let text = format!(
            "pod {} arrives by Migration {}, which has not ended yet",
            of(pod),
            came_by.name_any()
        );
        return Answer::Wait(text);
    }
    if !wanted(pod, asked.policy) {
        return Answer::Evict(None);
    }
    let ago = |one: &Migration| asked.now - record(one).ended.unwrap_or(0);
    let ended = |outcome: Outcome, within: i64| {
        own().filter(move |one| record(one).result == Some(outcome) && ago(one) < within)
    };
    if let Some(one) = ended(Outcome::Cancelled, CANCELLED_TIME).next() {
        let text = format!(
            "{EVACUATION} of pod {}, and somebody cancelled Migration {}: it is begun again \
             {CANCELLED_TIME} s after that",
            of(pod),
            one.name_any()
        );
        return Answer::Wait(text);
    }
    let by_eviction = |one: &&Migration| {
        one.annotations().get(REQUESTED_BY).map(String::as_str) == Some(BY_EVICTION)
    };
    let mut failed: Vec<&Migration> = ended(Outcome::Failed, FAILED_TIME)
        .filter(by_eviction)
        .collect();
    failed.sort_by_key(|one| record(one).ended);
    if let Some(last) = failed.last().filter(|_| TRIES_MAX <= failed.len()) {
        let unsaid = || Why::new("Failed", "it does not say why");
        let why = record(last).why.unwrap_or_else(unsaid);
        let text = format!(
            "{} moves failed, the last one as {}: {}",
            failed.len(),
            why.reason,
            why.message
        );
        return Answer::Evict(Some(Why::new("MovesFailed", text)));
    }
    Answer::Move
}

/// What is said when a move was begun, or goes on.
pub fn moving(pod: &Pod, migration: &Migration) -> String {
    let status = migration.status.clone().unwrap_or_default();
    let course = record(migration);
    let target = course.target.as_deref();
    let to = target.map_or_else(String::new, |node| format!(" to node {node}"));
    let why = course.blocked.as_ref();
    let why = why.map_or_else(String::new, |why| {
        format!(": {}: {}", why.reason, why.message)
    });
    let phase = status
        .phase
        .map_or_else(String::new, |phase| format!(", {phase:?}"));
    format!(
        "{EVACUATION} of pod {}{to} by Migration {}{phase}{why}",
        of(pod),
        migration.name_any()
    )
}

fn of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

/// Whether it is the pod of a move that has not ended.
fn is_arriving(pod: &Pod, came_by: &Migration) -> bool {
    let id = daemon_id(&came_by.uid().unwrap_or_default());
    let same = pod.annotations().get(MIGRATION) == Some(&id);
    same && record(came_by).step != Step::Ended
}

fn wanted(pod: &Pod, policy: Option<&MigrationPolicySpec>) -> bool {
    match pod.annotations().get(ON_EVICTION).map(String::as_str) {
        Some("migrate") => true,
        // What nobody understands is nobody's wish.
        Some(_) => false,
        None => policy.is_some_and(|policy| policy.on_eviction == OnEviction::Migrate),
    }
}

/// Whether an eviction, the object of the API, is of this very pod, and is meant.
pub fn is_meant(eviction: &Value, uid: Option<&str>) -> bool {
    let options = &eviction["deleteOptions"];
    let dry = options["dryRun"]
        .as_array()
        .is_some_and(|all| !all.is_empty());
    let wanted = options["preconditions"]["uid"].as_str();
    !dry && wanted.is_none_or(|wanted| Some(wanted) == uid)
}

/// Moves by eviction that have failed in a row, before a pod is evicted after all.
const TRIES_MAX: usize = 3;
/// Those that have failed longer ago say nothing of the next one. In seconds.
const FAILED_TIME: i64 = 1800;
/// How long somebody has his will who has cancelled one. In seconds.
const CANCELLED_TIME: i64 = 60;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(annotations: &Value) -> Pod {
        let object = json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "uid", "annotations": annotations,
            },
            "status": {"phase": "Running"},
        });
        serde_json::from_value(object).expect("a pod")
    }

    fn migration(name: &str, uid: &str, course: &Value) -> Migration {
        let object = json!({
            "apiVersion": "pageferry.dev/v1alpha1", "kind": "Migration",
            "metadata": {
                "name": name, "namespace": "shop", "uid": "a-b",
                "annotations": {REQUESTED_BY: BY_EVICTION},
            },
            "spec": {"pod": {"name": "web", "uid": uid}},
            "status": {"course": course},
        });
        serde_json::from_value(object).expect("a Migration")
    }

    fn asked<'a>(pod: &'a Pod, migrations: &'a [Migration]) -> Asked<'a> {
        Asked {
            pod,
            migrations,
            came_by: None,
            policy: None,
            now: 1000,
        }
    }

    #[test]
    fn only_who_is_asked_to_moves() {
        let plain = pod(&json!({}));
        assert_eq!(answer(&asked(&plain, &[])), Answer::Evict(None));
        let wants = pod(&json!({ON_EVICTION: "migrate"}));
        assert_eq!(answer(&asked(&wants, &[])), Answer::Move);
        let policy: MigrationPolicySpec =
            serde_json::from_value(json!({"onEviction": "Migrate"})).expect("a policy");
        let by_policy = |pod| Asked {
            policy: Some(&policy),
            ..asked(pod, &[])
        };
        assert_eq!(answer(&by_policy(&plain)), Answer::Move);
        // Its own word counts more.
        let not = pod(&json!({ON_EVICTION: "evict"}));
        assert_eq!(answer(&by_policy(&not)), Answer::Evict(None));
        let mut ended = wants.clone();
        ended.status = serde_json::from_value(json!({"phase": "Failed"})).ok();
        assert_eq!(answer(&asked(&ended, &[])), Answer::Evict(None));
    }

    #[test]
    fn what_is_on_its_way_stays_whoever_asked_for_it() {
        let plain = pod(&json!({}));
        let open = [migration(
            "m",
            "uid",
            &json!({"step": "Copying", "target": "node-b"}),
        )];
        let Answer::Wait(text) = answer(&asked(&plain, &open)) else {
            panic!("it is evicted");
        };
        assert!(
            text.starts_with("Eviction triggered evacuation of pod shop/web"),
            "{text}"
        );
        assert!(text.contains("to node node-b by Migration m"), "{text}");
        let other = [migration("m", "another", &json!({"step": "Copying"}))];
        assert_eq!(answer(&asked(&plain, &other)), Answer::Evict(None));
        // The one that comes.
        let comes = pod(&json!({MIGRATION: "ab"}));
        let by = migration("m", "uid", &json!({"step": "Placing"}));
        let arriving = |by| Asked {
            came_by: Some(by),
            ..asked(&comes, &[])
        };
        assert!(matches!(answer(&arriving(&by)), Answer::Wait(_)));
        let by = migration("m", "uid", &json!({"step": "Ended"}));
        assert_eq!(answer(&arriving(&by)), Answer::Evict(None));
    }

    #[test]
    fn a_drain_ends_where_moves_fail() {
        let wants = pod(&json!({ON_EVICTION: "migrate"}));
        let failed = |ended: i64| {
            let why = json!({"reason": "Unschedulable", "message": "no room"});
            migration(
                "m",
                "uid",
                &json!({"step": "Ended", "result": "Failed", "ended": ended, "why": why}),
            )
        };
        let mut all = vec![failed(900), failed(950), failed(-2000)];
        assert_eq!(answer(&asked(&wants, &all)), Answer::Move);
        all.push(failed(990));
        let Answer::Evict(Some(why)) = answer(&asked(&wants, &all)) else {
            panic!("it moves again");
        };
        assert_eq!(why.reason, "MovesFailed");
        assert!(why.message.contains("3 moves failed") && why.message.contains("no room"));
        let cancelled = |ended: i64| {
            let course = json!({"step": "Ended", "result": "Cancelled", "ended": ended});
            [migration("m", "uid", &course)]
        };
        assert!(matches!(
            answer(&asked(&wants, &cancelled(990))),
            Answer::Wait(_)
        ));
        assert_eq!(answer(&asked(&wants, &cancelled(900))), Answer::Move);
    }

    #[test]
    fn a_dry_run_and_another_pods_eviction_mean_nothing() {
        let uid = Some("uid");
        assert!(is_meant(&json!({}), uid));
        assert!(!is_meant(
            &json!({"deleteOptions": {"dryRun": ["All"]}}),
            uid
        ));
        let of = |uid: &str| json!({"deleteOptions": {"preconditions": {"uid": uid}}});
        assert!(is_meant(&of("uid"), uid));
        assert!(!is_meant(&of("other"), uid));
    }
}
