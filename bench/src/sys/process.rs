//! What the writer does to its own process: forks, filters, and the things a move may refuse.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Makes a child in this process's memory and waits until it has ended, as `vfork` does; its id.
/// The child does nothing but count in `beats` while `wanted` is not 0.
pub fn vfork_while(wanted: &AtomicU64, beats: &AtomicU64) -> io::Result<i32> {
    extern "C" fn stay(flags: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the two references below, whose owner waits in the kernel until this has ended.
        let [wanted, beats] = unsafe { *flags.cast::<[&AtomicU64; 2]>() };
        let moment = libc::timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000, // 2 ms
        };
        while wanted.load(Ordering::Acquire) != 0 {
            beats.fetch_add(1, Ordering::Release);
            // SAFETY: a time that lives across the call, and nobody asks for the rest.
            unsafe { libc::nanosleep(&raw const moment, std::ptr::null_mut()) };
        }
        0
    }
    let mut stack = vec![0_u128; VFORK_STACK / size_of::<u128>()];
    let mut flags = [wanted, beats];
    let top = stack.as_mut_ptr_range().end;
    let how = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack, aligned to 16 bytes, and the flags are there until the child has ended,
    // which is when this call returns. The child makes system calls only.
    let child = unsafe { libc::clone(stay, top.cast(), how, (&raw mut flags).cast()) };
    check(child)?;
    Ok(child)
}

const VFORK_STACK: usize = 64 << 10; // 64 KiB

/// Takes a write lease on a file that nobody else has open.
pub fn take_lease(file: &File) -> io::Result<()> {
    lease(file, libc::F_WRLCK)
}

/// Gives it up.
pub fn give_lease(file: &File) -> io::Result<()> {
    lease(file, libc::F_UNLCK)
}

fn lease(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: fcntl(F_SETLEASE) takes a descriptor and a number.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) })
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
