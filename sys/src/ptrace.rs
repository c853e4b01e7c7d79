//! Stopping threads of another process and looking at their registers; pidfds.
//!
//! The kernel ties a stopped thread to the *thread* that seized it: every call here but those on
//! pidfds must come from that one thread, and when it ends the kernel lets go of all it held.
//! `nix` is not used for waiting, because it has no real-time signals and a workload may have any.
//!
//! Absent: what to do with a stopped thread.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

/// What a wait has to tell of a traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `PTRACE_EVENT_STOP`: by [`interrupt`], or by a group stop; the thread is on its way back to
    /// user mode, with the result of the system call it was in, if any.
    Trap,
    /// About to receive this signal.
    Signal(i32),
    /// At the entry or the exit of a system call.
    Syscall,
    /// Another `PTRACE_EVENT_*`.
    Event(i32),
    /// The thread has ended.
    Ended,
}

/// How a stopped thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Until something happens to it.
    Freely,
    /// Until the next entry or exit of a system call.
    ToSyscall,
}

/// What becomes of a traced thread when the one that traces it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TracersEnd {
    /// It goes on with the registers it has.
    LetsGo,
    /// Its process is killed.
    Kills,
}

impl TracersEnd {
    const fn options(self) -> libc::c_int {
        match self {
            Self::LetsGo => libc::PTRACE_O_TRACESYSGOOD,
            Self::Kills => libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL,
        }
    }
}

/// Begins to trace thread `tid`; it goes on running. `EPERM`: traced already, ending, or not
/// allowed.
pub fn seize(tid: i32) -> io::Result<()> {
    seize_until(tid, TracersEnd::LetsGo)
}

/// The same; what becomes of it at the end of this thread is said.
pub fn seize_until(tid: i32, end: TracersEnd) -> io::Result<()> {
    let options = as_data(end.options());
    request(libc::PTRACE_SEIZE, tid, ptr::null_mut(), options)
}

/// Turns the seccomp filters of a stopped thread off until it is let go. Needs `CAP_SYS_ADMIN` and
/// a tracer without filters of its own (`EPERM`). `end` is what it was seized with.
pub fn suspend_seccomp(tid: i32, end: TracersEnd) -> io::Result<()> {
    let options = as_data(end.options() | PTRACE_O_SUSPEND_SECCOMP);
    request(libc::PTRACE_SETOPTIONS, tid, ptr::null_mut(), options)
}

/// Asks a traced thread to stop; it reports [`Stop::Trap`].
pub fn interrupt(tid: i32) -> io::Result<()> {
    request(
        libc::PTRACE_INTERRUPT,
        tid,
        ptr::null_mut(),
        ptr::null_mut(),
    )
}

/// Lets a stopped thread go on, with `signal` delivered when it stopped to receive one, else 0.
pub fn resume(tid: i32, how: Resume, signal: i32) -> io::Result<()> {
    let name = match how {
        Resume::Freely => libc::PTRACE_CONT,
        Resume::ToSyscall => libc::PTRACE_SYSCALL,
    };
    request(name, tid, ptr::null_mut(), as_data(signal))
}

/// Lets go of a stopped thread, with `signal` delivered as in [`resume`]. A group stop that began
/// in the meantime takes hold of it again.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, ptr::null_mut(), as_data(signal))
}

/// What has happened to `tid` since the last call; `None` when nothing has. Never blocks.
pub fn poll(tid: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    let flags = libc::__WALL | libc::WNOHANG | WNOTHREAD;
    // SAFETY: `status` is a valid place for the result.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, flags) };
    match waited {
        0 => Ok(None),
        _ if waited < 0 => Err(io::Error::last_os_error()),
        _ => Ok(Some(parse(status))),
    }
}

fn parse(status: libc::c_int) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | SYSCALL_GOOD => Stop::Syscall,
        0 => Stop::Signal(signal),
        PTRACE_EVENT_STOP => Stop::Trap,
        event => Stop::Event(event),
    }
}

/// The general registers of a stopped thread.
pub type Registers = libc::user_regs_struct;

/// Reads the registers of a stopped thread.
pub fn registers(tid: i32) -> io::Result<Registers> {
    // SAFETY: all fields are integers, for which zero is a value.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let mut area = libc::iovec {
        iov_base: (&raw mut registers).cast(),
        iov_len: size_of::<Registers>(),
    };
    request(
        libc::PTRACE_GETREGSET,
        tid,
        NT_PRSTATUS,
        (&raw mut area).cast(),
    )?;
    Ok(registers)
}

/// Replaces the registers of a stopped thread.
pub fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    let mut area = libc::iovec {
        // The kernel only reads through this pointer (PTRACE_SETREGSET).
        iov_base: ptr::from_ref(registers).cast_mut().cast(),
        iov_len: size_of::<Registers>(),
    };
    request(
        libc::PTRACE_SETREGSET,
        tid,
        NT_PRSTATUS,
        (&raw mut area).cast(),
    )
}

/// The blocked signals of a stopped thread, bit `n - 1` for signal `n`. For a thread in a call
/// that changed its mask for its own length (`ppoll`, `sigsuspend`) the mask after that call.
pub fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, MASK_BYTES, (&raw mut mask).cast())?;
    Ok(mask)
}

/// Replaces the blocked signals of a stopped thread.
pub fn set_signal_mask(tid: i32, mut mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, MASK_BYTES, (&raw mut mask).cast())
}

/// Whether a stopped thread sends its system calls to a handler of its own
/// (`PR_SET_SYSCALL_USER_DISPATCH`). False on kernels that cannot tell (before 6.4).
pub fn dispatches_syscalls(tid: i32) -> bool {
    let mut config = [0u64; 4];
    let size = ptr::without_provenance_mut(size_of_val(&config));
    let data = (&raw mut config).cast();
    let told = request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, data);
    told.is_ok() && config[0] != 0
}

/// Address of the `struct rseq` a stopped thread has registered; `None` without one, and on kernels
/// that cannot tell (before 5.13).
pub fn rseq_address(tid: i32) -> Option<u64> {
    // struct ptrace_rseq_configuration: address, then size, signature, flags and padding.
    let mut config = [0u64; 3];
    let size = ptr::without_provenance_mut(size_of_val(&config));
    let data = (&raw mut config).cast();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, data).ok()?;
    (config[0] != 0).then_some(config[0])
}

/// All `ptrace` calls of this module: requests that read or write at most the area `data` points
/// to, in the size the request implies.
fn request(
    name: libc::c_uint,
    tid: i32,
    address: *mut libc::c_void,
    data: *mut libc::c_void,
) -> io::Result<()> {
    // SAFETY: the callers above pass either plain numbers as `address` and `data`, or a pointer to
    // a live object of the very size and type the request uses. The memory of the other thread is
    // not touched by any of these requests, and what its registers make it do is outside of this
    // process.
    let result = unsafe { libc::ptrace(name, tid, address, data) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn as_data(number: i32) -> *mut libc::c_void {
    ptr::without_provenance_mut(number.cast_unsigned() as usize)
}

/// A descriptor of process `pid`.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A duplicate of descriptor `number` of the process behind `pidfd`, close-on-exec.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    owned(fd)
}

/// Whether the process behind `pidfd` has not ended: its pid still names it.
pub fn is_alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which lives across the call; it does not block.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// What two tasks may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// The address space (`KCMP_VM`).
    Memory,
    /// The table of descriptors (`KCMP_FILES`).
    Files,
}

/// Compares what two tasks have: `Equal` when it is one and the same. Less and greater are an order
/// the kernel keeps until the next boot. `ESRCH`: one of them has ended.
pub fn compare(a: i32, b: i32, shared: Shared) -> io::Result<std::cmp::Ordering> {
    let kind = match shared {
        Shared::Memory => KCMP_VM,
        Shared::Files => KCMP_FILES,
    };
    // SAFETY: takes five integers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, 0, 0) };
    match result {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 => Ok(std::cmp::Ordering::Greater),
        _ if result < 0 => Err(io::Error::last_os_error()),
        _ => Err(io::Error::other("the kernel cannot order these tasks")),
    }
}

/// Whether a descriptor of one task and one of another, each given as task and number, mean the
/// same open file (`KCMP_FILE`). `ESRCH`: a task has ended; `EBADF`: it has no such descriptor.
pub fn is_same_file(a: (i32, i32), b: (i32, i32)) -> io::Result<bool> {
    // SAFETY: takes five integers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1, b.1) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result == 0)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

// From include/uapi/linux/ptrace.h, elf.h, kcmp.h and wait.h; libc lacks these or has them for
// some targets only.
const PTRACE_O_SUSPEND_SECCOMP: libc::c_int = 1 << 21;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const PTRACE_EVENT_STOP: libc::c_int = 128;
const NT_PRSTATUS: *mut libc::c_void = ptr::without_provenance_mut(1);
const MASK_BYTES: *mut libc::c_void = ptr::without_provenance_mut(size_of::<u64>());
const WNOTHREAD: libc::c_int = 0x2000_0000;
const SYSCALL_GOOD: libc::c_int = 0x80;
const KCMP_FILE: libc::c_int = 0;
const KCMP_VM: libc::c_int = 1;
const KCMP_FILES: libc::c_int = 2;
