//! A restored root that adopts orphans before there are any.
//!
//! A process whose session's leader is dead was adopted by the root of its tree. CRIU restores it
//! as a child of a helper that leads the session and ends, and waits for the root to adopt it. That
//! is what the init of a pid namespace does; any other root must be a child subreaper by then, and
//! CRIU makes it one only at the end. So where it is asked for, the root becomes one when it
//! becomes the leader of its own session, which is before it has children.
//!
//! Invariant: only the first process that CRIU forks and that leads a session is changed; CRIU's
//! own memory, and this library in it, is gone from a process before it runs.

use std::ffi::{CString, c_int};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Whether there is a root to be changed, and CRIU itself.
static WANTED: AtomicBool = AtomicBool::new(false);
static OWNER: AtomicI32 = AtomicI32::new(0);

/// Takes from the environment whether it is asked for. In a process that has one thread.
pub fn attach() {
    let Ok(name) = CString::new(crate::layout::REAPER_VARIABLE) else {
        return;
    };
    // SAFETY: a C string; nobody else reads or changes the environment meanwhile.
    let is_wanted = unsafe { !libc::getenv(name.as_ptr()).is_null() };
    if is_wanted {
        // SAFETY: as before.
        unsafe { libc::unsetenv(name.as_ptr()) };
        // SAFETY: no arguments.
        OWNER.store(unsafe { libc::getpid() }, Ordering::Relaxed);
        WANTED.store(true, Ordering::Relaxed);
    }
}

/// `setsid(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn setsid() -> c_int {
    // SAFETY: no arguments.
    let session = unsafe { libc::syscall(libc::SYS_setsid) };
    // SAFETY: no arguments.
    let is_owner = unsafe { libc::getpid() } == OWNER.load(Ordering::Relaxed);
    // Whoever is forked from now on finds that it is done.
    if 0 < session && !is_owner && WANTED.swap(false, Ordering::Relaxed) {
        let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
        // SAFETY: numbers only. Should it fail, CRIU waits for an adoption that does not come, and
        // its daemon for CRIU no longer than it may take.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, on, unused, unused, unused) };
    }
    c_int::try_from(session).unwrap_or(-1)
}
