//! A criu that is killed wherever it may be in a dump.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;

use criu_glue::options::{DumpOptions, NetworkLock, Request};
use criu_glue::rpc::{Event, NotifyScript, Swrk, SwrkConfig};
use criu_glue::view::Feed;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cases::Run;
use crate::node::LIBRARY;
use crate::workload::Workload;

/// Whatever it was doing when it was killed, after so many calls of its tracer: the workload runs
/// on with its own registers, code, memory, descriptors and blocked signals.
pub async fn a_killed_criu_leaves_the_workload_as_it_was() {
    let workload = Workload::start_with(&[], 1, THREADS);
    let mut connections = workload.dial();
    connections.iter_mut().for_each(answers);
    let before = traces(&workload);
    let mut killed = 0;
    for calls in (1..).step_by(STEP) {
        match kill_after(&workload, calls).await {
            Hit::Killed => killed += 1,
            Hit::Late => {}
            Hit::Never => break,
        }
        workload.check();
        connections.iter_mut().for_each(answers);
        let (mapped, open, states) = traces(&workload);
        assert_eq!(open, before.1, "descriptors after {calls} calls");
        assert_eq!(states, before.2, "threads after {calls} calls");
        assert_eq!(mapped, before.0, "mappings after {calls} calls");
    }
    assert!(killed > 20, "only {killed} dumps were hit");
}

fn answers(connection: &mut TcpStream) {
    let mut byte = [7];
    connection.write_all(&byte).expect("a connection");
    connection.read_exact(&mut byte).expect("an answer");
}

/// Without its tracer CRIU cannot begin, says so, and does not wait for it for ever.
pub async fn a_dump_without_its_tracer_fails() {
    let workload = Workload::start_with(&[], 1, THREADS);
    let before = traces(&workload);
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = begin(&run, &workload, &mut feed).await;
    let own = format!("/proc/{0}/task/{0}/children", worker.pid());
    let children = fs::read_to_string(own).expect("a live process");
    let tracer = children.split_ascii_whitespace().find(|child| {
        let name = fs::read_to_string(format!("/proc/{child}/comm"));
        name.is_ok_and(|name| name == "criu-tracer\n")
    });
    let tracer = tracer.expect("a tracer").parse().expect("a pid");
    kill(Pid::from_raw(tracer), Signal::SIGKILL).expect("root");
    worker.answer(true).await.expect("criu listens");
    let response = loop {
        match worker.next().await.expect("criu talks") {
            Event::Notify { .. } => worker.answer(true).await.expect("criu listens"),
            Event::Response(response) => break response,
        }
    };
    response.into_result().expect_err("nobody traces");
    workload.check();
    assert!(traces(&workload) == before);
}

/// Brings a worker to the gate before the dump, with its view published.
async fn begin(run: &Run, workload: &Workload, feed: &mut Feed) -> Swrk {
    let mut worker = Swrk::spawn(SwrkConfig {
        view: Some(feed.share(LIBRARY.into()).expect("a descriptor")),
        ..run.config()
    })
    .expect("criu");
    let request = Request::dump(DumpOptions {
        tcp_established: true,
        network_lock: NetworkLock::Skip,
        ..run.dump_options(workload)
    });
    worker.request(request).await.expect("criu listens");
    until(&mut worker, &NotifyScript::PreDump).await;
    feed.set_ranges(workload.pid, &[workload.region])
        .expect("pages");
    feed.publish().expect("room");
    worker
}

enum Hit {
    Killed,
    /// The dump was over before we looked again.
    Late,
    /// A whole dump makes fewer calls.
    Never,
}

async fn kill_after(workload: &Workload, calls: u64) -> Hit {
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = begin(&run, workload, &mut feed).await;
    worker.answer(true).await.expect("criu listens");
    let asked = || feed.counters().expect("readable").tracer_asked;
    while asked() < calls {
        tokio::select! {
            biased;
            event = worker.next() => match event.expect("criu talks") {
                Event::Notify { script: NotifyScript::PostDump, .. } => {
                    assert!(asked() > 0, "criu left nothing to its tracer");
                    assert!(hears_of_children(worker.pid()), "SIGCHLD is blocked in criu");
                    worker.answer(false).await.expect("criu listens");
                    while worker.next().await.is_ok() {}
                    return if asked() < calls { Hit::Never } else { Hit::Late };
                }
                Event::Notify { .. } => worker.answer(true).await.expect("criu listens"),
                Event::Response(response) => panic!("{response:?}"),
            },
            () = tokio::task::yield_now() => {}
        }
    }
    kill(Pid::from_raw(worker.pid()), Signal::SIGKILL).expect("our child");
    // The tracer keeps the conversation open until all is put back.
    while let Ok(event) = worker.next().await {
        assert!(matches!(event, Event::Notify { .. }), "{event:?}");
    }
    worker.wait().await.expect("our child");
    let said = fs::read_to_string(run.work.join("criu.out")).expect("our own");
    assert!(!said.contains("left"), "{calls}: {said}");
    fs::remove_dir_all(run.images).expect("our own");
    Hit::Killed
}

/// Whether CRIU's handler for a parasite that dies can run.
fn hears_of_children(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a live process");
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    let blocked = u64::from_str_radix(blocked.expect("a mask").trim(), 16);
    blocked.expect("a number") & 1 << (Signal::SIGCHLD as i32 - 1) == 0
}

async fn until(worker: &mut Swrk, point: &NotifyScript) {
    loop {
        match worker.next().await.expect("criu talks") {
            Event::Notify { script, .. } if script == *point => return,
            Event::Notify { .. } => worker.answer(true).await.expect("criu listens"),
            Event::Response(response) => panic!("{response:?}"),
        }
    }
}

/// What a dump could have left behind: shared mappings, descriptors, tracers and blocked signals.
fn traces(workload: &Workload) -> (Vec<String>, Vec<PathBuf>, Vec<String>) {
    let maps = String::from_utf8(workload.proc("maps")).expect("text");
    // It maps no shared memory itself; its private memory may grow at any time.
    let shared = maps.lines().filter(|line| line.contains("s 0"));
    let shared = shared.map(str::to_owned).collect();
    let own = format!("/proc/{}", workload.pid);
    let open = fs::read_dir(format!("{own}/fd")).expect("a live process");
    let open = open.filter_map(|entry| fs::read_link(entry.expect("a descriptor").path()).ok());
    let tasks = fs::read_dir(format!("{own}/task")).expect("a live process");
    let mut states: Vec<String> = tasks
        .map(|task| {
            let status = task.expect("a task").path().join("status");
            let status = fs::read_to_string(status).expect("a live thread");
            let told = |line: &&str| line.starts_with("SigBlk") || line.starts_with("TracerPid");
            status.lines().filter(told).collect()
        })
        .collect();
    states.sort();
    (shared, open.collect(), states)
}

const THREADS: usize = 3;
const STEP: usize = 1;
