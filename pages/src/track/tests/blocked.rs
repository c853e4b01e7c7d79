//! System calls that are going on while a process is attached.

use super::*;

/// Makes one thread call the kernel, whatever it is doing.
fn borrow_from_thread(pid: i32, tid: i32) {
    let call = |thread: &mut pageferry_inject::Borrowed<'_>| {
        thread.call("getpid", libc::SYS_getpid, [0; 3])
    };
    let own = pageferry_inject::with_thread(pid, tid, Duration::from_secs(5), call);
    assert_eq!(own.unwrap(), u64::try_from(pid).unwrap());
}

/// Blocks a thread of a trial process in `call`, attaches several times, lets the call end as `end`
/// says, and returns what the call returned.
fn interrupted(call: &str, number: i64, end: impl FnOnce(&mut Trial, &str)) -> String {
    let mut trial = start();
    let blocked = trial.tell(&format!("block {call}"));
    let words: Vec<&str> = blocked.split(' ').collect();
    let (tid, pipe) = (words[1], words[2].to_owned());
    let path = format!("/proc/{tid}/syscall");
    let inside = || {
        let text = std::fs::read_to_string(&path).unwrap();
        text.split(' ').next() == Some(number.to_string().as_str())
    };
    eventually("the call", inside);
    for _ in 0..3 {
        attach(&trial).detach();
        borrow_from_thread(trial.pid(), tid.parse().unwrap());
    }
    end(&mut trial, &pipe);
    trial.answer()
}

/// The answer to the order comes from one thread and the end of the call from another.
fn poke(trial: &mut Trial, pipe: &str) {
    trial.tell_silently(&format!("poke {pipe}"));
}

fn wait(_: &mut Trial, _: &str) {}

#[test]
fn a_read_returns_what_comes_later() {
    assert_eq!(interrupted("read", libc::SYS_read, poke), "returned 1 0");
}

#[test]
fn an_epoll_wait_returns_its_event() {
    assert_eq!(
        interrupted("epoll", libc::SYS_epoll_wait, poke),
        "returned 1 0"
    );
}

#[test]
fn a_poll_returns_its_event() {
    assert_eq!(interrupted("poll", libc::SYS_poll, poke), "returned 1 0");
}

#[test]
fn a_poll_with_a_mask_of_its_own_returns_its_event() {
    assert_eq!(interrupted("ppoll", libc::SYS_ppoll, poke), "returned 1 0");
}

#[test]
fn a_sleep_ends_without_an_error() {
    assert_eq!(
        interrupted("nanosleep", libc::SYS_clock_nanosleep, wait),
        "returned 0 0"
    );
}

#[test]
fn a_futex_times_out() {
    let answer = interrupted("futex", libc::SYS_futex, wait);
    assert_eq!(answer, format!("returned -1 {}", libc::ETIMEDOUT));
}

#[test]
fn a_wait_for_a_signal_times_out() {
    let answer = interrupted("sigtimedwait", libc::SYS_rt_sigtimedwait, wait);
    assert_eq!(answer, format!("returned -1 {}", libc::EAGAIN));
}

/// Its thread cannot be stopped, but does not run either.
#[test]
fn a_vfork_goes_on_until_its_child_ends() {
    let mut trial = start();
    let blocked = trial.tell("block vfork");
    let words: Vec<&str> = blocked.split(' ').collect();
    let tid: i32 = words[1].parse().unwrap();
    eventually("the vfork", || task::is_uninterruptible(tid));
    for _ in 0..3 {
        attach(&trial).detach();
    }
    assert!(task::is_uninterruptible(tid));
    poke(&mut trial, words[2]);
    assert_eq!(trial.answer(), "returned 1 0");
}
