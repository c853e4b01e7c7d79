//! Children stopped by job control, in a cgroup that is frozen when CRIU comes.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use criu_glue::options::{DumpOptions, Request};
use criu_glue::rpc::{Conversation, NotifyScript, SwrkConfig, ViewFds};
use criu_glue::view::Feed;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry_bench::cases::{Verdict, Watched};

use crate::cases::{Run, drive};
use crate::node::{LIBRARY, PROGRAM};
use crate::workload::{PATIENCE, once, wait_until};

/// A process with children in every state of job control, in a cgroup of its own.
struct Tree {
    freezer: Freezer,
    child: Child,
    case: Watched,
    cgroup: PathBuf,
}

impl Tree {
    fn start(freezer: Freezer, case: &str) -> Self {
        let folder = tempfile::tempdir_in("/tmp").expect("tmp").keep();
        let child = Command::new(PROGRAM)
            .args(["--case", case])
            .arg(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this program");
        let case = Watched::new(folder.clone());
        wait_until("stopped children", || {
            case.is_ready().expect("a case").then_some(())
        });
        // Its name must be no other run's; the folder's is not.
        let name = folder
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let cgroup = freezer.mount.join(format!("criu-glue{name}"));
        fs::create_dir(&cgroup).expect("a freezer");
        let tree = Self {
            freezer,
            child,
            case,
            cgroup,
        };
        for pid in tree.pids() {
            fs::write(tree.cgroup.join("cgroup.procs"), pid.to_string()).expect("a process");
        }
        tree
    }

    fn root(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// The root and its children, which have none.
    fn pids(&self) -> Vec<i32> {
        let root = self.root();
        let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children"));
        let children = children.unwrap_or_default();
        let children = children
            .split_whitespace()
            .map(|pid| pid.parse().expect("a pid"));
        std::iter::once(root).chain(children).collect()
    }

    /// What the kernel counts as the cgroup's threads.
    fn threads(&self) -> Vec<String> {
        let threads = fs::read_to_string(self.cgroup.join(self.freezer.threads)).expect("a cgroup");
        threads.lines().map(str::to_owned).collect()
    }

    fn set_frozen(&self, frozen: bool) {
        let words = self.freezer.words[usize::from(frozen)];
        let [file, told] = self.freezer.files.map(|name| self.cgroup.join(name));
        wait_until(words[1], || {
            // Again and again: a task on its way into a stop does not notice the v1 freezer.
            fs::write(&file, words[0]).expect("a freezer");
            let told = fs::read_to_string(&told).expect("a freezer");
            told.lines().any(|line| line == words[1]).then_some(())
        });
    }

    fn verdict(&self) -> Verdict {
        self.case.ask().expect("a folder");
        wait_until("verdict", || self.case.verdict().expect("a verdict"))
    }

    /// A worker at the gate before the dump, and its view.
    async fn begin(&self, run: &Run, feed: &mut Feed) -> Conversation {
        let view = ViewFds {
            freezer: Some(self.cgroup.clone()),
            ..feed.share(LIBRARY.into()).expect("a descriptor")
        };
        let mut worker = Conversation::start(SwrkConfig {
            view: Some(view),
            ..run.config()
        })
        .expect("criu");
        let request = Request::dump(DumpOptions {
            freeze_cgroup: Some(self.cgroup.to_string_lossy().into_owned()),
            ..run.dump_options_of(self.root())
        });
        worker.request(request).await.expect("criu listens");
        let ready = worker.until(&NotifyScript::PreDump, PATIENCE);
        ready.await.expect("criu talks");
        feed.publish().expect("room");
        worker
    }

    /// A worker that has dumped the frozen tree, which is frozen again.
    async fn dumped(&self, run: &Run, feed: &mut Feed) -> Conversation {
        let mut worker = self.begin(run, feed).await;
        let threads = self.threads();
        self.set_frozen(true);
        let dumped = worker.until(&NotifyScript::PostDump, PATIENCE);
        dumped.await.expect("criu talks");
        self.set_frozen(true);
        assert_eq!(self.threads(), threads, "threads of the cgroup");
        worker
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for pid in self.pids() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let file = self.cgroup.join(self.freezer.files[0]);
        let _ = fs::write(file, self.freezer.words[0][0]);
        reap();
        wait_until("empty cgroup", || {
            fs::remove_dir(&self.cgroup).is_ok().then_some(())
        });
    }
}

/// Forgets whoever has ended: we are the init of this pid namespace.
fn reap() {
    wait_until("end of all children", || {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => None,
            Ok(_) => None,
            Err(_) => Some(()),
        }
    });
}

/// They are as before when the dump is taken back: stopped, their parent told as often as it was,
/// and they go on when they are continued.
pub async fn stopped_children_in_a_frozen_cgroup_are_dumped_and_given_back() {
    given_back(Freezer::of_this_node()).await;
}

/// In cgroup v2, where a frozen task traps.
pub async fn stopped_children_in_a_frozen_cgroup_of_v2_are_dumped_and_given_back() {
    match Freezer::v2() {
        Some(freezer) => given_back(freezer).await,
        None => println!("cgroup v2 is not mounted"),
    }
}

async fn given_back(freezer: Freezer) {
    let tree = Tree::start(freezer, "stopped-children-told-once");
    for _ in 0..2 {
        let run = Run::new();
        let mut feed = Feed::create().expect("memfd");
        let mut worker = tree.dumped(&run, &mut feed).await;
        worker
            .give_up(PATIENCE, PATIENCE)
            .await
            .expect("it lets go");
        tree.set_frozen(false);
    }
    assert_eq!(tree.verdict().wrong, Vec::<String>::new());
}

/// The same at the other side of a dump and a restore.
pub async fn stopped_children_in_a_frozen_cgroup_come_back_by_a_restore() {
    let tree = Tree::start(Freezer::of_this_node(), "stopped-children");
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = tree.dumped(&run, &mut feed).await;
    worker.answer(true).await.expect("criu listens");
    tree.set_frozen(false);
    worker.end(PATIENCE).await.expect("our child");
    reap();
    let mut worker = Conversation::start(run.config()).expect("criu");
    let request = Request::restore(run.restore_options());
    worker.request(request).await.expect("criu listens");
    let response = drive(&mut worker, |_| true).await;
    response.into_result().expect("restored");
    worker.wait().await.expect("our child");
    assert_eq!(tree.verdict().wrong, Vec::<String>::new());
}

/// Wherever it was killed: the freezer holds all threads that it held.
pub async fn a_killed_criu_leaves_stopped_children_in_their_cgroup() {
    let tree = Tree::start(Freezer::of_this_node(), "stopped-children-told-once");
    for calls in (1..).step_by(11) {
        let run = Run::new();
        let mut feed = Feed::create().expect("memfd");
        let mut worker = tree.begin(&run, &mut feed).await;
        let threads = tree.threads();
        tree.set_frozen(true);
        let asked = || feed.counters().expect("readable").tracer_asked;
        let is_over = tokio::select! {
            biased;
            dumped = worker.until(&NotifyScript::PostDump, PATIENCE) => {
                dumped.expect("criu talks");
                true
            }
            () = once(|| asked() >= calls) => false,
        };
        kill(Pid::from_raw(worker.pid()), Signal::SIGKILL).expect("our child");
        worker.wait().await.expect("our child");
        // Its tracer may wait for a thread that only goes on when it is thawed.
        tree.set_frozen(false);
        worker.end(PATIENCE).await.expect("the tracer ends");
        assert_eq!(
            tree.threads(),
            threads,
            "threads of the cgroup after {calls} calls"
        );
        if is_over {
            break;
        }
    }
    assert_eq!(tree.verdict().wrong, Vec::<String>::new());
}

/// A kernel's interface for freezing.
struct Freezer {
    mount: PathBuf,
    /// The file that lists threads.
    threads: &'static str,
    /// The file that is written to, and the one that tells.
    files: [&'static str; 2],
    /// What is written and told: thawed, frozen.
    words: [[&'static str; 2]; 2],
}

impl Freezer {
    /// What a daemon would use here.
    fn of_this_node() -> Self {
        let found = Self::v1().or_else(Self::v2);
        found.expect("the v1 freezer or cgroup2 is mounted")
    }

    fn v1() -> Option<Self> {
        Some(Self {
            mount: mounted("cgroup", Some("freezer"))?,
            threads: "tasks",
            files: ["freezer.state", "freezer.state"],
            words: [["THAWED", "THAWED"], ["FROZEN", "FROZEN"]],
        })
    }

    fn v2() -> Option<Self> {
        Some(Self {
            mount: mounted("cgroup2", None)?,
            threads: "cgroup.threads",
            files: ["cgroup.freeze", "cgroup.events"],
            words: [["0", "frozen 0"], ["1", "frozen 1"]],
        })
    }
}

/// Where a file system of this kind, with this option, is mounted.
fn mounted(kind: &str, option: Option<&str>) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("procfs");
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let after: Vec<&str> = after.split(' ').collect();
        let has = |option| after[2].split(',').any(|word| word == option);
        let is_it = after[0] == kind && option.is_none_or(has);
        is_it.then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}
