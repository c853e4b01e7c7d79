//! The target's driver on the real kernel, with a real connection and a real pager: what a source
//! that gives up ends, whoever hangs. The test is the source; CRIU, or the pager, is one that never
//! answers.
//!
//! Needs root (cgroups).

#![allow(clippy::unwrap_used)]

#[path = "../common/built.rs"]
mod built;
mod locked;
mod silent;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::cli::ca;
use pageferry::link::hold::Holds;
use pageferry::migration::clock::Clock;
use pageferry::migration::journal::Journals;
use pageferry::migration::progress::Progress;
use pageferry::migration::target::admission::Ledger;
use pageferry::migration::target::folders::Shelf;
use pageferry::migration::target::site::{Site, TargetNode};
use pageferry::migration::target::{Over, TargetDriver, TargetParts, TargetRequest};
use pageferry::net::endpoint::{Endpoint, EndpointConfig};
use pageferry::net::lanes::{self, Listener, SourceSession};
use pageferry::net::tls::{Credentials, TlsFiles};
use pageferry::runtime::memory::Room;
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::{Groups, Hierarchies};
use pageferry_proto::id::{Generation, Incarnation, MigrationId, NodeName, Round, WorkloadName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::target::{TargetMachine, TargetOrigin};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Final, Offer, SourceMessage, TargetMessage};
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_proto::wire::needs::{Needs, ResourceLimits};
use pageferry_proto::wire::shared::{LENGTHS_FILE, Marker, SharedPath};
use pageferry_proto::wire::stream::{ImageFileHeader, ImageName, StreamKind, seal};
use pageferry_proto::wire::version::Version;
use silent::Silent;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Nothing takes this long; whatever does has failed.
const DEADLINE: Duration = Duration::from_secs(120);

/// A target whose source is the test.
struct Target {
    folder: TempDir,
    id: MigrationId,
    groups: Groups,
    freezer: PathBuf,
    source: SourceSession,
    driver: Option<JoinHandle<Over>>,
    _endpoints: (Endpoint, Listener),
    _requests: mpsc::Sender<TargetRequest>,
}

/// What a node is made of that is not the usual.
struct Parts {
    /// Instead of CRIU.
    criu: &'static str,
    /// Instead of the pager; `$PAGER` is the pager.
    pager: &'static str,
    /// Bytes of memory that are left.
    memory: u64,
}

const NEVER_ANSWERS: &str = "exec sleep 100000";

const USUAL: Parts = Parts {
    criu: NEVER_ANSWERS,
    pager: r#"exec "$PAGER" "$@""#,
    memory: 1 << 40,
};

impl Target {
    async fn start(number: u8, parts: &Parts) -> Self {
        let folder = tempfile::Builder::new().prefix("pft").tempdir().unwrap();
        let id = unique(number);
        let hierarchies = Hierarchies::detect().unwrap();
        let freezers = FreezerRoot::detect().unwrap();
        let (source, accepted, endpoints) = connect(folder.path(), id).await;
        let memory = parts.memory;
        let node = TargetNode {
            criu: script(folder.path(), "criu", parts.criu),
            view_library: "libcriu_view.so".into(),
            stand_in: "pageferry-criu".into(),
            criu_version: 40201,
            pager: script(folder.path(), "pager", parts.pager),
            migrations: folder.path().join("m"),
            freezers: freezers.clone(),
            hierarchies: hierarchies.clone(),
            bridge: None,
            holds: Holds::default(),
            memory: Ledger::new(move || {
                let limit = "this test".to_owned();
                Ok(vec![Room {
                    limit,
                    bytes: memory,
                }])
            }),
            shelf: Shelf::new(folder.path().join("folders")),
            workers: 1,
            parks: true,
            drains: true,
        };
        let journals = Journals::open(&folder.path().join("journal")).unwrap();
        let clock = Clock::start();
        let origin = TargetOrigin {
            id,
            peer: node_name("a"),
            incarnation: Incarnation(1),
        };
        let machine = TargetMachine::new(origin, clock.now());
        let (status, _) = watch::channel(Arc::new(Progress::of(machine.status(clock.now()))));
        let (requests, asked) = mpsc::channel(1);
        let driver = TargetDriver::new(TargetParts {
            machine,
            clock,
            site: Site::new(node, id).unwrap(),
            requests: asked,
            status,
            journal: journals.create(id).unwrap(),
            recovered: false,
        });
        Self {
            groups: hierarchies.groups(&id.to_string()),
            freezer: freezers.plan(&id.to_string()).path().to_owned(),
            driver: Some(tokio::spawn(driver.run(Some(Box::new(accepted))))),
            folder,
            id,
            source,
            _endpoints: endpoints,
            _requests: requests,
        }
    }

    async fn say(&mut self, message: SourceMessage) {
        self.source.sender.send(message).await.unwrap();
    }

    async fn hear(&mut self) -> TargetMessage {
        let heard = tokio::time::timeout(DEADLINE, self.source.receiver.next()).await;
        heard
            .expect("the target says something")
            .unwrap()
            .expect("the session lasts")
    }

    async fn offer(&mut self, needs: Needs) {
        self.offer_of(description(needs)).await;
    }

    async fn offer_of(&mut self, description: WorkloadDescription) {
        self.say(SourceMessage::Offer(Box::new(offer(description))))
            .await;
    }

    /// Makes an offer that is declined, and says why. Nothing is left of it.
    async fn declines(&mut self, offer: Offer) -> Failure {
        self.say(SourceMessage::Offer(Box::new(offer))).await;
        let heard = self.hear().await;
        let TargetMessage::Declined(failure) = heard else {
            panic!("{heard:?}");
        };
        self.until(|target| target.left().is_empty()).await;
        failure
    }

    /// Sends the image of a tree of one process.
    async fn send_tree(&self) {
        // The magic numbers of all images and of this one, and one record: its length, and a
        // process 1 of no group and no session with one thread.
        let mut image = [0x5456_4319_u32, 0x5027_3030, 10]
            .map(u32::to_le_bytes)
            .concat();
        image.extend([0x08, 1, 0x10, 0, 0x18, 0, 0x20, 0, 0x28, 1]);
        self.send_image("pstree.img", image).await;
    }

    async fn send_image(&self, name: &str, image: Vec<u8>) {
        let name = ImageName::new(name).unwrap();
        let header = ImageFileHeader::new(Generation::FIRST, name, image.len() as u64);
        let mut body = header.unwrap().encode();
        body.extend(image);
        seal(&mut body);
        let sent = self
            .source
            .data
            .send_stream(StreamKind::ImageFile, body.into());
        sent.await.unwrap();
    }

    async fn abort(&mut self) {
        let generation = Generation::FIRST;
        let failure = Failure::new(ErrorCode::Aborted, "enough");
        self.say(SourceMessage::Abort {
            generation,
            failure,
        })
        .await;
        let heard = self.hear().await;
        assert!(matches!(heard, TargetMessage::Unknown { .. }), "{heard:?}");
    }

    fn directory(&self) -> PathBuf {
        self.folder.path().join("m").join(self.id.to_string())
    }

    /// All that there is of the migration on this node.
    fn left(&self) -> Vec<PathBuf> {
        let Groups {
            tree,
            pager,
            watcher,
        } = &self.groups;
        let groups = [tree, pager, watcher];
        let folders = groups.iter().flat_map(|group| group.folders().to_vec());
        let all = folders.chain([self.freezer.clone(), self.directory()]);
        all.filter(|path| path.exists()).collect()
    }

    async fn until(&self, what: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !what(self) {
            assert!(Instant::now() < deadline, "it does not come about");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.abort();
        }
        let Groups {
            tree,
            pager,
            watcher,
        } = &self.groups;
        // The watcher ends when there is nothing to hold.
        for group in [pager, tree, watcher] {
            group.kill();
            let _ = group.remove(Duration::from_secs(5));
        }
    }
}

/// Not that of another run.
fn unique(number: u8) -> MigrationId {
    let mut bytes = [number; 16];
    bytes[..4].copy_from_slice(&std::process::id().to_le_bytes());
    MigrationId::new(bytes)
}

fn node_name(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    let pager = built::pager();
    let pager = pager.display();
    fs::write(&path, format!("#!/bin/sh\nPAGER={pager}\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A session from a source `a` to a target `b`.
async fn connect(
    folder: &Path,
    id: MigrationId,
) -> (SourceSession, lanes::TargetSession, (Endpoint, Listener)) {
    let authority = folder.join("ca");
    ca::init(&authority, false).unwrap();
    let nowhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let endpoint = |name: &str, peer: &str, address| {
        let issued = ca::issue(&authority, &node_name(name), true).unwrap();
        let files = TlsFiles {
            authority: issued.authority,
            certificate: issued.certificate,
            key: issued.key,
        };
        let peers: BTreeMap<_, _> = [(node_name(peer), address)].into();
        Endpoint::bind(EndpointConfig {
            listen: nowhere,
            credentials: Credentials::load(&files, &node_name(name)).unwrap(),
            peers,
        })
        .unwrap()
    };
    let target = Arc::new(endpoint("b", "a", nowhere));
    let source = endpoint("a", "b", target.listen());
    let mut listener = Listener::start(target);
    let peer = node_name("b");
    let dialled = lanes::dial(&source, &peer, id, 1);
    let (dialled, accepted) = tokio::join!(dialled, listener.next());
    (dialled.unwrap(), accepted.unwrap(), (source, listener))
}

fn offer(description: WorkloadDescription) -> Offer {
    Offer {
        version: Version::CURRENT,
        workload: WorkloadName::Process(1),
        generation: Generation::FIRST,
        policy: Policy::DEFAULT,
        description,
        network: None,
    }
}

fn description(needs: Needs) -> WorkloadDescription {
    WorkloadDescription {
        root_pid: 1,
        spaces: Vec::new(),
        pids: Vec::new(),
        own_namespaces: Namespaces::NONE,
        hostname: String::new(),
        domainname: String::new(),
        links: Vec::new(),
        routes: Vec::new(),
        files: Vec::new(),
        shared: Vec::new(),
        copied: Vec::new(),
        boot_id: [0; 16],
        cpu: None,
        criu_version: 40201,
        page_size: 4096,
        kernel_release: String::new(),
        cwd: "/".to_owned(),
        root: "/".to_owned(),
        mounts: Vec::new(),
        needs,
        container: None,
        members: Vec::new(),
        member_name: String::new(),
    }
}

/// Whether there is a process of this name among `pids`.
fn named(pids: &[i32], name: &str) -> bool {
    let is = |pid: &i32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        comm.is_ok_and(|comm| comm.trim() == name)
    };
    pids.iter().any(is)
}

/// The end of a final round without pages.
fn last(images: u32) -> Final {
    Final {
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
        generation: Generation::FIRST,
        round: Round::FIRST,
        parcels: 0,
        pages: PageCount::ZERO,
        live_sets: 0,
        images,
        digests: 0,
        verify: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_gives_up_ends_a_restore_whose_criu_never_answers() {
    let mut target = Target::start(1, &USUAL).await;
    target.offer(Needs::default()).await;
    let heard = target.hear().await;
    assert!(matches!(heard, TargetMessage::Accepted { .. }), "{heard:?}");
    target.send_tree().await;
    target.say(SourceMessage::Final(last(1))).await;
    let heard = target.hear().await;
    assert!(
        matches!(heard, TargetMessage::FinalHeld { .. }),
        "{heard:?}"
    );
    // CRIU's stand-in is there, and its socket, so the restore has begun.
    let restoring = |target: &Target| target.directory().join("lazy-pages.socket").exists();
    target.until(restoring).await;
    assert!(named(&target.groups.tree.processes(), "sleep"));
    target.abort().await;
    assert_eq!(target.left(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_gives_up_ends_a_preparation_whose_pager_never_answers() {
    let parts = Parts {
        // It is there, and stopped before anybody asks it.
        pager: r#"
            mkfifo "$2/ready"
            "$PAGER" "$@" >"$2/ready" &
            read line <"$2/ready"
            kill -STOP $!
            echo "$line"
            wait"#,
        ..USUAL
    };
    let mut target = Target::start(2, &parts).await;
    target.offer(Needs::default()).await;
    let stopped = |target: &Target| {
        let pids = target.groups.pager.processes();
        pids.iter().any(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(") T ")
        })
    };
    target.until(stopped).await;
    target.abort().await;
    assert_eq!(target.left(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_needs_more_than_is_left_is_declined_with_both_numbers() {
    let parts = Parts {
        memory: 100 << 20,
        ..USUAL
    };
    let mut target = Target::start(3, &parts).await;
    let needs = Needs {
        private_bytes: 100 << 20,
        ..Needs::default()
    };
    let failure = target.declines(offer(description(needs))).await;
    assert_eq!(failure.code(), ErrorCode::MemoryShort);
    let says = |text| failure.text().contains(text);
    assert!(
        says("171.2 MiB") && says("100.0 MiB of this test"),
        "{failure}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_of_which_nothing_is_said_is_declined_by_its_name() {
    let names = [
        "crun/web",
        "runc/web",
        "containerd/default/web",
        "podman/web",
    ];
    for (workload, number) in names.into_iter().zip(40..) {
        let mut target = Target::start(number, &USUAL).await;
        let container = Offer {
            workload: workload.parse().unwrap(),
            ..offer(description(Needs::default()))
        };
        let failure = target.declines(container).await;
        assert_eq!(failure.code(), ErrorCode::UnsupportedWorkload);
        assert!(failure.text().contains("web"), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_not_there_or_not_wanted_is_declined_by_its_name() {
    let joining = |own_namespaces| Offer {
        network: Some("pft-no-such".parse().unwrap()),
        ..offer(WorkloadDescription {
            own_namespaces,
            ..description(Needs::default())
        })
    };
    let mut target = Target::start(7, &USUAL).await;
    let failure = target.declines(joining(Namespaces::NET)).await;
    assert_eq!(failure.code(), ErrorCode::NetworkUnfit);
    assert!(
        failure.text().contains("/run/netns/pft-no-such"),
        "{failure}"
    );
    let mut target = Target::start(8, &USUAL).await;
    let failure = target.declines(joining(Namespaces::NONE)).await;
    assert_eq!(failure.code(), ErrorCode::NetworkUnfit);
    assert!(
        failure.text().contains("no network of its own"),
        "{failure}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_restored_has_the_limits_of_the_source_and_cgroups_of_its_own() {
    let hierarchies = Hierarchies::detect().unwrap();
    let Some(memory) = hierarchies.with("memory") else {
        return;
    };
    let mut target = Target::start(4, &USUAL).await;
    let limits = ResourceLimits {
        memory_max: Some(256 << 20),
        ..ResourceLimits::default()
    };
    target
        .offer(Needs {
            limits,
            ..Needs::default()
        })
        .await;
    let heard = target.hear().await;
    assert!(matches!(heard, TargetMessage::Accepted { .. }), "{heard:?}");
    // CRIU waits already, and the tree will be where it is.
    let criu = target.groups.tree.processes();
    assert_eq!(criu.len(), 1, "{criu:?}");
    let found = pageferry::runtime::limits::read(criu[0], &hierarchies);
    assert_eq!(found.limits, limits);
    let pager = target.groups.pager.processes();
    let watcher = target.groups.watcher.processes();
    let own = i32::try_from(std::process::id()).unwrap();
    let everybody = [&criu[..], &pager, &watcher, &[own]].concat();
    for hierarchy in hierarchies.iter() {
        let folder = hierarchy.ours().join(target.id.to_string());
        if !target.groups.tree.folders().contains(&folder) {
            continue;
        }
        let mut all: Vec<_> = everybody
            .iter()
            .map(|pid| hierarchy.current(*pid).unwrap())
            .collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4, "{all:?}");
    }
    assert!(memory.ours().join(target.id.to_string()).exists());
    target.abort().await;
    assert_eq!(target.left(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_gives_up_ends_a_comparison_whose_storage_never_answers() {
    let storage = Silent::mount();
    let mut target = Target::start(5, &USUAL).await;
    let shared = SharedPath {
        path: storage.path().display().to_string(),
        directory: true,
        file_system: 0x6573_5546,
        inode: 1,
        born_ns: 0,
        changed_ns: 0,
        marker: Some(Marker::new([7; 32])),
    };
    target
        .offer_of(WorkloadDescription {
            shared: vec![shared],
            ..description(Needs::default())
        })
        .await;
    target.until(|_| storage.is_asked()).await;
    target.abort().await;
    assert_eq!(target.left(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_gives_up_ends_a_look_at_lengths_whose_storage_never_answers() {
    let storage = Silent::mount();
    let mut target = Target::start(6, &USUAL).await;
    target.offer(Needs::default()).await;
    let heard = target.hear().await;
    assert!(matches!(heard, TargetMessage::Accepted { .. }), "{heard:?}");
    let path = storage.path().display();
    let lengths = format!(r#"[{{"path":"{path}/log","bytes":7,"appended":true}}]"#);
    target.send_tree().await;
    target.send_image(LENGTHS_FILE, lengths.into_bytes()).await;
    target.say(SourceMessage::Final(last(2))).await;
    let heard = target.hear().await;
    assert!(
        matches!(heard, TargetMessage::FinalHeld { .. }),
        "{heard:?}"
    );
    target.until(|_| storage.is_asked()).await;
    target.abort().await;
    assert_eq!(target.left(), Vec::<PathBuf>::new());
}
