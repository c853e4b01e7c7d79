//! Calls that are repeated under an id that the caller chose.

use std::path::Path;
use std::process::{Command, Stdio};

use pageferry::migration::journal::FINISHED_MAX;
use pageferry::migration::registry::{MigrateRequest, Registry};
use pageferry::migration::source::site::Asked;
use pageferry::net::lanes::{self, LanesError, Listener};
use pageferry_proto::id::{MigrationId, WorkloadName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::{DriverState, Entry};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::node::{ANY_PORT, DEADLINE, Node, Sleeper, name, status, until};
use crate::{GENERATION, id, offered, ran};

/// No process has such a pid.
const GONE: i32 = i32::MAX;

/// The journal of a source whose workload is now at node `a`.
fn moved() -> Vec<Entry> {
    let mut entries = offered(GONE, 1, Path::new("/gone"));
    let generation = GENERATION;
    entries.push(Entry::Commit {
        generation,
        drains: false,
    });
    entries.push(Entry::Started { generation });
    entries.push(Entry::Done);
    entries
}

/// Serves what comes to a node.
fn serve(registry: &Registry, mut listener: Listener) {
    let registry = registry.clone();
    tokio::spawn(async move {
        while let Some(session) = listener.next().await {
            registry.accept(session).await;
        }
    });
}

/// The call that has begun [`moved`].
fn request(id: MigrationId) -> MigrateRequest {
    MigrateRequest {
        id: Some(id),
        workload: WorkloadName::Process(GONE),
        target: name("a"),
        policy: Policy::DEFAULT,
        hold: false,
        asked: Asked::default(),
    }
}

async fn start(node: &Node) -> Registry {
    let nowhere = ANY_PORT.parse().unwrap();
    node.start(node.endpoint("b", &[("a", nowhere)])).await
}

/// Descriptors of two digits are more than what every shell closes.
const SLEEP: &str = r#"
for fd in /proc/$$/fd/*; do
    fd=${fd##*/}
    [ "$fd" -le 2 ] || eval "exec $fd>&-"
done
exec sleep 600"#;

/// A process that a survey finds nothing against: what this test has inherited it has not.
async fn movable() -> Sleeper {
    let mut command = Command::new("setsid");
    command.args(["bash", "-c", SLEEP]).stdin(Stdio::null());
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    let started = Sleeper(command.spawn().unwrap());
    let name = format!("/proc/{}/comm", started.pid());
    let sleeps = || std::fs::read_to_string(&name).is_ok_and(|name| name == "sleep\n");
    until("it sleeps", sleeps).await;
    started
}

/// Such a request under an id that is known is refused, and the text says why.
async fn refused(registry: &Registry, change: impl FnOnce(&mut MigrateRequest), why: &str) {
    let mut other = request(id(5));
    change(&mut other);
    let failure = registry.migrate(other).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::IdTaken, "{failure}");
    assert!(failure.text().contains(why), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_repeated_after_a_restart_tells_of_the_same_end_and_begins_nothing() {
    let node = Node::new();
    node.write(id(5), &moved(), 0);
    node.write(id(6), &ran(), 0);
    let registry = start(&node).await;
    assert_eq!(registry.migrate(request(id(5))).await, Ok(id(5)));
    let known = status(&registry, id(5), |_| true).await;
    assert_eq!(known.status.phase, Phase::Done);
    assert_eq!(registry.list().len(), 2);
    assert_eq!(registry.list_refusals(), []);
    // Without the id it is a call of its own.
    let new = MigrateRequest {
        id: None,
        ..request(id(5))
    };
    let gone = registry.migrate(new).await.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::WorkloadGone);

    let workload = |other: &mut MigrateRequest| other.workload = WorkloadName::Process(1);
    refused(&registry, workload, "with process/2147483647 for process/1").await;
    refused(
        &registry,
        |other| other.target = name("c"),
        "with node a for node c",
    )
    .await;
    let policy = |other: &mut MigrateRequest| other.policy.verify = true;
    refused(&registry, policy, "with another --verify").await;
    let option = |other: &mut MigrateRequest| other.asked.shared = vec!["/data".into()];
    refused(&registry, option, "with another --shared").await;
    refused(
        &registry,
        |other| other.id = Some(id(6)),
        "has come to this node",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_repeated_while_its_migration_is_under_way_begins_no_other() {
    let node = Node::new();
    let registry = start(&node).await;
    let workload = movable().await;
    let request = MigrateRequest {
        workload: WorkloadName::Process(workload.pid()),
        ..request(id(7))
    };
    let both = [
        registry.migrate(request.clone()),
        registry.migrate(request.clone()),
    ];
    for begun in futures_util::future::join_all(both).await {
        assert_eq!(begun, Ok(id(7)));
    }
    assert_eq!(registry.list().len(), 1);
    // There is nobody at the target's address.
    let ended = status(&registry, id(7), |known| known.status.phase.is_final()).await;
    assert_eq!(ended.status.phase, Phase::Aborted);
    assert_eq!(registry.migrate(request).await, Ok(id(7)));
    assert_eq!(registry.list(), [ended]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_a_call_is_known_for_longer_than_it_is_listed() {
    let node = Node::new();
    for number in 0..=u8::try_from(FINISHED_MAX).unwrap() {
        node.write(id(number), &moved(), 1000 - u64::from(number));
    }
    let whole = |number: u8| {
        let file = node
            .journal_folder()
            .join(format!("{}.journal", id(number)));
        file.exists()
    };
    let registry = start(&node).await;
    until("the oldest is not kept whole", || !whole(0)).await;
    until("it is not listed", || registry.list().len() == FINISHED_MAX).await;
    assert_eq!(registry.migrate(request(id(0))).await, Ok(id(0)));
    let known = status(&registry, id(0), |_| true).await;
    assert_eq!(known.status.phase, Phase::Done);
    drop(registry);

    let registry = start(&node).await;
    assert_eq!(registry.migrate(request(id(0))).await, Ok(id(0)));
    let other = MigrateRequest {
        target: name("c"),
        ..request(id(0))
    };
    let failure = registry.migrate(other).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::IdTaken);
    registry.forget(id(0), false).await.unwrap();
    let gone = registry.migrate(request(id(0))).await.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::WorkloadGone);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_in_place_of_a_migration_is_known_after_a_restart() {
    let node = Node::new();
    let mut failed = offered(GONE, 1, Path::new("/gone"));
    let failure = Failure::new(ErrorCode::SmapsDiffer, "it was outdated");
    failed.extend([Entry::Aborted(failure), Entry::Done]);
    node.write(id(8), &failed, 1);
    let mut successor = moved();
    let Entry::Offered(begun) = &mut successor[0] else {
        panic!("{successor:?}");
    };
    let state = String::from_utf8(begun.state.as_bytes().to_vec()).unwrap();
    let instead = format!(r#""instead_of":"{}""#, id(8));
    let state = state.replace(r#""instead_of":null"#, &instead);
    begun.state = DriverState::new(state.into_bytes()).unwrap();
    node.write(id(9), &successor, 0);
    let registry = start(&node).await;
    assert_eq!(registry.migrate(request(id(8))).await, Ok(id(8)));
    let known = status(&registry, id(8), |_| true).await;
    assert_eq!(known.status.phase, Phase::Aborted);
    assert_eq!(known.successor, Some(id(9)));
    let known = status(&registry, id(9), |_| true).await;
    assert_eq!((known.status.phase, known.successor), (Phase::Done, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_whose_id_left_this_node_does_not_come_to_it() {
    let node = Node::new();
    node.write(id(5), &moved(), 0);
    let here = node.endpoint("b", &[("a", ANY_PORT.parse().unwrap())]);
    let there = node.endpoint("a", &[("b", here.listen())]);
    let registry = node.start(here.clone()).await;
    serve(&registry, Listener::start(here));
    let peer = name("b");
    // It closes the lane when it has read the greeting, before or after that is answered.
    let code = match lanes::dial(&there, &peer, id(5), 1).await {
        Err(LanesError::Refused { code, .. }) => Some(code),
        Err(other) => panic!("{other}"),
        Ok(mut session) => {
            let heard = tokio::time::timeout(DEADLINE, session.receiver.next()).await;
            heard.unwrap().unwrap_err().closed_by_peer()
        }
    };
    assert_eq!(code, Some(ErrorCode::IdTaken));
}
