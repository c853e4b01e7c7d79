//! CRIU's side: `ptrace`, `wait4` and `waitpid`, passed to the tracer where they concern a tracee.
//!
//! A thread is a tracee from its `PTRACE_SEIZE` under a published feed on. Children of CRIU's own,
//! of which its probes trace some, are waited for and traced as ever.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_long, c_uint, c_void};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};
use std::time::Duration;

use crate::channel::{Call, Channel, PEEK_BYTES, POSTED_BYTES, Shape, Shared, What};
use crate::frozen::Seizure;
use crate::request::{answer_at_once, keeps_known, passed, take_back, tells_a_word};
use crate::told::{Post, Told};
use crate::{fork, kernel};

/// The two ends: CRIU's process, which may use the channel, and the tracer's.
static OWNER: AtomicI32 = AtomicI32::new(0);
static TRACER: AtomicI32 = AtomicI32::new(0);
static CHANNEL: AtomicPtr<Channel> = AtomicPtr::new(ptr::null_mut());
static GONE: AtomicBool = AtomicBool::new(false);

/// Held for the length of a call, with SIGCHLD blocked: CRIU's handler for it waits, too.
static TRACEES: Mutex<Tracees> = Mutex::new(Tracees {
    seen: BTreeMap::new(),
    posted: Vec::new(),
});

struct Tracees {
    seen: BTreeMap<i32, Seen>,
    /// What goes with the next call, see [`crate::told`].
    posted: Vec<u8>,
}

/// What is known of a tracee here.
#[derive(Default)]
struct Seen {
    /// Since it stopped, if nothing was done to it.
    known: Vec<u8>,
    /// The status with which it has stopped, where CRIU has not waited for that.
    stop: Option<i32>,
}

impl Tracees {
    /// What the tracer has told besides its answer.
    fn learn(seen: &mut BTreeMap<i32, Seen>, call: &Call) {
        let mut list = call.besides.get(..call.told).unwrap_or_default();
        while let Some((told, rest)) = Told::first(list) {
            if let Some(seen) = seen.get_mut(&told.tid) {
                if told.stop.is_some() {
                    seen.stop = told.stop;
                    seen.known.clear();
                }
                seen.known.extend_from_slice(told.known);
            }
            list = rest;
        }
    }

    /// A stop that CRIU waits for and that was told already.
    fn take_stop(&mut self, pid: i32) -> Option<(i64, i32)> {
        let mut told = self.seen.iter_mut().filter(|(_, seen)| seen.stop.is_some());
        let (tid, seen) = if pid > 0 {
            (pid, self.seen.get_mut(&pid)?)
        } else {
            told.next().map(|(tid, seen)| (*tid, seen))?
        };
        Some((tid.into(), seen.stop.take()?))
    }
}

/// From now on `shared` leads to the tracer.
pub fn attach(shared: Shared, owner: i32, tracer: i32) {
    OWNER.store(owner, Ordering::Relaxed);
    TRACER.store(tracer, Ordering::Relaxed);
    CHANNEL.store(shared.as_ptr(), Ordering::Release);
}

/// `ptrace(2)`. Not variadic: on x86-64 the arguments are in the same registers.
///
/// # Safety
/// As for that.
pub unsafe fn ptrace(request: c_uint, pid: c_int, address: u64, data: u64) -> c_long {
    let seizes = request == kernel::SEIZE && fork::dumps();
    let remote = with_tracees(|tracees| {
        let seen = tracees.seen.get_mut(&pid);
        if seen.is_none() && !seizes {
            return None;
        }
        if let Some(seen) = seen {
            let known = &mut seen.known;
            if let Some(result) = answer_at_once(known, (request, pid, address, data)) {
                return Some(checked(result));
            }
            if !keeps_known(request, data) {
                known.clear();
            }
            if matches!(request, kernel::CONT | kernel::SYSCALL) {
                // Whoever runs again has nobody waited for.
                seen.stop = None;
            }
            if post(&mut tracees.posted, (request, pid, address, data)) {
                return Some(Ok(0));
            }
        }
        let result = if seizes {
            seize(tracees, pid, address, data)
        } else {
            ptrace_remotely(tracees, (request, pid, address, data), None)
        };
        if result.is_ok() && request == kernel::DETACH {
            tracees.seen.remove(&pid);
        }
        Some(result)
    });
    if let Some(result) = remote {
        return finish(result);
    }
    let mut word = 0_i64;
    if tells_a_word(request) {
        let result = checked(kernel::ptrace(
            request,
            pid,
            address,
            (&raw mut word) as u64,
        ));
        return finish(result.map(|_| word));
    }
    finish(checked(kernel::ptrace(request, pid, address, data)))
}

fn seize(tracees: &mut Tracees, pid: i32, address: u64, data: u64) -> Result<i64, i32> {
    let mut seizure = Seizure::new(pid, TRACER.load(Ordering::Relaxed));
    let is_new = !tracees.seen.contains_key(&pid);
    tracees.seen.entry(pid).or_default();
    let call = (kernel::SEIZE, pid, address, data);
    let mut result = ptrace_remotely(tracees, call, Some(&mut seizure));
    if result.is_ok() && !seizure.end() {
        let call = (kernel::DETACH, pid, 0, 0);
        // The tracer is gone or has let go of it.
        let _ = ptrace_remotely(tracees, call, None);
        result = Err(libc::EPERM);
    }
    if result.is_err() && is_new {
        tracees.seen.remove(&pid);
    }
    result
}

/// `wait4(2)`.
///
/// # Safety
/// As for that.
pub unsafe fn wait4(pid: c_int, status: *mut c_int, options: c_int, usage: *mut c_void) -> c_int {
    let remote = loop {
        let waited = with_tracees(|tracees| wait_once(tracees, pid, options));
        if !matches!(waited, Some((0, _))) || options & libc::WNOHANG != 0 {
            break waited;
        }
        // Children of CRIU and tracees, and none has anything to tell.
        std::thread::sleep(Duration::from_micros(100));
    };
    let Some((result, told)) = remote else {
        // Among any, the tracer is not meant: a child that only `__WALL` finds.
        let hidden = pid == -1 && has_tracer();
        let options = if hidden {
            options & !libc::__WALL
        } else {
            options
        };
        // SAFETY: passed on as it came.
        let result = unsafe { libc::syscall(libc::SYS_wait4, pid, status, options, usage) };
        return c_int::try_from(result).unwrap_or(-1);
    };
    if result > 0 && !status.is_null() {
        // SAFETY: the caller passes a place for the status, or null.
        unsafe { status.write(told) };
    }
    c_int::try_from(finish(checked(result))).unwrap_or(-1)
}

/// `None` for CRIU's own children, 0 when nobody had anything to tell.
fn wait_once(tracees: &mut Tracees, pid: i32, options: i32) -> Option<(i64, i32)> {
    if pid > 0 {
        if !tracees.seen.contains_key(&pid) {
            return None;
        }
        let told = tracees.take_stop(pid);
        return told.or_else(|| Some(wait_remotely(tracees, pid, options)));
    }
    if pid != -1 || tracees.seen.is_empty() {
        return None;
    }
    let own = kernel::wait(pid, (options | libc::WNOHANG) & !libc::__WALL);
    let childless = own.0 == -i64::from(libc::ECHILD);
    if own.0 != 0 && !childless {
        return Some(own);
    }
    if let Some(told) = tracees.take_stop(pid) {
        return Some(told);
    }
    let patience = if childless { 0 } else { libc::WNOHANG };
    Some(wait_remotely(tracees, pid, options | patience))
}

fn wait_remotely(tracees: &mut Tracees, pid: i32, options: i32) -> (i64, i32) {
    let fill = |call: &mut Call| {
        call.what = What::Wait(options);
        call.pid = pid;
    };
    let Tracees { seen, posted } = tracees;
    let read = |call: &Call, interrupted| {
        if let Ok(tid @ 1..) = i32::try_from(call.result) {
            if libc::WIFSTOPPED(call.status) {
                seen.insert(tid, Seen::default());
            } else {
                seen.remove(&tid);
            }
        }
        Tracees::learn(seen, call);
        match call.result {
            0 if interrupted && options & libc::WNOHANG == 0 => (-i64::from(libc::EINTR), 0),
            result => (result, call.status),
        }
    };
    let gone = (-i64::from(libc::ECHILD), 0);
    let (result, status) = ask(posted, None, fill, read).unwrap_or(gone);
    if result == gone.0 && pid == -1 {
        tracees.seen.clear();
    }
    (result, status)
}

/// Keeps a change for the next call. Registers and masks matter when a thread goes on, for which a
/// call is needed; memory is seen by others at once, and is never kept.
fn post(posted: &mut Vec<u8>, (request, pid, address, data): (u32, i32, u64, u64)) -> bool {
    let kept = matches!(
        request,
        kernel::SETOPTIONS | kernel::SETSIGMASK | kernel::SETREGSET
    );
    let Some(passed) = passed(request, address, data).filter(|_| kept) else {
        return false;
    };
    let bytes = if passed.at.is_null() {
        &[]
    } else {
        // SAFETY: the caller passes as many bytes as the request implies.
        unsafe { std::slice::from_raw_parts(passed.at, passed.length) }
    };
    let post = Post {
        request,
        shape: passed.shape,
        pid,
        address,
        data,
        length: bytes.len(),
    };
    post.append(posted, bytes, POSTED_BYTES)
}

/// The result, or the error's number.
fn ptrace_remotely(
    tracees: &mut Tracees,
    (request, pid, address, data): (u32, i32, u64, u64),
    seizure: Option<&mut Seizure>,
) -> Result<i64, i32> {
    let passed = passed(request, address, data).ok_or(libc::EIO)?;
    let fill = |call: &mut Call| {
        call.what = What::Ptrace(request);
        call.shape = passed.shape;
        call.pid = pid;
        (call.address, call.data) = (address, data);
        call.length = passed.length;
        if passed.shape == Shape::Both {
            // SAFETY: the caller passes a `ptrace_peeksiginfo_args`.
            unsafe { ptr::copy(address as *const u8, call.buffer.as_mut_ptr(), PEEK_BYTES) };
        } else if !passed.at.is_null() {
            // SAFETY: the caller passes as many bytes as the request implies, no more than there
            // is room for.
            unsafe { ptr::copy(passed.at, call.buffer.as_mut_ptr(), passed.length) };
        }
    };
    let Tracees { seen, posted } = tracees;
    let answer = ask(posted, seizure, fill, |call, _| {
        Tracees::learn(seen, call);
        let result = checked(call.result)?;
        let word = call
            .buffer
            .first_chunk()
            .map(|word| i64::from_ne_bytes(*word));
        if tells_a_word(request) {
            return Ok(word.unwrap_or_default());
        }
        take_back(request, &passed, call, data);
        Ok(result)
    });
    answer.unwrap_or(Err(libc::ESRCH))
}

fn ask<T>(
    posted: &mut Vec<u8>,
    mut seizure: Option<&mut Seizure>,
    fill: impl FnOnce(&mut Call),
    read: impl FnOnce(&Call, bool) -> T,
) -> Option<T> {
    let shared = Shared::from_ptr(CHANNEL.load(Ordering::Acquire))?;
    let tracer = TRACER.load(Ordering::Relaxed);
    if GONE.load(Ordering::Relaxed) {
        return None;
    }
    fork::count();
    let fill = |call: &mut Call| {
        // SAFETY: no arguments.
        call.cpu = unsafe { libc::sched_getcpu() };
        call.posts = posted.len();
        call.posted[..posted.len()].copy_from_slice(posted);
        posted.clear();
        fill(call);
    };
    // SAFETY: numbers only; the tracer is a child nobody else waits for.
    let notify = || unsafe {
        libc::kill(tracer, kernel::ASKED);
    };
    let patience = if seizure.is_some() {
        SEIZURE_PATIENCE
    } else {
        PATIENCE
    };
    let alive = || {
        if let Some(seizure) = &mut seizure {
            seizure.look();
        }
        kernel::wait(tracer, libc::__WALL | libc::WNOHANG).0 == 0
    };
    let answer = shared.ask(fill, notify, patience, alive, read);
    GONE.store(answer.is_none(), Ordering::Relaxed);
    answer
}

/// False in what CRIU forks.
pub fn has_tracer() -> bool {
    // SAFETY: no arguments.
    let own = unsafe { libc::getpid() };
    !CHANNEL.load(Ordering::Acquire).is_null() && own == OWNER.load(Ordering::Relaxed)
}

/// `None` where there is no tracer, and in what CRIU forks.
fn with_tracees<T>(act: impl FnOnce(&mut Tracees) -> Option<T>) -> Option<T> {
    if !has_tracer() {
        return None;
    }
    let before = kernel::block(kernel::mask_of(&[libc::SIGCHLD]));
    let result = TRACEES
        .lock()
        .ok()
        .and_then(|mut tracees| act(&mut tracees));
    kernel::unblock_to(before);
    result
}

fn checked(result: i64) -> Result<i64, i32> {
    match i32::try_from(result) {
        Ok(error) if error < 0 => Err(-error),
        _ => Ok(result),
    }
}

/// As the C library returns it. A word of memory may look like an error, and is none: errno tells.
fn finish(result: Result<i64, i32>) -> c_long {
    // SAFETY: the C library's own errno of this thread.
    unsafe { *libc::__errno_location() = result.err().unwrap_or_default() };
    result.unwrap_or(-1)
}

/// How often it is looked whether the tracer is there.
const PATIENCE: Duration = Duration::from_millis(100);

/// A seizure takes microseconds, or does not end.
const SEIZURE_PATIENCE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_that_was_told_is_waited_for_once() {
        let mut buffer = [0; 64];
        let mut call = Box::new(Call::NOTHING);
        call.told = Told::head(&mut buffer, 7, Some(0x57f), 0);
        call.besides[..64].copy_from_slice(&buffer);
        let mut tracees = Tracees {
            seen: BTreeMap::from([(7, Seen::default()), (8, Seen::default())]),
            posted: Vec::new(),
        };
        tracees.seen.insert(
            7,
            Seen {
                known: vec![1],
                stop: None,
            },
        );
        Tracees::learn(&mut tracees.seen, &call);
        assert!(tracees.seen[&7].known.is_empty(), "it ran since");
        assert_eq!(tracees.take_stop(8), None);
        assert_eq!(tracees.take_stop(-1), Some((7, 0x57f)));
        assert_eq!((tracees.take_stop(-1), tracees.take_stop(7)), (None, None));
    }
}
