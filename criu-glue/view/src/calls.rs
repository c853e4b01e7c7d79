//! CRIU's calls that its tracer has to know of, taken over and passed to it.
//!
//! What they do stands in the crate `criu_tracer`. It knows nothing of views: that a dump is under
//! way, as a published feed says, is told from here.

use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::path::Path;

use criu_tracer::Host;

use crate::feed::{self, Feed};
use crate::layout::{ALONE_VARIABLE, Counter, FREEZER_VARIABLE};

/// Forks the tracer of this process, which has found a feed and has one thread, if it is to have
/// one.
pub fn attach() {
    let host = Host {
        dumps: || Feed::current().is_some(),
        asked: || feed::count(Counter::TracerAsked),
    };
    let freezer = feed::variable(FREEZER_VARIABLE);
    if feed::variable(ALONE_VARIABLE).is_none() {
        criu_tracer::start(host, freezer.as_deref().map(Path::new));
    }
}

/// `ptrace(2)`. Not variadic: on x86-64 the arguments are in the same registers.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn ptrace(request: c_uint, pid: c_int, address: u64, data: u64) -> c_long {
    // SAFETY: passed on as it came.
    unsafe { criu_tracer::ptrace(request, pid, address, data) }
}

/// `waitpid(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int {
    // SAFETY: passed on as it came; nobody asks what was used.
    unsafe { criu_tracer::wait4(pid, status, options, std::ptr::null_mut()) }
}

/// `wait4(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn wait4(pid: c_int, status: *mut c_int, options: c_int, usage: *mut c_void) -> c_int {
    // SAFETY: passed on as it came.
    unsafe { criu_tracer::wait4(pid, status, options, usage) }
}

/// `setsockopt(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> c_int {
    // SAFETY: passed on as it came.
    unsafe { criu_tracer::setsockopt(fd, level, name, value, length) }
}

/// `linkat(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn linkat(
    from: c_int,
    from_path: *const c_char,
    directory: c_int,
    path: *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: passed on as it came.
    unsafe { criu_tracer::linkat(from, from_path, directory, path, flags) }
}

/// `unlinkat(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: passed on as it came.
    unsafe { criu_tracer::unlinkat(directory, path, flags) }
}
