//! Attaching to processes of all kinds, and leaving them as they were.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::track::InjectError;

fn round_trip(trial: &mut Trial) -> Space {
    trial.tell(&format!("map {} 8 rw", at(0)));
    trial.tell(&format!("fill {} 8 1", at(0)));
    let mut space = attach(trial);
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, 8)]);
    trial.tell(&format!("fill {} 1 2", at(3)));
    assert_eq!(ours(&space.scan().unwrap().dirty), [(3, 1)]);
    space
}

fn descriptors(pid: i32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = entries.map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap());
    targets
        .map(|target| target.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn nothing_is_left_behind() {
    let mut trial = start();
    let before = descriptors(trial.pid());
    let space = round_trip(&mut trial);
    assert_eq!(descriptors(trial.pid()), before);
    for tid in task::threads(trial.pid()).unwrap() {
        assert_eq!(task::Status::read(tid).unwrap().tracer, 0);
    }
    let flag = |smaps: String| smaps.lines().any(|line| line.contains(" uw"));
    let smaps = || std::fs::read_to_string(format!("/proc/{}/smaps", trial.pid())).unwrap();
    assert!(flag(smaps()));
    space.detach();
    assert!(!flag(smaps()));
}

#[test]
fn a_process_may_be_attached_again() {
    let mut trial = start();
    round_trip(&mut trial).detach();
    let mut space = attach(&trial);
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, 8)]);
}

#[test]
fn a_process_without_rights_is_tracked() {
    let mut trial = start();
    trial.tell("uid");
    round_trip(&mut trial);
}

#[test]
fn a_filter_that_refuses_the_call_is_suspended() {
    let mut trial = start();
    trial.tell("uid");
    trial.tell("seccomp errno");
    round_trip(&mut trial);
}

#[test]
fn a_filter_that_kills_is_suspended_and_stays() {
    let mut trial = start();
    trial.tell("seccomp kill");
    round_trip(&mut trial);
    let pid = trial.pid();
    assert!(task::Status::read(pid).unwrap().seccomp);
}

#[test]
fn two_hundred_threads_are_stopped_and_go_on() {
    let mut trial = start();
    trial.tell("threads 200");
    let space = round_trip(&mut trial);
    assert!(200 <= space.attached().threads);
    let running = |tid| task::Status::read(tid).unwrap().state != b't';
    let threads = task::threads(trial.pid()).unwrap();
    eventually("letting go", || threads.iter().all(|&tid| running(tid)));
}

#[test]
fn a_process_that_makes_threads_all_the_time_is_attached() {
    let mut trial = start();
    trial.tell("storm");
    round_trip(&mut trial);
}

#[test]
fn a_stopped_process_is_attached_and_stays_stopped() {
    let mut trial = start();
    trial.tell(&format!("map {} 8 rw", at(0)));
    trial.tell(&format!("fill {} 8 1", at(0)));
    trial.signal(libc::SIGSTOP);
    let stopped = |pid| task::Status::read(pid).unwrap().state == b'T';
    let pid = trial.pid();
    eventually("the stop", || stopped(pid));
    let mut space = attach(&trial);
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, 8)]);
    eventually("the stop after attaching", || stopped(pid));
    trial.signal(libc::SIGCONT);
    trial.tell(&format!("fill {} 1 2", at(3)));
    assert_eq!(ours(&space.scan().unwrap().dirty), [(3, 1)]);
}

/// A few of these fit into every attempt. Signals that come faster than their stops can be told
/// (some 100 µs) leave the process no time to run anything at all, its own code included.
const BETWEEN_SIGNALS: Duration = Duration::from_micros(500);

#[test]
fn stops_and_continuations_in_between_hurt_nobody() {
    let mut trial = start();
    let pid = trial.pid();
    let over = AtomicBool::new(false);
    let attached = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                trial::signal(pid, libc::SIGSTOP);
                std::thread::sleep(BETWEEN_SIGNALS);
                trial::signal(pid, libc::SIGCONT);
                std::thread::sleep(BETWEEN_SIGNALS);
            }
        });
        // A panic in here would wait for the other thread, which would never end.
        let attached = (0..50).try_for_each(|_| {
            Space::attach(pid, &options())?.detach();
            Ok::<_, TrackError>(())
        });
        over.store(true, Ordering::Relaxed);
        attached
    });
    attached.unwrap();
    round_trip(&mut trial);
}

#[test]
fn whoever_shares_the_descriptors_is_stopped_too() {
    let mut trial = start();
    let answer = trial.tell("clone-vm");
    let sharer: i32 = answer.split(' ').next().unwrap().parse().unwrap();
    let other: i32 = trial.tell("fork").parse().unwrap();
    let own_threads = task::threads(trial.pid()).unwrap().len();
    let options = TrackOptions {
        tree: vec![trial.pid(), sharer, other],
        ..options()
    };
    let space = Space::attach(trial.pid(), &options).unwrap();
    assert_eq!(space.attached().threads, own_threads + 1);
    trial::kill(sharer);
    trial::kill(other);
}

#[test]
fn no_signal_is_lost() {
    let mut trial = start();
    trial.tell("count-signals");
    for _ in 0..20 {
        for _ in 0..25 {
            trial.signal(trial::counted_signal());
        }
        attach(&trial).detach();
    }
    eventually("the last signal", || trial.tell("signals") == "500");
}

#[test]
fn a_process_that_is_traced_is_refused() {
    let trial = start();
    // The test's own thread is the other tracer.
    pageferry_sys::ptrace::seize(trial.pid()).unwrap();
    let error = Space::attach(trial.pid(), &options()).unwrap_err();
    let TrackError::Inject {
        source: InjectError::Traced { tracer, .. },
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(tracer, nix::unistd::gettid().as_raw());
}

#[test]
fn memory_with_a_userfaultfd_of_another_is_named() {
    let mut trial = start();
    let space = round_trip(&mut trial);
    let error = Space::attach(trial.pid(), &options()).unwrap_err();
    assert!(matches!(error, TrackError::Foreign { .. }), "{error:?}");
    drop(space);
    attach(&trial);
}

#[test]
fn a_process_that_is_gone_is_named() {
    let trial = start();
    let pid = trial.pid();
    drop(trial);
    assert!(Space::attach(pid, &options()).is_err());
}
