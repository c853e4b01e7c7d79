//! A criu that is killed wherever it may be in a dump.

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use criu_glue::options::{DumpOptions, NetworkLock, Request};
use criu_glue::rpc::{Conversation, Ending, NotifyScript, SwrkConfig};
use criu_glue::view::Feed;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cases::{Run, drive};
use crate::node::LIBRARY;
use crate::workload::{PATIENCE, Workload, once, wait_until};

/// Whatever it was doing when it was killed, after so many calls of its tracer: the workload runs
/// on with its own registers, code, memory, descriptors and blocked signals.
pub async fn a_killed_criu_leaves_the_workload_as_it_was() {
    let files = tempfile::tempdir_in("/tmp").expect("tmp");
    let links = || fs::read_dir(&files).expect("a directory").count();
    // A file that is open, and whose name is gone while it has another.
    let script = format!("cd {}; {OPEN_A_FILE}", files.path().display());
    let workload = Workload::start_with(&["sh", "-c", &script], 1, THREADS);
    let mut connections = workload.dial();
    connections.iter_mut().for_each(answers);
    let before = traces(&workload);
    let mut killed = 0;
    for calls in (1..).step_by(STEP) {
        match kill_after(&workload, calls).await {
            Hit::InTime => killed += 1,
            Hit::Late => {}
            Hit::Never => break,
        }
        workload.check();
        connections.iter_mut().for_each(answers);
        let (mapped, open, states) = traces(&workload);
        assert_eq!(open, before.1, "descriptors after {calls} calls");
        assert_eq!(states, before.2, "threads after {calls} calls");
        assert_eq!(mapped, before.0, "mappings after {calls} calls");
        assert_eq!(links(), 1, "files after {calls} calls");
    }
    assert!(killed > 20, "only {killed} dumps were hit");
}

/// Wherever it is when it is told so, CRIU takes the dump back by itself; or, when nobody has the
/// patience, its tracer does.
pub async fn a_dump_given_up_in_its_middle_leaves_the_workload_as_it_was() {
    let workload = Workload::start_with(&[], 1, THREADS);
    let mut connections = workload.dial();
    connections.iter_mut().for_each(answers);
    let before = traces(&workload);
    let mut given_up = 0;
    let killed = Cell::new(0);
    let patiences = [PATIENCE, Duration::ZERO].into_iter().cycle();
    for (calls, patience) in (1..).step_by(3).zip(patiences) {
        let hit = end_after(&workload, calls, async |worker| {
            match worker.give_up(patience, PATIENCE).await.expect("it ends") {
                Ending::ByItself => {}
                Ending::Killed => killed.set(killed.get() + 1),
            }
            assert!(!worker.is_open(), "its tracer is still at work");
        });
        match hit.await {
            Hit::InTime => given_up += 1,
            Hit::Late => {}
            Hit::Never => break,
        }
        workload.check();
        connections.iter_mut().for_each(answers);
        assert!(traces(&workload) == before, "after {calls} calls");
    }
    let killed = killed.get();
    // The last ones may be quicker than no patience at all.
    assert!(
        2 < killed && killed <= given_up / 2 + 1,
        "{killed} of {given_up}"
    );
}

fn answers(connection: &mut TcpStream) {
    let mut byte = [7];
    connection.write_all(&byte).expect("a connection");
    connection.read_exact(&mut byte).expect("an answer");
}

/// The first thread runs CRIU's parasite, which ends when CRIU's sockets close. Its own code must
/// not run before its sockets are right again, however late the tracer hears of CRIU's end.
///
/// CRIU's log tells a moment late where it is, so it may be past the parasite when it is stopped.
/// With the fault that this is about the parasite is over each time.
pub async fn a_late_tracer_finds_the_parasite_still_at_work() {
    let mut missed = Vec::new();
    while let Err(miss) = late_tracer().await {
        missed.push(miss);
        assert!(missed.len() < LATE_TRIES, "{}", missed.join("; "));
    }
}

/// Kills CRIU and has its tracer hear of it late; where the first thread was if the parasite was
/// over by then.
async fn late_tracer() -> Result<(), String> {
    let workload = Workload::start_with(&[], 1, THREADS);
    let mut connections = workload.dial();
    connections.iter_mut().for_each(answers);
    let before = traces(&workload);
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = begin(&run, &workload, &mut feed).await;
    let (criu, late) = (Pid::from_raw(worker.pid()), tracer(&worker));
    let log = run.work.join("dump.log");
    let said = || fs::read_to_string(&log).unwrap_or_default();
    tokio::select! {
        dumped = worker.until(&NotifyScript::PostDump, PATIENCE) => {
            // We were slow; and told to go on it would kill the workload.
            dumped.expect("criu talks");
            worker.give_up(PATIENCE, PATIENCE).await.expect("it lets go");
            return Err("the dump was over".to_owned());
        }
        () = once(|| said().contains("Turning repair on")) => {}
    }
    kill(criu, Signal::SIGSTOP).expect("our child");
    let cured = said().contains("Curing");
    kill(late, Signal::SIGSTOP).expect("root");
    kill(criu, Signal::SIGKILL).expect("our child");
    worker.wait().await.expect("our child");
    let at = wait_until("a system call", || program_counter(&workload));
    let shared = traces(&workload).0;
    kill(late, Signal::SIGCONT).expect("root");
    worker.end(PATIENCE).await.expect("the tracer ends");
    workload.check();
    connections.iter_mut().for_each(answers);
    assert!(traces(&workload) == before);
    // A server whose connections are not yet forgotten may start again, if all had SO_REUSEADDR.
    drop(workload);
    for connection in connections {
        let address = connection.peer_addr().expect("it was connected");
        TcpListener::bind(address).expect("SO_REUSEADDR at both");
    }
    if !cured && shared.iter().any(|mapping| has(mapping, at)) {
        return Ok(());
    }
    Err(format!("the first thread is at {at:#x}, out of {shared:?}"))
}

/// What the kernel would have had it begin anew, because something else ran in between, it begins
/// anew: after a dump that is taken back, and after one whose CRIU was killed.
pub async fn a_thread_in_a_restartable_sequence_begins_it_anew() {
    let workload = Workload::start_in_sequence();
    for calls in (1..).step_by(7) {
        let hit = kill_after(&workload, calls).await;
        workload.check();
        if matches!(hit, Hit::Never) {
            return;
        }
    }
}

/// Of the first thread, when it waits in a system call.
fn program_counter(workload: &Workload) -> Option<u64> {
    let told = String::from_utf8(workload.proc("syscall")).expect("text");
    let (_, at) = told.trim_end().rsplit_once(" 0x")?;
    u64::from_str_radix(at, 16).ok()
}

/// Whether a line of `/proc/PID/maps` is about the mapping with this address.
fn has(mapping: &str, address: u64) -> bool {
    let range = mapping
        .split_once(' ')
        .and_then(|(range, _)| range.split_once('-'));
    let (start, end) = range.expect("a range");
    let number = |text| u64::from_str_radix(text, 16).expect("an address");
    (number(start)..number(end)).contains(&address)
}

/// The process that traces for `worker`.
fn tracer(worker: &Conversation) -> Pid {
    let own = format!("/proc/{0}/task/{0}/children", worker.pid());
    let is_tracer = |child: &&str| {
        let name = fs::read_to_string(format!("/proc/{child}/comm"));
        name.is_ok_and(|name| name == "criu-tracer\n")
    };
    // It gives itself this name when it first runs.
    wait_until("tracer", || {
        let children = fs::read_to_string(&own).expect("a live process");
        let tracer = children.split_ascii_whitespace().find(is_tracer)?;
        Some(Pid::from_raw(tracer.parse().expect("a pid")))
    })
}

/// Without its tracer CRIU cannot begin, says so, and does not wait for it for ever.
pub async fn a_dump_without_its_tracer_fails() {
    let workload = Workload::start_with(&[], 1, THREADS);
    let before = traces(&workload);
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = begin(&run, &workload, &mut feed).await;
    kill(tracer(&worker), Signal::SIGKILL).expect("root");
    let response = drive(&mut worker, |_| true).await;
    response.into_result().expect_err("nobody traces");
    workload.check();
    assert!(traces(&workload) == before);
}

/// Brings a worker to the gate before the dump, with its view published.
async fn begin(run: &Run, workload: &Workload, feed: &mut Feed) -> Conversation {
    let mut worker = Conversation::start(SwrkConfig {
        view: Some(feed.share(LIBRARY.into()).expect("a descriptor")),
        ..run.config()
    })
    .expect("criu");
    let request = Request::dump(DumpOptions {
        tcp_established: true,
        link_remap: true,
        network_lock: NetworkLock::Skip,
        ..run.dump_options(workload)
    });
    worker.request(request).await.expect("criu listens");
    let ready = worker.until(&NotifyScript::PreDump, PATIENCE);
    ready.await.expect("criu talks");
    feed.set_ranges(workload.pid, &[workload.region])
        .expect("pages");
    feed.publish().expect("room");
    worker
}

enum Hit {
    InTime,
    /// The dump was over before we looked again.
    Late,
    /// A whole dump makes fewer calls.
    Never,
}

async fn kill_after(workload: &Workload, calls: u64) -> Hit {
    end_after(workload, calls, async |worker| {
        kill(Pid::from_raw(worker.pid()), Signal::SIGKILL).expect("our child");
        // The tracer keeps the conversation open until all is put back.
        worker.end(PATIENCE).await.expect("the tracer ends");
    })
    .await
}

/// Has a dump end after so many calls of its tracer.
async fn end_after(workload: &Workload, calls: u64, end: impl AsyncFn(&mut Conversation)) -> Hit {
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let mut worker = begin(&run, workload, &mut feed).await;
    let asked = || feed.counters().expect("readable").tracer_asked;
    tokio::select! {
        biased;
        dumped = worker.until(&NotifyScript::PostDump, PATIENCE) => {
            dumped.expect("criu talks");
            assert!(asked() > 0, "criu left nothing to its tracer");
            assert!(hears_of_children(worker.pid()), "SIGCHLD is blocked in criu");
            worker.give_up(PATIENCE, PATIENCE).await.expect("it lets go");
            return if asked() < calls { Hit::Never } else { Hit::Late };
        }
        () = once(|| asked() >= calls) => {}
    }
    end(&mut worker).await;
    let said = fs::read_to_string(run.work.join("criu.out")).expect("our own");
    assert!(!said.contains("left"), "{calls}: {said}");
    fs::remove_dir_all(run.images).expect("our own");
    Hit::InTime
}

/// Whether CRIU's handler for a parasite that dies can run.
fn hears_of_children(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a live process");
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    let blocked = u64::from_str_radix(blocked.expect("a mask").trim(), 16);
    blocked.expect("a number") & 1 << (Signal::SIGCHLD as i32 - 1) == 0
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

const OPEN_A_FILE: &str = "echo x >one; exec 3<>one; ln one two; rm one; exec \"$0\" \"$@\"";
const THREADS: usize = 3;
const LATE_TRIES: usize = 12;
const STEP: usize = 1;
