//! A node whose daemon is only its registry, with a journal that a test has written.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pageferry::cli::ca;
use pageferry::link::hold::Holds;
use pageferry::link::park::Means;
use pageferry::migration::journal::Journals;
use pageferry::migration::progress::Progress;
use pageferry::migration::registry::{Registry, RegistryParts};
use pageferry::migration::source::site::SourceNode;
use pageferry::migration::target::admission::Ledger;
use pageferry::migration::target::folders::Shelf;
use pageferry::migration::target::site::TargetNode;
use pageferry::net::endpoint::{Endpoint, EndpointConfig};
use pageferry::net::tls::{Credentials, TlsFiles};
use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_pages::track::Support;
use pageferry_proto::id::{MigrationId, NodeName};
use pageferry_proto::migration::record::{Entry, Record};
use tempfile::TempDir;

use crate::built::pager;

/// Nothing takes this long; whatever does has failed.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub const ANY_PORT: &str = "127.0.0.1:0";

/// Node `b`, and the authority that it shares with others.
pub struct Node {
    folder: TempDir,
    freezers: FreezerRoot,
    cgroup: PathBuf,
}

pub fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

pub fn pid_of(child: &Child) -> i32 {
    child.id().try_into().unwrap()
}

impl Node {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::Builder::new().prefix("pfr").tempdir().unwrap();
        ca::init(&folder.path().join("ca"), false).unwrap();
        fs::create_dir(folder.path().join("migrations")).unwrap();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = format!("restart-test-{}-{count}", std::process::id());
        let root = FreezerRoot::detect().unwrap();
        let cgroup = root.plan(&own).path().to_owned();
        let freezers = root.within(&own);
        fs::create_dir_all(&cgroup).unwrap();
        Self {
            folder,
            freezers,
            cgroup,
        }
    }

    pub fn journal_folder(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    pub fn migration_folder(&self, id: MigrationId) -> PathBuf {
        self.folder.path().join("migrations").join(id.to_string())
    }

    /// Writes a journal, last written to `age` seconds ago.
    pub fn write(&self, id: MigrationId, entries: &[Entry], age: u64) {
        let journals = Journals::open(&self.journal_folder()).unwrap();
        let mut journal = journals.create(id).unwrap();
        for entry in entries {
            let record = Record {
                migration: id,
                entry: entry.clone(),
            };
            journal.append(&record.to_bytes()).unwrap();
        }
        let then = std::time::SystemTime::now() - Duration::from_secs(age);
        fs::File::open(self.journal_folder().join(format!("{id}.journal")))
            .unwrap()
            .set_modified(then)
            .unwrap();
    }

    pub fn freezer(&self, name: &str) -> Freezer {
        self.freezers.plan(name)
    }

    pub fn endpoint(&self, node: &str, peers: &[(&str, SocketAddr)]) -> Arc<Endpoint> {
        let issued = ca::issue(&self.folder.path().join("ca"), &name(node), true).unwrap();
        let files = TlsFiles {
            authority: issued.authority,
            certificate: issued.certificate,
            key: issued.key,
        };
        let peers: BTreeMap<_, _> = peers
            .iter()
            .map(|(peer, address)| (name(peer), *address))
            .collect();
        let endpoint = Endpoint::bind(EndpointConfig {
            listen: ANY_PORT.parse().unwrap(),
            credentials: Credentials::load(&files, &name(node)).unwrap(),
            peers,
        });
        Arc::new(endpoint.unwrap())
    }

    fn shelf(&self) -> Shelf {
        Shelf::new(self.folder.path().join("folders"))
    }

    /// What its targets share.
    pub fn target(&self) -> TargetNode {
        TargetNode {
            criu: "criu".into(),
            view_library: "libcriu_view.so".into(),
            stand_in: "pageferry-criu".into(),
            criu_version: 40201,
            pager: pager(),
            migrations: self.folder.path().join("migrations"),
            freezers: self.freezers.clone(),
            hierarchies: Hierarchies::detect().unwrap(),
            bridge: None,
            holds: Holds::default(),
            memory: Ledger::new(|| Ok(Vec::new())),
            shelf: self.shelf(),
            workers: 1,
            parks: true,
            drains: true,
        }
    }

    /// What a start of the daemon makes of it all.
    pub async fn start(&self, endpoint: Arc<Endpoint>) -> Registry {
        let migrations = self.folder.path().join("migrations");
        let hierarchies = Hierarchies::detect().unwrap();
        let parts = RegistryParts {
            source: SourceNode {
                criu: "criu".into(),
                view_library: "libcriu_view.so".into(),
                stand_in: "pageferry-criu".into(),
                tracer: true,
                criu_version: 40201,
                migrations,
                freezers: self.freezers.clone(),
                hierarchies,
                support: Support::probe().unwrap(),
                workers: 1,
                eager_memory_max: 0,
                keep: self.shelf().keep(),
                parking: Means::Auto,
                postcopy: true,
            },
            target: self.target(),
            endpoint,
            journals: Journals::open(&self.journal_folder()).unwrap(),
            lanes: 1,
            incoming_max: 4,
            outgoing_max: 4,
        };
        Registry::recover(parts).await.unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for (_, freezer) in self.freezers.made() {
            let _ = freezer.kill(DEADLINE);
            let _ = freezer.remove();
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// A process that waits to be killed.
pub struct Sleeper(pub Child);

impl Sleeper {
    pub fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    pub fn pid(&self) -> i32 {
        pid_of(&self.0)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // After a test that failed it may be frozen, and ends with its node, which goes last.
        let patience = Instant::now() + Duration::from_secs(2);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until `holds`.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(DEADLINE, waiting).await;
    waited.unwrap_or_else(|_| panic!("never happened: {what}"));
}

/// Waits until the status of a migration is such.
pub async fn status(
    registry: &Registry,
    id: MigrationId,
    mut is_such: impl FnMut(&Progress) -> bool,
) -> Arc<Progress> {
    let mut watched = registry.watch(id).unwrap();
    let found = watched.wait_for(|progress| is_such(progress));
    let found = tokio::time::timeout(DEADLINE, found).await;
    let found = found.expect("never came to that").expect("it ended before");
    Arc::clone(&found)
}

/// Whether a pager listens in this folder.
pub fn has_pager(folder: &Path) -> bool {
    pageferry_pager::client::PagerClient::connect(folder).is_ok()
}

/// The pid of the pager of this folder.
pub fn pager_of(folder: &Path) -> i32 {
    let wanted = folder.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_it = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("pageferry-pager") && line.contains(wanted)
    };
    pids.find(is_it).expect("a pager")
}
