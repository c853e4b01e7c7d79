//! A script in criu's place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use criu_glue::options::Request;
use criu_glue::probe::Capabilities;
use criu_glue::rpc::{Conversation, NotifyScript, SwrkConfig};
use criu_glue::view::{Blind, Feed};

use crate::cases::{Run, drive};
use crate::node::LIBRARY;
use crate::workload::{PATIENCE, Workload};

fn script(run: &Run, body: &str) -> PathBuf {
    let path = run.work.join("criu.sh");
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("a writable directory");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our file");
    path
}

/// A worker that waits at `pre-dump`, and whether it sees.
async fn waiting(run: &Run, feed: &Feed, criu: PathBuf, workload: &Workload) -> Conversation {
    let view = feed.share(LIBRARY.into()).expect("a descriptor");
    let mut worker = Conversation::start(SwrkConfig {
        view: Some(view),
        criu,
        ..run.config()
    })
    .expect("a program");
    let request = Request::dump(run.dump_options(workload));
    worker.request(request).await.expect("criu listens");
    let ready = worker.until(&NotifyScript::PreDump, PATIENCE);
    ready.await.expect("criu talks");
    worker
}

/// Also one that runs other programs before.
pub async fn a_script_that_execs_criu_sees_through_the_view() {
    let mut workload = Workload::start(8);
    let run = Run::new();
    let criu = script(&run, "mkdir -p /tmp/of-the-script\nexec criu \"$@\"");
    let output = run.work.join("criu.out");
    let found = Capabilities::probe(&criu, Some(Path::new(LIBRARY)), &output).await;
    let found = found.expect("a working criu");
    assert!(matches!(found.view, Some(Ok(()))), "{found:?}");
    let mut feed = Feed::create().expect("memfd");
    feed.set_ranges(workload.pid, &[workload.region])
        .expect("pages");
    feed.publish().expect("room");
    let mut worker = waiting(&run, &feed, criu, &workload).await;
    feed.check_seen_by(&worker).expect("it sees");
    let response = drive(&mut worker, |_| true).await;
    response.into_result().expect("dumped");
    workload.wait_until_killed();
    let counters = feed.counters().expect("readable");
    assert!(counters.scans_hidden > 0, "{counters:?}");
    assert!(counters.tracer_asked > 0, "{counters:?}");
}

pub async fn a_script_that_starts_criu_or_hides_the_view_is_found_out() {
    let workload = Workload::start(8);
    let feed = Feed::create().expect("memfd");
    let run = Run::new();
    let starts = script(&run, "criu \"$@\"\nexit $?");
    let mut worker = waiting(&run, &feed, starts, &workload).await;
    let blind = feed.check_seen_by(&worker);
    assert!(matches!(blind, Err(Blind::Another { started, speaks })
        if started == worker.pid() && Some(speaks) == worker.speaker()));
    worker.give_up(PATIENCE, PATIENCE).await.expect("it ends");
    let run = Run::new();
    let hides = script(&run, "unset LD_PRELOAD\nexec criu \"$@\"");
    let mut worker = waiting(&run, &feed, hides, &workload).await;
    let blind = feed.check_seen_by(&worker);
    assert!(
        matches!(&blind, Err(Blind::Unloaded { program, .. })
        if program.ends_with("criu")),
        "{blind:?}"
    );
    worker.give_up(PATIENCE, PATIENCE).await.expect("it ends");
    workload.check();
}
