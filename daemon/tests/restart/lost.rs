//! A target whose workload is gone, or was told to run before the restart: what its source hears,
//! and that it comes to an end.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry::migration::progress::Progress;
use pageferry::migration::registry::Registry;
use pageferry::migration::target::folders::Folders;
use pageferry::migration::target::own::Own;
use pageferry::migration::target::site::Site;
use pageferry::net::lanes::{self, Listener};
use pageferry::runtime::rootfs::{Bundle, RootPlace};
use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::handoff::{RESEND, Side};
use pageferry_proto::migration::record::{DriverState, Entry};
use pageferry_proto::migration::status::Phase;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use pageferry_proto::wire::copied::{BundleFolder, CopiedForm, CopiedPath};

use crate::node::{ANY_PORT, DEADLINE, Node, Sleeper, name, status, until};
use crate::{GENERATION, id, ran};

const FILL_REPORT: &str = r#"{"fill_ms":1,"pages":7,"faults":0,"unmapped":0}"#;

/// What was journalled of a workload that was held, and with `running` told to run, in this boot or
/// in another one.
fn held(freezer: &Path, boot: &str, running: bool) -> Vec<Entry> {
    let freezer = freezer.display();
    let state =
        format!(r#"{{"freezer":"{freezer}","network":null,"root_pid":4711,"boot":"{boot}"}}"#);
    let state = DriverState::new(state.into_bytes()).unwrap();
    let mut entries = ran();
    entries.truncate(if running { 3 } else { 2 });
    for entry in &mut entries {
        match entry {
            Entry::Accepted(accepted) => accepted.state = state.clone(),
            Entry::Ready(ready) => ready.state = state.clone(),
            _ => {}
        }
    }
    entries
}

fn this_boot() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    boot.trim_end().to_owned()
}

const ANOTHER_BOOT: &str = "00000000-0000-0000-0000-000000000000";

/// Starts a node with this journal, and answers what its source hears when it says `message`, and
/// says it until it is answered.
async fn ask(node: &Node, of: MigrationId, message: &SourceMessage) -> (Registry, TargetMessage) {
    let nowhere = ANY_PORT.parse().unwrap();
    let here = node.endpoint("b", &[("a", nowhere)]);
    let there = node.endpoint("a", &[("b", here.listen())]);
    let registry = node.start(here.clone()).await;
    let mut listener = Listener::start(here);
    let accepting = registry.clone();
    let accepting = tokio::spawn(async move {
        while let Some(session) = listener.next().await {
            accepting.accept(session).await;
        }
    });
    let asking = async {
        loop {
            // A driver that is just ending drops whoever comes then.
            let Ok(mut session) = lanes::dial(&there, &name("b"), of, 1).await else {
                continue;
            };
            while session.sender.send(message.clone()).await.is_ok() {
                let heard = tokio::time::timeout(RESEND, session.receiver.next()).await;
                match heard {
                    Ok(Ok(Some(heard))) => return heard,
                    Ok(_) => break,
                    Err(_) => {}
                }
            }
        }
    };
    let heard = tokio::time::timeout(DEADLINE, asking).await;
    accepting.abort();
    let _ = accepting.await;
    (registry, heard.expect("the source is answered"))
}

fn go() -> SourceMessage {
    SourceMessage::Go {
        generation: GENERATION,
    }
}

async fn ended(registry: &Registry, of: MigrationId) -> std::sync::Arc<Progress> {
    status(registry, of, |known| known.status.phase.is_final()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_held_when_the_node_went_down_is_refused_before_anybody_asks() {
    let node = Node::new();
    let gone = node.freezer("gone");
    node.write(id(1), &held(gone.path(), ANOTHER_BOOT, false), 0);
    let registry = node.start(node.endpoint("b", &[])).await;
    let known = ended(&registry, id(1)).await;
    assert_eq!(known.status.phase, Phase::Aborted);
    let failure = known.status.failure.clone().unwrap();
    assert_eq!(failure.code(), ErrorCode::FillLost, "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_says_go_gets_back_what_the_target_held_when_it_went_down() {
    let node = Node::new();
    let gone = node.freezer("gone");
    node.write(id(1), &held(gone.path(), ANOTHER_BOOT, false), 0);
    let (_registry, heard) = ask(&node, id(1), &go()).await;
    let TargetMessage::Refused {
        generation,
        failure,
    } = heard
    else {
        panic!("{heard:?}");
    };
    assert_eq!(generation, GENERATION);
    let code = failure.map(|failure| failure.code());
    assert_eq!(code, Some(ErrorCode::FillLost));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_to_run_when_the_node_went_down_is_neither_refused_nor_called_started() {
    let node = Node::new();
    let gone = node.freezer("gone");
    node.write(id(2), &held(gone.path(), ANOTHER_BOOT, true), 0);
    let (registry, heard) = ask(&node, id(2), &go()).await;
    let generation = GENERATION;
    assert_eq!(heard, TargetMessage::Unknown { generation });
    let known = ended(&registry, id(2)).await;
    assert_eq!(known.status.phase, Phase::Aborted);
    let failure = known.status.failure.clone().unwrap();
    assert!(failure.text().contains("restarted"), "{failure}");
    // Also by the next daemon, from its journal.
    drop(registry);
    let folder = node.journal_folder();
    until("its journals are free", || {
        pageferry::migration::journal::Journals::open(&folder).is_ok()
    })
    .await;
    let (_registry, heard) = ask(&node, id(2), &go()).await;
    assert_eq!(heard, TargetMessage::Unknown { generation });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_had_filled_before_it_went_down_has_run() {
    let node = Node::new();
    let gone = node.freezer("gone");
    node.write(id(3), &held(gone.path(), ANOTHER_BOOT, true), 0);
    let folder = node.migration_folder(id(3));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("filled"), FILL_REPORT).unwrap();
    let (_registry, heard) = ask(&node, id(3), &go()).await;
    assert!(matches!(heard, TargetMessage::Started { .. }), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_workload_whose_memory_is_lost_ends_its_migration_when_it_is_killed() {
    let node = Node::new();
    let workload = Sleeper::start();
    let freezer = node.freezer(&id(4).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![workload.pid()])).unwrap();
    freezer.freeze().unwrap();
    node.write(id(4), &held(freezer.path(), &this_boot(), true), 0);
    let folder = node.migration_folder(id(4));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("fill-lost"), "the pager died").unwrap();
    let registry = node.start(node.endpoint("b", &[])).await;
    let known = status(&registry, id(4), |known| known.status.failure.is_some()).await;
    assert_eq!(known.status.phase, Phase::Running);
    assert_eq!(freezer.processes().unwrap(), [workload.pid()]);
    freezer.kill(DEADLINE).unwrap();
    let known = ended(&registry, id(4)).await;
    assert_eq!(known.status.phase, Phase::Aborted);
    until("its folder is gone", || !folder.exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_ends_what_could_not_be_let_go() {
    let node = Node::new();
    let workload = Sleeper::start();
    let freezer = node.freezer(&id(5).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![workload.pid()])).unwrap();
    // Pager and watcher have left nothing, and somebody is there: whether it runs is not known.
    node.write(id(5), &held(freezer.path(), &this_boot(), true), 0);
    let registry = node.start(node.endpoint("b", &[])).await;
    let is_given_up = |known: &Progress| {
        let failure = known.status.failure.as_ref();
        failure.is_some_and(|failure| failure.text().contains("given up"))
    };
    let known = status(&registry, id(5), is_given_up).await;
    assert_eq!(known.status.phase, Phase::Running);
    registry.resolve(id(5), Side::Target).await.unwrap();
    let known = ended(&registry, id(5)).await;
    assert_eq!(known.status.phase, Phase::Aborted);
    assert!(!freezer.exists());
}

/// What proves that it ran is there until that is in the journal.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_between_the_fill_and_its_record_still_knows_of_the_fill() {
    let node = Node::new();
    let gone = node.freezer("gone");
    let entries = held(gone.path(), &this_boot(), true);
    let Entry::Ready(ready) = &entries[1] else {
        panic!("no ready");
    };
    let folder = node.migration_folder(id(6));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("filled"), FILL_REPORT).unwrap();
    let site = Site::recover(node.target(), id(6), &ready.state).await;
    let mut site = site.unwrap();
    site.let_go().await.unwrap();
    site.filled().await.unwrap();
    drop(site);
    let site = Site::recover(node.target(), id(6), &ready.state).await;
    site.unwrap().let_go().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_after_a_lost_fill_still_knows_of_the_loss() {
    let node = Node::new();
    let gone = node.freezer("gone");
    let entries = held(gone.path(), &this_boot(), true);
    let Entry::Ready(ready) = &entries[1] else {
        panic!("no ready");
    };
    let folder = node.migration_folder(id(7));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("fill-lost"), "the pager died").unwrap();
    let site = Site::recover(node.target(), id(7), &ready.state).await;
    site.unwrap().emptied().await;
    assert!(folder.join("fill-lost").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_folder_of_a_workload_that_runs_here_goes_when_the_end_is_on_disk() {
    let node = Node::new();
    let workload = Sleeper::start();
    let freezer = node.freezer(&id(8).to_string());
    freezer.make().unwrap();
    freezer.adopt(|| Ok(vec![workload.pid()])).unwrap();
    node.write(id(8), &held(freezer.path(), &this_boot(), true), 0);
    let folder = node.migration_folder(id(8));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("filled"), FILL_REPORT).unwrap();
    let registry = node.start(node.endpoint("b", &[])).await;
    let known = ended(&registry, id(8)).await;
    assert_eq!(known.status.phase, Phase::Done);
    until("its folder is gone", || !folder.exists()).await;
    assert_eq!(freezer.processes().unwrap(), [workload.pid()]);
}

/// A container that came with its bundle to `bundle`; what is noted of it, and what a runtime that
/// was killed would have left, which goes with what never ran.
fn container(node: &Node, of: MigrationId, bundle: &Path) -> PathBuf {
    let own = CopiedPath {
        path: String::new(),
        form: CopiedForm::Root(BundleFolder {
            mode: 0o755,
            uid: 0,
            gid: 0,
        }),
        entries: 1,
        bytes: 0,
        base: None,
    };
    let place = RootPlace::Bundle(Bundle {
        path: bundle.to_owned(),
        config: b"{}".to_vec(),
        root: "rootfs".into(),
    });
    let folders = Folders::new(node.target().shelf, of);
    let one = Own {
        copied: &[own],
        root: Some(&place),
        are_looked_for: true,
    };
    folders.prepare(&[one]).unwrap();
    let folder = node.migration_folder(of);
    fs::create_dir(&folder).unwrap();
    let left = folder.join("left");
    fs::write(&left, "").unwrap();
    let note = format!(
        r#"{{"leaves":{{"folder":"/gone/web","bound_in":"/gone/web","state":"/gone/web/status",
            "paths":["{}"]}},"made":null,"cgroups":[]}}"#,
        left.display()
    );
    fs::write(folder.join("container.json"), note).unwrap();
    fs::write(folder.join("podman"), "0123").unwrap();
    left
}

async fn recovered(node: &Node, of: MigrationId) -> Site {
    let gone = node.freezer("gone");
    let entries = held(gone.path(), &this_boot(), true);
    let Entry::Ready(ready) = &entries[1] else {
        panic!("no ready");
    };
    let site = Site::recover(node.target(), of, &ready.state).await;
    site.unwrap()
}

fn noted(node: &Node, of: MigrationId) -> bool {
    let state = node.target().shelf.keep().state().to_owned();
    state.join(format!("{of}.coming")).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_container_has_that_runs_is_its_own_when_the_end_is_written() {
    let node = Node::new();
    let root = tempfile::tempdir().unwrap();
    let bundle = root.path().join("web");
    container(&node, id(9), &bundle);
    fs::write(node.migration_folder(id(9)).join("filled"), FILL_REPORT).unwrap();
    let mut site = recovered(&node, id(9)).await;
    site.let_go().await.unwrap();
    assert!(!node.migration_folder(id(9)).join("podman").exists());
    site.filled().await.unwrap();
    assert!(!noted(&node, id(9)));
    node.target().shelf.clean_up(|_| false);
    assert!(bundle.join("rootfs").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_container_has_written_outlives_the_loss_of_its_memory() {
    let node = Node::new();
    let root = tempfile::tempdir().unwrap();
    let bundle = root.path().join("web");
    let left = container(&node, id(10), &bundle);
    let remains = node.migration_folder(id(10)).join("fill-lost");
    fs::write(remains, "the pager died").unwrap();
    let mut site = recovered(&node, id(10)).await;
    site.let_go().await.unwrap_err();
    site.emptied().await;
    assert!(left.exists() && bundle.join("rootfs").exists() && !noted(&node, id(10)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_container_has_stays_when_an_operator_ends_what_could_not_be_let_go() {
    let node = Node::new();
    let root = tempfile::tempdir().unwrap();
    let bundle = root.path().join("web");
    container(&node, id(11), &bundle);
    let mut site = recovered(&node, id(11)).await;
    site.let_go().await.unwrap_err();
    site.discard().await.unwrap();
    assert!(bundle.join("rootfs").exists());
    // Also when nobody knows of it any more.
    node.target().shelf.clean_up(|_| false);
    assert!(bundle.join("rootfs").exists());
    // Of what has never run nothing stays.
    let (other, of) = (root.path().join("other"), id(12));
    let left = container(&node, of, &other);
    let mut site = recovered(&node, of).await;
    site.discard().await.unwrap();
    assert!(!other.exists() && !left.exists() && !noted(&node, of));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_and_is_in_no_journal_keeps_what_its_runtime_has() {
    let node = Node::new();
    let root = tempfile::tempdir().unwrap();
    let left = container(&node, id(13), &root.path().join("web"));
    let elsewhere = root.path().join("left");
    fs::rename(&left, &elsewhere).unwrap();
    let note = node.migration_folder(id(13)).join("container.json");
    let text = fs::read_to_string(&note).unwrap();
    let (from, to) = (left.to_str().unwrap(), elsewhere.to_str().unwrap());
    fs::write(&note, text.replace(from, to)).unwrap();
    fs::write(node.migration_folder(id(13)).join("filled"), FILL_REPORT).unwrap();
    let _registry = node.start(node.endpoint("b", &[])).await;
    assert!(elsewhere.exists() && !node.migration_folder(id(13)).exists());
}
