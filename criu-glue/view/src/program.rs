//! Which program this library was preloaded into.

use std::ffi::{CStr, c_char};

/// Whether this is the interpreter of a script. A script in CRIU's place (to set a limit, or to
/// find the right version) becomes CRIU by `exec` in the end, and must hand on what was meant for
/// that: nothing in its environment may be touched.
pub fn is_interpreter() -> bool {
    // SAFETY: a number; the kernel passes the address of a C string that lives as long as the
    // process, or nothing.
    let executed = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const c_char;
    if executed.is_null() {
        return false;
    }
    // SAFETY: as above.
    let executed = unsafe { CStr::from_ptr(executed) };
    let (executed, running) = (identity(executed), identity(c"/proc/self/exe"));
    executed.is_some() && running.is_some() && executed != running
}

/// Device and inode of a file.
fn identity(path: &CStr) -> Option<(u64, u64)> {
    // SAFETY: a zeroed stat is a valid one to be written to.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a C string and a writable stat.
    let known = unsafe { libc::stat(path.as_ptr(), &raw mut stat) } == 0;
    known.then_some((stat.st_dev, stat.st_ino))
}
