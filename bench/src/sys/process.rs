//! What the writer does to its own process: forks, filters, and the things a move may refuse.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::{Cloned, check};

/// Plain fork.
///
/// The child of a process with several threads must keep to system calls and its own memory.
pub fn fork() -> io::Result<Cloned> {
    // SAFETY: callers keep to the contract above; the lab's writer forks from one thread, or does
    // nothing but check memory and exit in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent(pid)),
    }
}

/// Ends this process without any clean-up of libc: for forked children.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes no pointers and does not return.
    unsafe { libc::_exit(code) }
}

/// What happens to a forbidden call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It fails with EPERM.
    Refuse,
    /// It kills the process.
    Kill,
}

/// Installs a seccomp filter that forbids `userfaultfd` and allows all else, as the default
/// profiles of container runtimes do.
pub fn forbid_userfaultfd(verdict: Verdict) -> io::Result<()> {
    let forbidden = match verdict {
        Verdict::Refuse => libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        Verdict::Kill => libc::SECCOMP_RET_KILL_PROCESS,
    };
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let number = libc::SYS_userfaultfd as u32;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let mut filter = [
        // Offset 0 of seccomp_data is the system call's number.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: equal,
            jt: 0,
            jf: 1,
            k: number,
        },
        statement(libc::BPF_RET | libc::BPF_K, forbidden),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: this prctl takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: program and the filter it points to outlive the call, which copies them.
    check(unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
            0,
            0,
        )
    })
}

/// Becomes the tracer of a child, which goes on running.
pub fn trace(pid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE takes no pointers with these arguments.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SEIZE,
            pid,
            std::ptr::null_mut::<u8>(),
            std::ptr::null_mut::<u8>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An asynchronous I/O context, which lives until the process ends.
pub fn make_aio_context() -> io::Result<()> {
    let mut context: libc::c_ulong = 0;
    // SAFETY: context is a valid place for the id, initialised with 0 as io_setup asks.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 8, &raw mut context) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An io_uring instance.
pub fn make_io_uring() -> io::Result<OwnedFd> {
    // struct io_uring_params of linux/io_uring.h: 120 bytes, all zero for the defaults.
    let mut parameters = [0u64; 15];
    // SAFETY: the parameters are valid for reading and writing 120 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    check(fd)?;
    // SAFETY: the kernel just returned it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
