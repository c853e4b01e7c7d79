//! The cases, and what runs them one after the other.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use criu_glue::image::pagemap::Pages;
use criu_glue::image::{inventory, mm, pagemap, pstree};
use criu_glue::options::{Directories, DumpOptions, Log, LogLevel, Request, RestoreOptions};
use criu_glue::probe::{Capabilities, VERSION_MIN};
use criu_glue::report;
use criu_glue::rpc::{Conversation, NotifyScript, Response, StartError, SwrkConfig, TalkError};
use criu_glue::view::smaps::{self, Recorded};
use criu_glue::view::{Counters, Feed};
use tokio::sync::oneshot;

use crate::gated::{
    a_gate_hears_that_criu_has_died, a_gate_hears_that_its_runtime_has_died,
    a_runtime_that_wants_no_notifications_hears_of_none, a_runtimes_dump_goes_through_a_gate,
    a_runtimes_dump_is_taken_back_at_its_gate,
};
use crate::killed::{
    a_dump_given_up_in_its_middle_leaves_the_workload_as_it_was, a_dump_without_its_tracer_fails,
    a_killed_criu_leaves_the_workload_as_it_was, a_late_tracer_finds_the_parasite_still_at_work,
    a_thread_in_a_restartable_sequence_begins_it_anew,
};
use crate::lazy::{Server, Store, take_over};
use crate::node::LIBRARY;
use crate::stopped::{
    a_killed_criu_leaves_stopped_children_in_their_cgroup,
    stopped_children_in_a_frozen_cgroup_are_dumped_and_given_back,
    stopped_children_in_a_frozen_cgroup_come_back_by_a_restore,
    stopped_children_in_a_frozen_cgroup_of_v2_are_dumped_and_given_back,
};
use crate::threads::{
    a_tracer_is_asked_little_about_each_thread, criu_sees_through_its_tracer_what_the_kernel_tells,
};
use crate::workload::{PATIENCE, Workload};
use crate::wrapped::{
    a_script_that_execs_criu_sees_through_the_view,
    a_script_that_starts_criu_or_hides_the_view_is_found_out,
};

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// Runs the cases whose names contain one of `filter`, or all.
        pub fn run(filter: &[&str]) -> ExitCode {
            let mut failed = 0;
            $(failed += usize::from(!run_one(stringify!($name), filter, || $name()));)*
            if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    };
}

cases! {
    criu_is_probed_and_the_view_loads,
    a_script_that_execs_criu_sees_through_the_view,
    a_script_that_starts_criu_or_hides_the_view_is_found_out,
    without_a_published_feed_a_dump_is_complete,
    hidden_memory_is_not_dumped_and_comes_back_by_a_lazy_restore,
    a_half_hidden_mapping_is_dumped_in_part,
    a_worker_inside_the_namespaces_of_a_workload_leaves_them_alone,
    a_dump_refused_at_its_gate_leaves_the_workload_running,
    a_dropped_worker_leaves_the_workload_running,
    a_killed_criu_leaves_the_workload_as_it_was,
    a_late_tracer_finds_the_parasite_still_at_work,
    a_dump_given_up_in_its_middle_leaves_the_workload_as_it_was,
    a_thread_in_a_restartable_sequence_begins_it_anew,
    a_dump_without_its_tracer_fails,
    a_tracer_is_asked_little_about_each_thread,
    criu_sees_through_its_tracer_what_the_kernel_tells,
    stopped_children_in_a_frozen_cgroup_are_dumped_and_given_back,
    stopped_children_in_a_frozen_cgroup_of_v2_are_dumped_and_given_back,
    stopped_children_in_a_frozen_cgroup_come_back_by_a_restore,
    a_killed_criu_leaves_stopped_children_in_their_cgroup,
    a_runtimes_dump_goes_through_a_gate,
    a_runtimes_dump_is_taken_back_at_its_gate,
    a_runtime_that_wants_no_notifications_hears_of_none,
    a_gate_hears_that_its_runtime_has_died,
    a_gate_hears_that_criu_has_died,
    a_failed_request_names_its_cause,
    a_worker_that_cannot_be_prepared_names_the_step,
}

fn run_one<F: Future<Output = ()>>(name: &str, filter: &[&str], case: impl FnOnce() -> F) -> bool {
    if !filter.is_empty() && !filter.iter().any(|part| name.contains(part)) {
        return true;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let limited = async {
        tokio::time::timeout(2 * PATIENCE, case())
            .await
            .expect("an end");
    };
    let passed = catch_unwind(AssertUnwindSafe(|| runtime.block_on(limited))).is_ok();
    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    passed
}

/// The directories of one dump and its restores.
pub struct Run {
    pub images: PathBuf,
    pub work: PathBuf,
}

impl Run {
    pub fn new() -> Self {
        let base = tempfile::tempdir_in("/tmp").expect("tmp").keep();
        let (images, work) = (base.join("images"), base.join("work"));
        fs::create_dir(&images).expect("an empty directory");
        fs::create_dir(&work).expect("an empty directory");
        Self { images, work }
    }

    pub fn directories(&self) -> Directories {
        let open = |path: &Path| OwnedFd::from(File::open(path).expect("a directory"));
        Directories {
            images: open(&self.images),
            work: Some(open(&self.work)),
        }
    }

    pub fn config(&self) -> SwrkConfig {
        SwrkConfig::new("criu".into(), self.work.join("criu.out"))
    }

    pub fn dump_options(&self, workload: &Workload) -> DumpOptions {
        self.dump_options_of(workload.pid)
    }

    pub fn dump_options_of(&self, root: i32) -> DumpOptions {
        let log = Log {
            file: "dump.log".to_owned(),
            level: LogLevel::Debug,
        };
        DumpOptions {
            log,
            ..DumpOptions::new(root, self.directories())
        }
    }

    pub fn restore_options(&self) -> RestoreOptions {
        let log = Log {
            file: "restore.log".to_owned(),
            level: LogLevel::Debug,
        };
        RestoreOptions {
            log,
            ..RestoreOptions::new(self.directories())
        }
    }
}

/// Lets a worker respond; at each notification `at` says whether it shall go on.
pub async fn drive(worker: &mut Conversation, at: impl FnMut(&NotifyScript) -> bool) -> Response {
    worker.conclude(PATIENCE, at).await.expect("criu talks")
}

fn memory_of(workload: &Workload, (start, end): (u64, u64)) -> Vec<u8> {
    let memory = File::open(format!("/proc/{}/mem", workload.pid)).expect("a live process");
    let mut contents = vec![0; usize::try_from(end - start).expect("64 bit")];
    memory
        .read_exact_at(&mut contents, start)
        .expect("mapped memory");
    contents
}

/// Every page that is in the images must be in the process, byte for byte.
fn compare_images_with_memory(run: &Run, workload: &Workload) {
    let pages = Pages::open(&run.images, vpid(workload)).expect("images");
    for entry in pages
        .pagemap()
        .entries
        .iter()
        .filter(|entry| entry.contents_at.is_some())
    {
        let length = entry.pages * pagemap::PAGE_SIZE;
        let truth = memory_of(workload, (entry.start, entry.start + length));
        let mut dumped = vec![0; truth.len()];
        let read = pages.read_at(entry.start, &mut dumped).expect("contents");
        assert!(
            read == truth.len() && dumped == truth,
            "pages at {:#x}",
            entry.start
        );
    }
}

fn vpid(workload: &Workload) -> u32 {
    workload.pid.cast_unsigned()
}

async fn criu_is_probed_and_the_view_loads() {
    let run = Run::new();
    let output = run.work.join("criu.out");
    let library = Path::new(LIBRARY);
    let found = Capabilities::probe(Path::new("criu"), Some(library), &output).await;
    let found = found.expect("a working criu");
    assert!(found.version >= VERSION_MIN, "{}", found.version);
    assert!(
        found.features.lazy_pages && matches!(found.view, Some(Ok(()))),
        "{found:?}"
    );
    let without = Capabilities::probe(Path::new("criu"), None, &output).await;
    assert!(without.expect("a working criu").view.is_none());
}

async fn without_a_published_feed_a_dump_is_complete() {
    let mut workload = Workload::start(16);
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    feed.set_ranges(workload.pid, &[workload.region])
        .expect("pages");
    let view = feed.share(LIBRARY.into()).expect("a descriptor");
    let mut worker = Conversation::start(SwrkConfig {
        view: Some(view),
        ..run.config()
    })
    .expect("criu");
    worker
        .request(Request::dump(run.dump_options(&workload)))
        .await
        .expect("criu listens");
    let mut seen = Vec::new();
    let response = drive(&mut worker, |script| {
        seen.push(script.clone());
        if *script == NotifyScript::PostDump {
            compare_images_with_memory(&run, &workload);
        }
        true
    });
    response.await.into_result().expect("dumped");
    assert_eq!(seen.first(), Some(&NotifyScript::PreDump));
    assert_eq!(seen.last(), Some(&NotifyScript::PostDump));
    workload.wait_until_killed();
    let counters = feed.counters().expect("readable");
    assert_eq!(
        (
            counters.attached,
            counters.scans_hidden,
            counters.smaps_served
        ),
        (1, 0, 0)
    );
    assert!(
        counters.scans_passed > 0 && counters.smaps_passed > 0,
        "{counters:?}"
    );
    let pagemap = pagemap::read(&run.images, vpid(&workload)).expect("an image");
    assert!(pagemap.entry_at(workload.region.0).is_some());

    let mut worker = Conversation::start(run.config()).expect("criu");
    worker
        .request(Request::restore(run.restore_options()))
        .await
        .expect("criu listens");
    let response = drive(&mut worker, |_| true)
        .await
        .into_result()
        .expect("restored");
    assert_eq!(response.pid, Some(workload.pid));
    let status = worker.wait().await.expect("our child");
    assert!(status.expect("our child").success());
    workload.check();
}

/// Dumps with all of the workload's memory hidden and smaps rendered; gives what was hidden.
async fn dump_hidden(workload: &mut Workload, run: &Run, feed: &mut Feed) -> Vec<u8> {
    let recorded = Recorded::parse(&workload.proc("smaps")).expect("the kernel's text");
    let view = feed.share(LIBRARY.into()).expect("a descriptor");
    let mut worker = Conversation::start(SwrkConfig {
        view: Some(view),
        ..run.config()
    })
    .expect("criu");
    worker
        .request(Request::dump(run.dump_options(workload)))
        .await
        .expect("criu listens");
    let mut hidden = Vec::new();
    let mut rendered = Vec::new();
    let response = drive(&mut worker, |script| {
        if *script == NotifyScript::PreDump {
            rendered = recorded
                .render(&workload.proc("maps"))
                .expect("nothing new");
            feed.set_ranges(workload.pid, &[workload.region])
                .expect("pages");
            feed.set_smaps(workload.pid, &rendered);
            feed.publish().expect("room");
        }
        if *script == NotifyScript::PostDump {
            smaps::compare(&workload.proc("smaps"), &rendered).expect("nothing has changed");
            compare_images_with_memory(run, workload);
            hidden = memory_of(workload, workload.region);
        }
        true
    });
    response.await.into_result().expect("dumped");
    drop(worker);
    workload.wait_until_killed();
    hidden
}

async fn hidden_memory_is_not_dumped_and_comes_back_by_a_lazy_restore() {
    let mut workload = Workload::start(64);
    let run = Run::new();
    let mut feed = Feed::create().expect("memfd");
    let contents = dump_hidden(&mut workload, &run, &mut feed).await;
    let counters = feed.counters().expect("readable");
    let Counters {
        attached: 1,
        smaps_served: 1,
        smaps_passed: 0,
        ..
    } = counters
    else {
        panic!("{counters:?}")
    };
    assert!(
        counters.scans_hidden + counters.scans_cut > 0,
        "{counters:?}"
    );

    check_images_without_region(&run, &workload);
    pagemap::rewrite(&run.images, vpid(&workload)).expect("writable");
    let eager = pagemap::read(&run.images, vpid(&workload)).expect("an image");
    let present = |entry: &pagemap::Entry| entry.flags == pagemap::PRESENT;
    assert!(eager.entries.iter().all(present), "{eager:?}");

    let server = restore_lazily(&run, &workload, contents).await;
    workload.check();
    assert!(server.faults.load(Ordering::Relaxed) >= (64 << 20) / 4096);
    let status = String::from_utf8_lossy(&workload.proc("status")).into_owned();
    assert!(
        status.contains("THP_enabled:\t1"),
        "the task's own setting is back: {status}"
    );
}

/// The images must tell everything about the process but the contents of its region.
fn check_images_without_region(run: &Run, workload: &Workload) {
    let vpid = vpid(workload);
    let (start, end) = workload.region;
    assert_eq!(
        inventory::read(&run.images)
            .expect("an image")
            .image_version,
        2
    );
    let tree = pstree::read(&run.images).expect("an image");
    let found: Vec<_> = tree
        .iter()
        .map(|process| (process.pid, process.threads.clone()))
        .collect();
    assert_eq!(found, [(vpid, vec![vpid])]);
    let mm = mm::read(&run.images, vpid).expect("an image");
    let covers = |vma: &&mm::Vma| vma.start <= start && vma.end >= end;
    assert!(
        mm.vmas
            .iter()
            .find(covers)
            .expect("the mapping")
            .is_lazy_able()
    );
    let map = pagemap::read(&run.images, vpid).expect("an image");
    let length = |entry: &pagemap::Entry| entry.pages * pagemap::PAGE_SIZE;
    let outside =
        |entry: &pagemap::Entry| entry.start + length(entry) <= start || entry.start >= end;
    assert!(map.entries.iter().all(outside), "{map:?}");
    let size = fs::metadata(run.images.join(format!("pages-{}.img", map.pages_id)));
    assert!(size.expect("an image").len() < 2 << 20);
}

/// Restores with a page-fault side that has `contents` for the region.
async fn restore_lazily(run: &Run, workload: &Workload, contents: Vec<u8>) -> Server {
    let (bound, ready) = oneshot::channel();
    let work = run.work.clone();
    let start = workload.region.0;
    let faults =
        tokio::spawn(async move { take_over(&work, bound, Store { start, contents }).await });
    ready.await.expect("bound");
    let mut worker = Conversation::start(SwrkConfig {
        huge_pages: false,
        ..run.config()
    })
    .expect("criu");
    let options = RestoreOptions {
        lazy_pages: true,
        ..run.restore_options()
    };
    worker
        .request(Request::restore(options))
        .await
        .expect("criu listens");
    let mut held = false;
    let response = drive(&mut worker, |script| {
        if *script == NotifyScript::PostRestore {
            held = !workload.proc("status").is_empty();
        }
        true
    });
    let response = response.await.into_result().expect("restored");
    assert_eq!(response.pid, Some(workload.pid));
    assert!(held, "the tree is there at the gate");
    faults.await.expect("the page-fault side")
}

async fn a_half_hidden_mapping_is_dumped_in_part() {
    let mut workload = Workload::start(8);
    let run = Run::new();
    let (start, end) = workload.region;
    let hole = |from: u64, to: u64| (start + (from << 20), start + (to << 20));
    let mut feed = Feed::create().expect("memfd");
    feed.set_ranges(workload.pid, &[hole(1, 2), hole(4, 7)])
        .expect("pages");
    feed.publish().expect("room");
    let view = feed.share(LIBRARY.into()).expect("a descriptor");
    let mut worker = Conversation::start(SwrkConfig {
        view: Some(view),
        ..run.config()
    })
    .expect("criu");
    worker
        .request(Request::dump(run.dump_options(&workload)))
        .await
        .expect("criu listens");
    drive(&mut worker, |_| true)
        .await
        .into_result()
        .expect("dumped");
    workload.wait_until_killed();
    assert!(feed.counters().expect("readable").scans_cut > 0);
    let map = pagemap::read(&run.images, vpid(&workload)).expect("an image");
    for address in (start..end).step_by(4096) {
        let mebibyte = (address - start) >> 20;
        let hidden = mebibyte == 1 || (4..7).contains(&mebibyte);
        assert_eq!(map.entry_at(address).is_none(), hidden, "{address:#x}");
    }
}

async fn a_worker_inside_the_namespaces_of_a_workload_leaves_them_alone() {
    let mut workload = Workload::start_with(&["unshare", "--uts", "--ipc", "--"], 8, 0);
    let pid = workload.pid;
    let namespaces = || -> Vec<OwnedFd> {
        let open = |kind| File::open(format!("/proc/{pid}/ns/{kind}"));
        ["uts", "ipc"]
            .into_iter()
            .map(|kind| open(kind).expect("a process").into())
            .collect()
    };
    let names = || {
        let name = |kind| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ["uts", "ipc"].map(|kind| name(kind).expect("a live process"))
    };
    let before = names();
    assert_ne!(
        before[0],
        fs::read_link("/proc/self/ns/uts").expect("procfs")
    );
    let (for_dump, for_restore) = (namespaces(), namespaces());
    let run = Run::new();
    let config = SwrkConfig {
        namespaces: for_dump,
        ..run.config()
    };
    let mut worker = Conversation::start(config).expect("criu");
    worker
        .request(Request::dump(run.dump_options(&workload)))
        .await
        .expect("criu listens");
    drive(&mut worker, |_| true)
        .await
        .into_result()
        .expect("dumped");
    workload.wait_until_killed();
    let images = fs::read_dir(&run.images).expect("images");
    let images: Vec<_> = images
        .map(|entry| entry.expect("images").file_name())
        .collect();
    let of_namespace = |name: &&std::ffi::OsString| {
        let name = name.to_string_lossy();
        name.starts_with("utsns-") || name.starts_with("ipcns-")
    };
    assert_eq!(images.iter().find(of_namespace), None);

    let config = SwrkConfig {
        namespaces: for_restore,
        ..run.config()
    };
    let mut worker = Conversation::start(config).expect("criu");
    worker
        .request(Request::restore(run.restore_options()))
        .await
        .expect("criu listens");
    drive(&mut worker, |_| true)
        .await
        .into_result()
        .expect("restored");
    workload.check();
    assert_eq!(names(), before);
}

async fn a_dump_refused_at_its_gate_leaves_the_workload_running() {
    let workload = Workload::start(8);
    for gate in [NotifyScript::PreDump, NotifyScript::PostDump] {
        let run = Run::new();
        let mut worker = Conversation::start(run.config()).expect("criu");
        worker
            .request(Request::dump(run.dump_options(&workload)))
            .await
            .expect("criu listens");
        let response = drive(&mut worker, |script| *script != gate).await;
        let refused = response.into_result().expect_err("refused");
        assert!(refused.to_string().starts_with("criu failed"), "{refused}");
        let status = worker.wait().await.expect("our child");
        assert!(!status.expect("our child").success());
        workload.check();
    }
}

async fn a_dropped_worker_leaves_the_workload_running() {
    let workload = Workload::start(8);
    let run = Run::new();
    let mut worker = Conversation::start(run.config()).expect("criu");
    worker
        .request(Request::dump(run.dump_options(&workload)))
        .await
        .expect("criu listens");
    worker
        .until(&NotifyScript::PostDump, PATIENCE)
        .await
        .expect("criu talks");
    drop(worker);
    workload.check();
}

async fn a_failed_request_names_its_cause() {
    let run = Run::new();
    // Above the kernel's limit of process ids.
    let options = DumpOptions::new(0x7fff_0000, run.directories());
    let mut worker = Conversation::start(run.config()).expect("criu");
    worker
        .request(Request::dump(options))
        .await
        .expect("criu listens");
    assert!(matches!(
        worker.answer(true).await,
        Err(TalkError::NothingToAnswer)
    ));
    let response = drive(&mut worker, |_| true).await;
    response.into_result().expect_err("no such process");
    assert!(matches!(worker.next().await, Err(TalkError::Closed)));
    let cause = report::first_error(&run.work.join("dump.log")).expect("a log");
    let cause = cause.expect("an error").text;
    assert!(cause.contains("No such process"), "{cause}");
}

async fn a_worker_that_cannot_be_prepared_names_the_step() {
    let run = Run::new();
    let missing = PathBuf::from("/tmp/no-such-cgroup/cgroup.procs");
    let config = SwrkConfig {
        cgroup_procs: vec![missing.clone()],
        ..run.config()
    };
    let error = Conversation::start(config).expect_err("no such file");
    assert!(
        matches!(&error, StartError::Cgroup { path, .. } if *path == missing),
        "{error:?}"
    );
    let file = OwnedFd::from(File::open("/tmp").expect("a directory"));
    let error = Conversation::start(SwrkConfig {
        namespaces: vec![file],
        ..run.config()
    });
    assert!(
        matches!(error, Err(StartError::Namespace { index: 0, .. })),
        "{error:?}"
    );
    let nowhere = SwrkConfig::new("/no/such/criu".into(), run.work.join("criu.out"));
    let error = Conversation::start(nowhere).expect_err("no such file");
    assert!(matches!(error, StartError::Exec { .. }), "{error:?}");
}
