//! One pager with everything around it: cgroup, directories, stores, the stand-in for CRIU, and the
//! connections of what runs. It takes itself down, also when a test fails.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::{Groups, Hierarchies};
use pageferry_pager::client::{ClientError, Notice, PagerClient, Spawn};
use pageferry_pager::message::{RestoreRequest, Status};
use pageferry_proto::id::{MigrationId, SpaceId};
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::criu::{Fail, Script};
use crate::workload::{Answer, Command, PAGE, Setup, contents};

/// Where the memory of the first workload begins; 1 TiB further that of the next.
pub const FIRST_PAGE: u64 = 0x2000_0000_0000 / PAGE;
pub const NEXT_SPACE: u64 = (1 << 40) / PAGE;
pub const VPID: i32 = 77;

/// Nothing takes this long; whatever does has failed.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub struct Lab {
    pub directory: tempfile::TempDir,
    /// The freezer's of the tree.
    pub cgroup: PathBuf,
    pub groups: Groups,
    pub client: Arc<PagerClient>,
    pub notices: mpsc::UnboundedReceiver<Notice>,
    pub stores: BTreeMap<u32, File>,
    pub pager: i32,
    /// `go` is not answered before "finished" was said.
    pub going: Option<JoinHandle<Result<(), ClientError>>>,
    listener: UnixListener,
    waiting: BTreeMap<String, Peer>,
}

/// A connection to something that was started: a workload, its child, or the stand-in for CRIU.
pub struct Peer {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

/// What is to be restored.
#[derive(Clone)]
pub struct Tree {
    /// Pages of each space.
    pub spaces: Vec<u64>,
    /// Offsets of pages that each reads before it may run.
    pub early: Vec<u64>,
    /// Offsets of the first page, and how many from there, of pages of the first space that are not
    /// in its store yet.
    pub absent: Vec<(u64, u64)>,
    /// "Finished" is said only when the test says so.
    pub finish_by_hand: bool,
    /// The stand-in for CRIU looks whether its loopback is shut, and open when it is answered.
    pub probes_loopback: bool,
    pub fail: Fail,
}

impl Tree {
    pub fn of(pages: u64) -> Self {
        let fail = Fail::Never;
        Self {
            spaces: vec![pages],
            early: Vec::new(),
            absent: Vec::new(),
            finish_by_hand: false,
            probes_loopback: false,
            fail,
        }
    }

    /// All of it is absent.
    pub fn absent(pages: u64) -> Self {
        Self {
            absent: vec![(0, pages)],
            ..Self::of(pages)
        }
    }

    /// What is absent of the first space.
    pub fn absent_pages(&self) -> PageSet {
        let runs = self.absent.iter();
        PageSet::from_runs(runs.map(|(offset, count)| run(FIRST_PAGE + offset, *count)))
    }

    pub fn by_hand(self) -> Self {
        Self {
            finish_by_hand: true,
            ..self
        }
    }
}

impl Lab {
    /// Starts a pager.
    pub async fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("pfp").tempdir().unwrap();
        let (groups, cgroup) = cgroups();
        let spawn = spawn(directory.path(), &groups);
        let (client, notices) = PagerClient::spawn(&spawn).await.unwrap();
        let pager = find_pager(directory.path());
        let listener = UnixListener::bind(directory.path().join("control")).unwrap();
        let (stores, waiting) = (BTreeMap::new(), BTreeMap::new());
        Self {
            directory,
            cgroup,
            groups,
            client: Arc::new(client),
            notices,
            stores,
            pager,
            going: None,
            listener,
            waiting,
        }
    }

    /// A pager that holds a tree that may run.
    pub async fn held(tree: &Tree) -> Self {
        let mut lab = Self::start().await;
        lab.plan(tree).await;
        let restored = lab
            .client
            .restore(lab.request(tree), &[], &[])
            .await
            .unwrap();
        assert!(0 < restored.root_pid);
        lab
    }

    /// A pager with a tree that runs, and the tree's connections.
    pub async fn running(tree: &Tree) -> (Self, Vec<Peer>) {
        let mut lab = Self::held(tree).await;
        let client = lab.client.clone();
        let going = tokio::spawn(async move { client.go().await });
        if tree.finish_by_hand {
            lab.going = Some(going);
        } else {
            going.await.unwrap().unwrap();
        }
        let mut peers = Vec::new();
        for vpid in vpids(tree) {
            peers.push(lab.peer(&vpid.to_string()).await);
        }
        (lab, peers)
    }

    /// Makes the stores and tells them and the plan.
    pub async fn plan(&mut self, tree: &Tree) {
        let mut sets = Vec::new();
        for (index, (vpid, count)) in vpids(tree).zip(&tree.spaces).enumerate() {
            let first = FIRST_PAGE + index as u64 * NEXT_SPACE;
            let absent = match index {
                0 => tree.absent_pages(),
                _ => PageSet::new(),
            };
            let all = PageSet::from(run(first, *count));
            let store = store();
            put(&store, &all.difference(&absent));
            let space = SpaceId(u32::try_from(vpid).unwrap());
            self.client.space(space, store.as_fd()).await.unwrap();
            self.stores.insert(space.0, store);
            sets.push((space, all, absent));
        }
        let plans: Vec<_> = sets.iter().map(|(space, all, _)| (*space, all)).collect();
        self.client.plan(&plans).await.unwrap();
        if !tree.absent.is_empty() {
            let absent: Vec<_> = sets.iter().map(|(space, _, set)| (*space, set)).collect();
            self.client.absent(&absent).await.unwrap();
        }
    }

    /// Brings pages of the first space that were absent.
    pub async fn bring(&self, pages: &PageSet) {
        let space = SpaceId(u32::try_from(VPID).unwrap());
        put(&self.stores[&space.0], pages);
        self.client.arrived(space, pages).await.unwrap();
    }

    /// The request that restores `tree` by the stand-in for CRIU.
    pub fn request(&self, tree: &Tree) -> RestoreRequest {
        let control = self.directory.path().join("control").display().to_string();
        let workloads = vpids(tree)
            .zip(&tree.spaces)
            .enumerate()
            .map(|(index, (vpid, count))| {
                let page = FIRST_PAGE + index as u64 * NEXT_SPACE;
                let early = tree.early.iter().map(|offset| page + offset).collect();
                Setup {
                    vpid,
                    page,
                    count: *count,
                    early,
                    control: control.clone(),
                    gate: -1,
                }
            });
        let script = Script {
            workloads: workloads.collect(),
            finish: tree.finish_by_hand.then(|| control.clone()),
            probes_loopback: tree.probes_loopback,
            fail: tree.fail,
        };
        let criu = self.directory.path().join("criu");
        let program = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nexport PAGER_TEST_CRIU='{}'\nexport PAGER_TEST_SOCKET=$3\n\
             exec {} --exact play_a_role --nocapture --quiet\n",
            serde_json::to_string(&script).unwrap(),
            program.display()
        );
        fs::write(&criu, text).unwrap();
        fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
        RestoreRequest {
            criu,
            images_dir: self.directory.path().to_owned(),
            work_dir: self.directory.path().to_owned(),
            log_level: 2,
            cgroup_procs: self.groups.tree.procs_files(),
            freezer: self.cgroup.clone(),
            spaces: u32::try_from(tree.spaces.len()).unwrap(),
            ..RestoreRequest::default()
        }
    }

    /// The connection of whoever calls itself `name`.
    pub async fn peer(&mut self, name: &str) -> Peer {
        loop {
            if let Some(peer) = self.waiting.remove(name) {
                return peer;
            }
            let accepted = tokio::time::timeout(DEADLINE, self.listener.accept()).await;
            let (reader, writer) = accepted.expect("somebody connects").unwrap().0.into_split();
            let mut reader = BufReader::new(reader);
            let mut line = String::new();
            reader.read_line(&mut line).await.unwrap();
            let who = line.trim();
            self.waiting.insert(who.to_owned(), Peer { reader, writer });
        }
    }

    /// Lets the stand-in for CRIU say "finished"; the tree runs already.
    pub async fn finish(&mut self) {
        let mut criu = self.peer("criu").await;
        criu.line().await;
        self.going.take().unwrap().await.unwrap().unwrap();
    }

    /// Waits for what the pager tells next.
    pub async fn notice(&mut self) -> Notice {
        let notice = tokio::time::timeout(DEADLINE, self.notices.recv()).await;
        notice
            .expect("the pager tells")
            .expect("the client listens")
    }

    pub async fn status(&self) -> Status {
        self.client.status().await.unwrap()
    }

    /// Bytes of memory that a store takes.
    pub fn stored(&self, space: u32) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.stores[&space].metadata().unwrap()) * 512
    }

    pub fn kill_pager(&self) {
        kill(Pid::from_raw(self.pager), Signal::SIGKILL).unwrap();
    }

    pub fn processes(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        // The watcher lets go when the cgroup is empty.
        while !self.processes().is_empty() && Instant::now() < deadline {
            for pid in self.processes() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = fs::write(self.cgroup.join("freezer.state"), "THAWED");
            let _ = fs::write(self.cgroup.join("cgroup.freeze"), "0");
            std::thread::yield_now();
        }
        self.groups.tree.kill();
        if is_pager_of(self.pager, self.directory.path()) {
            let _ = kill(Pid::from_raw(self.pager), Signal::SIGKILL);
        }
        let Groups {
            tree,
            pager,
            watcher,
        } = &self.groups;
        let left: Vec<_> = [tree, pager, watcher]
            .iter()
            .filter_map(|group| group.remove(DEADLINE).err())
            .collect();
        if !std::thread::panicking() {
            assert!(left.is_empty(), "{left:?}");
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.path().join("pager.log"));
            let output = fs::read_to_string(self.directory.path().join("criu.out"));
            eprintln!(
                "{}\n{}",
                log.unwrap_or_default(),
                output.unwrap_or_default()
            );
        }
    }
}

impl Peer {
    pub async fn ask(&mut self, command: &Command) -> Answer {
        self.tell(command).await;
        self.answer().await
    }

    /// Tells the stand-in for CRIU to go on.
    pub async fn line(&mut self) {
        self.writer.write_all(b"\n").await.unwrap();
    }

    pub async fn tell(&mut self, command: &Command) {
        let line = serde_json::to_string(command).unwrap() + "\n";
        self.writer.write_all(line.as_bytes()).await.unwrap();
    }

    pub async fn answer(&mut self) -> Answer {
        let mut line = String::new();
        let read = tokio::time::timeout(DEADLINE, self.reader.read_line(&mut line)).await;
        assert_ne!(
            read.expect("an answer comes").unwrap(),
            0,
            "the workload is gone"
        );
        serde_json::from_str(&line).unwrap()
    }

    /// Whether an answer has come.
    pub async fn has_answered(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, self.reader.fill_buf())
            .await
            .is_ok_and(|read| read.is_ok_and(|bytes| !bytes.is_empty()))
    }

    pub async fn ok(&mut self, command: &Command) {
        assert_eq!(self.ask(command).await, Answer::Ok, "{command:?}");
    }
}

/// How the pager of `directory` is started.
pub fn spawn(directory: &Path, groups: &Groups) -> Spawn {
    Spawn {
        program: env!("CARGO_BIN_EXE_pageferry-pager").into(),
        directory: directory.to_owned(),
        id: MigrationId::new([7; 16]),
        cgroup_procs: groups.pager.procs_files(),
        watcher_cgroup_procs: groups.watcher.procs_files(),
    }
}

pub fn vpids(tree: &Tree) -> impl Iterator<Item = i32> + use<> {
    VPID..VPID + i32::try_from(tree.spaces.len()).unwrap()
}

/// An empty store.
fn store() -> File {
    let file = File::from(memfd_create("store", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(1 << 47).unwrap();
    file
}

/// Puts the contents of pages into a store.
pub fn put(store: &File, pages: &PageSet) {
    for part in pages.partition(PageCount(64)) {
        for run in part.runs() {
            let mut bytes = vec![0; usize::try_from(run.bytes()).unwrap()];
            let chunks = bytes.chunks_exact_mut(PAGE as usize);
            for (page, chunk) in (run.start().0..).zip(chunks) {
                contents(page, chunk);
            }
            store.write_all_at(&bytes, run.address()).unwrap();
        }
    }
}

pub fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), PageCount(count)).unwrap()
}

/// New cgroups, and the folder of the tree's freezer among them.
fn cgroups() -> (Groups, PathBuf) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("test-pager-{}-{number}", std::process::id());
    let groups = Hierarchies::detect().unwrap().groups(&name);
    for group in [&groups.tree, &groups.pager, &groups.watcher] {
        group.make().unwrap();
    }
    let freezer = FreezerRoot::detect().unwrap().plan(&name);
    (groups, freezer.path().to_owned())
}

/// The pager, not its watcher: the one that is our child.
fn find_pager(directory: &Path) -> i32 {
    let own = std::process::id().to_string();
    let children = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned();
            (parent == own && is_pager_of(pid, directory)).then_some(pid)
        });
    children.last().expect("the pager runs")
}

fn is_pager_of(pid: i32, directory: &Path) -> bool {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = String::from_utf8_lossy(&arguments);
    arguments.contains("pageferry-pager") && arguments.contains(&*directory.to_string_lossy())
}
