//! A tree of many threads, dumped through CRIU's tracer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use criu_glue::options::{DumpOptions, NetworkLock, Request};
use criu_glue::rpc::{Conversation, NotifyScript, SwrkConfig, ViewFds};
use criu_glue::view::Feed;
use nix::sys::signal::Signal;

use crate::cases::Run;
use crate::node::LIBRARY;
use crate::sys;
use crate::workload::{PATIENCE, Workload, wait_until};

/// A process of many threads in a cgroup of its own, which CRIU freezes.
struct Tree {
    /// `None` when it has been ended.
    workload: Option<Workload>,
    pid: i32,
    cgroup: PathBuf,
}

impl Tree {
    fn start(threads: usize) -> Self {
        let workload = Workload::start_with(&[], 1, threads);
        let pid = workload.pid;
        // Its name must be no other run's; this pid namespace has the same numbers each time.
        let folder = tempfile::tempdir_in("/tmp").expect("tmp").keep();
        let name = folder.file_name().expect("a name").to_string_lossy();
        let cgroup = Path::new(FREEZER).join(format!("criu-glue{name}"));
        fs::create_dir(&cgroup).expect("the v1 freezer");
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("a process");
        Self {
            workload: Some(workload),
            pid,
            cgroup,
        }
    }

    /// All but the first one.
    fn threads(&self) -> Vec<i32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("a live process");
        let names = tasks.map(|task| task.expect("a task").file_name());
        let numbers = names.map(|name| name.to_string_lossy().parse().expect("a number"));
        let mut threads: Vec<i32> = numbers.filter(|tid| *tid != self.pid).collect();
        threads.sort_unstable();
        threads
    }

    /// A dump that is taken back: what it says of each thread, and how often its tracer was asked.
    async fn dump(&self, tracer: bool) -> (BTreeMap<i32, Vec<u8>>, u64) {
        let run = Run::new();
        let mut feed = Feed::create().expect("memfd");
        let view = ViewFds {
            freezer: Some(self.cgroup.clone()),
            tracer,
            ..feed.share(LIBRARY.into()).expect("a descriptor")
        };
        let mut worker = Conversation::start(SwrkConfig {
            view: Some(view),
            ..run.config()
        })
        .expect("criu");
        let request = Request::dump(DumpOptions {
            freeze_cgroup: Some(self.cgroup.to_string_lossy().into_owned()),
            tcp_established: true,
            network_lock: NetworkLock::Skip,
            ..run.dump_options_of(self.pid)
        });
        worker.request(request).await.expect("criu listens");
        let mut come_to = async |point| {
            let came = worker.until(&point, PATIENCE).await;
            came.unwrap_or_else(|error| panic!("{error}, see {}", run.work.display()));
        };
        come_to(NotifyScript::PreDump).await;
        feed.publish().expect("room");
        come_to(NotifyScript::PostDump).await;
        let asked = feed.counters().expect("readable").tracer_asked;
        worker
            .give_up(PATIENCE, PATIENCE)
            .await
            .expect("it lets go");
        let image = |tid: &i32| fs::read(run.images.join(format!("core-{tid}.img")));
        let threads = self.threads().into_iter();
        let images = threads.map(|tid| (tid, image(&tid).expect("an image of a thread")));
        (images.collect(), asked)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        drop(self.workload.take());
        wait_until("empty cgroup", || {
            fs::remove_dir(&self.cgroup).is_ok().then_some(())
        });
    }
}

/// Each call is two switches between processes, in the freeze.
pub async fn a_tracer_is_asked_little_about_each_thread() {
    let (_, few) = Tree::start(8).dump(true).await;
    let (images, many) = Tree::start(8 + MORE).dump(true).await;
    assert_eq!(images.len(), 8 + MORE);
    let each = (many - few) as f64 / MORE as f64;
    assert!(
        few > 0 && each < 5.0,
        "{few} and {many}: {each} calls for each thread"
    );
}

/// Whatever was told ahead: registers of every kind, masks, and signals that only some threads have
/// queued.
pub async fn criu_sees_through_its_tracer_what_the_kernel_tells() {
    let tree = Tree::start(24);
    let threads = tree.threads();
    let signalled = [threads[5], threads[6], threads[23]];
    for tid in signalled {
        sys::signal(tree.pid, tid, Signal::SIGUSR1).expect("a live thread");
    }
    // Whatever a first dump changes for good is changed then.
    tree.dump(true).await;
    let (by_itself, nothing) = tree.dump(false).await;
    let (by_its_tracer, asked) = tree.dump(true).await;
    assert!(
        nothing == 0 && asked > 0,
        "asked {nothing} and {asked} times"
    );
    for (tid, image) in &by_itself {
        assert!(by_its_tracer.get(tid) == Some(image), "of thread {tid}");
        let has_signal = image.windows(SIGNAL.len()).any(|bytes| bytes == SIGNAL);
        assert_eq!(has_signal, signalled.contains(tid), "of thread {tid}");
    }
}

const MORE: usize = 64;
const FREEZER: &str = "/sys/fs/cgroup/freezer";
/// The begin of a `siginfo_t`: `SIGUSR1`, no error, `SI_TKILL`.
const SIGNAL: [u8; 12] = [10, 0, 0, 0, 0, 0, 0, 0, 0xfa, 0xff, 0xff, 0xff];
