//! What the start of a daemon makes of its journals, and of what another one has left.
//!
//! Needs root: freezer cgroups and pagers are real.

#![allow(clippy::unwrap_used)]

mod anew;
#[path = "../common/built.rs"]
mod built;
#[path = "../../src/runtime/shared/tests/fuse.rs"]
#[allow(dead_code)]
mod fuse;
mod lost;
mod node;
mod repeated;

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use built::pager;
use fuse::{Fuse, Silent};
use node::{ANY_PORT, DEADLINE, Node, Sleeper, has_pager, name, status, until};
use pageferry::migration::journal::FINISHED_MAX;
use pageferry::migration::registry::MigrateRequest;
use pageferry::migration::source::site::Asked;
use pageferry::net::lanes::{self, Listener};
use pageferry_pager::client::{PagerClient, Spawn};
use pageferry_proto::id::{Generation, Incarnation, MigrationId, WorkloadName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::{
    AcceptedEntry, DriverState, Entry, OfferedEntry, ReadyEntry,
};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use pageferry_sys::{ptrace, task};

const GENERATION: Generation = Generation::FIRST;

fn id(number: u8) -> MigrationId {
    MigrationId::new([number; 16])
}

/// A workload that came from node `a`, and runs.
fn ran() -> Vec<Entry> {
    let state = br#"{"freezer":"/gone","network":null,"root_pid":4711,"boot":"another"}"#;
    let state = DriverState::new(state.to_vec()).unwrap();
    let incarnation = Incarnation(1);
    vec![
        Entry::Accepted(AcceptedEntry {
            workload: WorkloadName::Process(7),
            peer: name("a"),
            incarnation,
            state: state.clone(),
        }),
        Entry::Ready(ReadyEntry {
            generation: GENERATION,
            incarnation,
            drains: false,
            state,
        }),
        Entry::Running {
            generation: GENERATION,
        },
        Entry::Done,
    ]
}

/// A node to which one more workload has come than is remembered whole; the first one is 0.
async fn crowded() -> Node {
    let node = Node::new();
    for number in 0..=u8::try_from(FINISHED_MAX).unwrap() {
        node.write(id(number), &ran(), 1000 - u64::from(number));
    }
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_asks_late_is_answered_and_what_it_settles_is_forgotten() {
    let node = crowded().await;
    let nowhere = ANY_PORT.parse().unwrap();
    let here = node.endpoint("b", &[("a", nowhere)]);
    let there = node.endpoint("a", &[("b", here.listen())]);
    let registry = node.start(here.clone()).await;
    until("the oldest is kept as an answer", || {
        registry.answers_kept() == 1
    })
    .await;
    assert!(!registry.list().iter().any(|known| known.status.id == id(0)));
    assert_eq!(registry.list_answers()[0].status.id, id(0));

    let mut listener = Listener::start(here);
    let accepting = registry.clone();
    tokio::spawn(async move {
        while let Some(session) = listener.next().await {
            accepting.accept(session).await;
        }
    });
    let peer = name("b");
    let mut session = lanes::dial(&there, &peer, id(0), 1).await.unwrap();
    let generation = GENERATION;
    session
        .sender
        .send(SourceMessage::Go { generation })
        .await
        .unwrap();
    let answer = tokio::time::timeout(DEADLINE, session.receiver.next()).await;
    let started = TargetMessage::Started {
        generation,
        root_pid: Some(4711),
    };
    assert_eq!(answer.unwrap().unwrap(), Some(started));
    // The connection was lost, and the answer with it.
    drop(session);
    let mut session = lanes::dial(&there, &peer, id(0), 1).await.unwrap();
    session
        .sender
        .send(SourceMessage::Go { generation })
        .await
        .unwrap();
    let answer = tokio::time::timeout(DEADLINE, session.receiver.next()).await;
    assert!(matches!(
        answer.unwrap().unwrap(),
        Some(TargetMessage::Started { .. })
    ));
    assert_eq!(registry.answers_kept(), 1);
    session
        .sender
        .send(SourceMessage::Settled { generation })
        .await
        .unwrap();
    let answer = tokio::time::timeout(DEADLINE, session.receiver.next()).await;
    assert_eq!(
        answer.unwrap().unwrap(),
        Some(TargetMessage::Forgotten { generation })
    );
    session.lanes.close(ErrorCode::Finished);
    until("it is forgotten", || registry.answers_kept() == 0).await;
    let kept = node.journal_folder().join(format!("{}.answer", id(0)));
    assert!(!kept.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_gets_no_answer_that_is_kept_for_the_source() {
    let node = crowded().await;
    let nowhere = ANY_PORT.parse().unwrap();
    let here = node.endpoint("b", &[("a", nowhere), ("c", nowhere)]);
    let stranger = node.endpoint("c", &[("b", here.listen())]);
    let registry = node.start(here.clone()).await;
    until("the oldest is kept as an answer", || {
        registry.answers_kept() == 1
    })
    .await;
    let mut listener = Listener::start(here);
    let peer = name("b");
    let dialled = lanes::dial(&stranger, &peer, id(0), 1);
    let (dialled, session) = tokio::join!(dialled, listener.next());
    registry.accept(session.unwrap()).await;
    let session = dialled.unwrap();
    let code = tokio::time::timeout(DEADLINE, session.lanes.lost()).await;
    assert_eq!(code.unwrap(), ErrorCode::MigrationUnknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_is_sure_has_an_answer_forgotten() {
    let node = crowded().await;
    let registry = node.start(node.endpoint("b", &[])).await;
    until("the oldest is kept as an answer", || {
        registry.answers_kept() == 1
    })
    .await;
    let refused = registry.forget(id(0), false).await.unwrap_err();
    assert!(refused.text().contains("runs twice"), "{refused}");
    assert_eq!(registry.answers_kept(), 1);
    registry.forget(id(0), true).await.unwrap();
    assert_eq!(registry.answers_kept(), 0);
    let unknown = registry.forget(id(0), true).await.unwrap_err();
    assert_eq!(unknown.code(), ErrorCode::MigrationUnknown);
    // One that is remembered whole can be forgotten too.
    until("its driver has ended", || {
        registry.list().len() == FINISHED_MAX
    })
    .await;
    registry.forget(id(1), true).await.unwrap();
    assert_eq!(registry.list().len(), FINISHED_MAX - 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_outlast_restarts() {
    let node = crowded().await;
    let registry = node.start(node.endpoint("b", &[])).await;
    until("the oldest is kept as an answer", || {
        registry.answers_kept() == 1
    })
    .await;
    drop(registry);
    let folder = node.journal_folder();
    until("its journals are free", || {
        pageferry::migration::journal::Journals::open(&folder).is_ok()
    })
    .await;
    let registry = node.start(node.endpoint("b", &[])).await;
    assert_eq!(registry.answers_kept(), 1);
    let known = registry.watch(id(0)).unwrap();
    assert!(known.borrow().status.unsettled && known.borrow().recovered);
}

/// The journal of a source of which nothing was decided.
fn offered(root: i32, started: u64, freezer: &Path) -> Vec<Entry> {
    offered_with(root, started, freezer, None)
}

/// The same, with a marker on shared storage.
fn offered_with(root: i32, started: u64, freezer: &Path, marker: Option<&Path>) -> Vec<Entry> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let written = |path: &Path| format!(r#"{{"path":"{}","owner":null}}"#, path.display());
    let state = format!(
        r#"{{"kind":{{"process":{{"root":{root},"origin":null}}}},"started":{started},"boot":"{}",
            "freezer":"{}","ports":[],"markers":[{}],
            "asked":{{"shared":[],"force_cpu":false,"force_ipc":false,"network":null,
            "instead_of":null}}}}"#,
        boot.trim_end(),
        freezer.display(),
        marker.map(written).unwrap_or_default()
    );
    vec![Entry::Offered(OfferedEntry {
        workload: WorkloadName::Process(root),
        peer: name("a"),
        policy: Policy::DEFAULT,
        hold: false,
        state: DriverState::new(state.into_bytes()).unwrap(),
    })]
}

/// A thread that traces process `pid` until this is dropped.
struct Tracing(Option<mpsc::Sender<()>>, Option<JoinHandle<()>>);

impl Tracing {
    fn begin(pid: i32) -> Self {
        let (seized, ready) = mpsc::channel();
        let (done, finish) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            ptrace::seize(pid).unwrap();
            seized.send(()).unwrap();
            let _ = finish.recv();
        });
        ready.recv().unwrap();
        Self(Some(done), Some(thread))
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        drop(self.0.take());
        let _ = self.1.take().unwrap().join();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_got_the_pid_of_the_root_is_nothing_to_a_restarted_source() {
    let node = Node::new();
    let (left, other) = (Sleeper::start(), Sleeper::start());
    let freezer = node.freezer(&id(1).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![left.pid()])).unwrap();
    freezer.freeze().unwrap();
    // The other process has the number that the root had, and somebody traces it.
    node.write(id(1), &offered(other.pid(), 1, freezer.path()), 0);
    let tracing = Tracing::begin(other.pid());
    let nowhere = ANY_PORT.parse().unwrap();
    let registry = node.start(node.endpoint("b", &[("a", nowhere)])).await;
    let begun = std::time::Instant::now();
    until("what is left of the tree is thawed", || {
        !freezer.is_frozen().unwrap()
    })
    .await;
    let ended = status(&registry, id(1), |known| known.status.phase.is_final()).await;
    assert_eq!(ended.status.phase, Phase::Aborted);
    let failure = ended.status.failure.clone().unwrap();
    assert_eq!(
        failure.code(),
        ErrorCode::Restarted,
        "{failure}, {:?}",
        begun.elapsed()
    );
    // What was counted before the restart is not known.
    assert!(ended.recovered);
    drop(tracing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_debugger_that_stays_attached_does_not_keep_a_frozen_tree_frozen() {
    let node = Node::new();
    let root = Sleeper::start();
    let freezer = node.freezer(&id(1).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![root.pid()])).unwrap();
    freezer.freeze().unwrap();
    let started = task::start_time(root.pid()).unwrap();
    node.write(id(1), &offered(root.pid(), started, freezer.path()), 0);
    let tracing = Tracing::begin(root.pid());
    let nowhere = ANY_PORT.parse().unwrap();
    let registry = node.start(node.endpoint("b", &[("a", nowhere)])).await;
    until("the tree is thawed", || !freezer.is_frozen().unwrap()).await;
    let ended = status(&registry, id(1), |known| known.status.phase.is_final()).await;
    assert_eq!(ended.status.phase, Phase::Aborted);
    assert!(
        task::tracer(root.pid()).is_some(),
        "it is attached all the time"
    );
    drop(tracing);
}

/// Storage with the marker of a daemon that was killed, and a workload that it left frozen.
#[tokio::test(flavor = "multi_thread")]
async fn storage_that_does_not_answer_holds_up_no_restart() {
    let node = Node::new();
    let shared = tempfile::tempdir().unwrap();
    let fuse = Fuse::mount(shared.path());
    let root = Sleeper::start();
    let freezer = node.freezer(&id(1).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![root.pid()])).unwrap();
    freezer.freeze().unwrap();
    let (started, marker) = (task::start_time(root.pid()).unwrap(), fuse.path.join("one"));
    fs::write(&marker, "").unwrap();
    let entries = offered_with(root.pid(), started, freezer.path(), Some(&marker));
    node.write(id(1), &entries, 0);
    // What is over asks for nothing.
    let other = fuse.path.join("two");
    fs::write(&other, "").unwrap();
    let mut over = offered_with(root.pid(), started, Path::new("/gone"), Some(&other));
    over.extend([
        Entry::Commit {
            generation: GENERATION,
            drains: false,
        },
        Entry::Started {
            generation: GENERATION,
        },
        Entry::Done,
    ]);
    node.write(id(2), &over, 0);
    let silent = Silent::begin(&fuse);
    let nowhere = ANY_PORT.parse().unwrap();
    let starting = {
        let endpoint = node.endpoint("b", &[("a", nowhere)]);
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            let (node, handle) = (&node, tokio::runtime::Handle::current());
            scope.spawn(move || tell.send(handle.block_on(node.start(endpoint))));
            let started = told.recv_timeout(DEADLINE / 2);
            if started.is_err() {
                fuse.release();
            }
            started
        })
    };
    let registry = starting.expect("it starts while the storage does not answer");
    until("the tree is thawed", || !freezer.is_frozen().unwrap()).await;
    let ended = status(&registry, id(1), |known| known.status.phase.is_final()).await;
    assert_eq!(ended.status.phase, Phase::Aborted);
    drop(silent);
    assert!(fuse.state().files.contains_key("two"));
}

/// A pager that holds nothing, in a folder made for it.
async fn idle_pager(folder: &Path, id: MigrationId) -> PagerClient {
    fs::create_dir(folder).unwrap();
    let spawn = Spawn {
        program: pager(),
        directory: folder.to_owned(),
        id,
        cgroup_procs: Vec::new(),
        watcher_cgroup_procs: Vec::new(),
    };
    let (client, _notices) = PagerClient::spawn(&spawn).await.unwrap();
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_left_of_an_unrecorded_beginning_is_removed() {
    let node = Node::new();
    let folder = node.migration_folder(id(2));
    let client = idle_pager(&folder, id(2)).await;
    // Its daemon is killed.
    drop(client);
    let empty = node.freezer(&id(2).to_string());
    empty.make().unwrap();
    // This one runs a workload that came long ago.
    let workload = Sleeper::start();
    let runs = node.freezer(&id(3).to_string());
    runs.make().unwrap();
    runs.adopt(|| Ok(vec![workload.pid()])).unwrap();
    // And this one is what it is.
    let foreign = node.freezer("by-hand");
    foreign.make().unwrap();
    let _registry = node.start(node.endpoint("b", &[])).await;
    assert!(!folder.exists() && !empty.exists());
    until("the pager has ended", || !has_pager(&folder)).await;
    assert_eq!(runs.processes().unwrap(), [workload.pid()]);
    assert!(foreign.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_migration_of_the_journal_has_is_left_alone() {
    let node = Node::new();
    node.write(id(4), &ran()[..3], 0);
    let folder = node.migration_folder(id(4));
    let client = idle_pager(&folder, id(4)).await;
    client.close();
    drop(client);
    let _registry = node.start(node.endpoint("b", &[])).await;
    assert!(folder.exists());
    // The test's own pager, which nobody has told to end.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(node::pager_of(&folder)),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_attempt_is_remembered_and_a_workload_that_moved_is_found() {
    let node = Node::new();
    let gone = i32::MAX;
    let state = DriverState::new(b"".to_vec()).unwrap();
    let moved = vec![
        Entry::Offered(OfferedEntry {
            workload: WorkloadName::Process(gone),
            peer: name("a"),
            policy: Policy::DEFAULT,
            hold: false,
            state: match &offered(gone, 1, Path::new("/gone"))[0] {
                Entry::Offered(offered) => offered.state.clone(),
                _ => state,
            },
        }),
        Entry::Commit {
            generation: GENERATION,
            drains: false,
        },
        Entry::Started {
            generation: GENERATION,
        },
        Entry::Done,
    ];
    node.write(id(5), &moved, 0);
    let nowhere = ANY_PORT.parse().unwrap();
    let registry = node.start(node.endpoint("b", &[("a", nowhere)])).await;
    let request = |pid| MigrateRequest {
        id: None,
        workload: WorkloadName::Process(pid),
        target: name("a"),
        policy: Policy::DEFAULT,
        hold: false,
        asked: Asked::default(),
    };
    let failure: Failure = registry.migrate(request(gone)).await.unwrap_err();
    assert_eq!(failure.code(), ErrorCode::WorkloadGone);
    assert!(failure.text().contains("has moved to node a"), "{failure}");
    let refusals = registry.list_refusals();
    assert_eq!(refusals.len(), 1);
    assert_eq!(refusals[0].failure, failure);
    let never = registry.migrate(request(gone - 1)).await.unwrap_err();
    assert_eq!(never.text().matches("process").count(), 1, "{never}");
}
