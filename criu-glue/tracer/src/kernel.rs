//! The system calls of the tracer, one thread of one process.
//!
//! They go to the kernel directly: the C library's names are those this library interposes.

use std::io;
use std::ptr;
use std::time::{Duration, Instant};

/// The general registers, as `PTRACE_GETREGSET` with `NT_PRSTATUS` tells them.
pub type Registers = libc::user_regs_struct;

/// Bytes of the extended state this has room for; AMX makes it 11 KiB.
pub const EXTENDED_BYTES: usize = 16 << 10;

/// What made a tracee stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The entry or the exit of a system call.
    Syscall,
    /// A signal that is about to be delivered: it is lost unless it is sent again.
    Signal(i32),
    /// An event, or a trap or a fault of the code it runs, which comes again by itself.
    Other,
    /// It has ended.
    Ended,
}

impl Stop {
    pub fn from_status(status: i32) -> Self {
        if !libc::WIFSTOPPED(status) {
            Self::Ended
        } else if libc::WSTOPSIG(status) == libc::SIGTRAP | SYSCALL_GOOD {
            Self::Syscall
        } else if status >> 16 == 0 && !OF_THE_CODE.contains(&libc::WSTOPSIG(status)) {
            Self::Signal(libc::WSTOPSIG(status))
        } else {
            Self::Other
        }
    }
}

const OF_THE_CODE: [i32; 5] = [
    libc::SIGTRAP,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];

/// `ptrace`; a negative error number or the result.
pub fn ptrace(request: u32, pid: i32, address: u64, data: u64) -> i64 {
    // SAFETY: `address` and `data` are numbers, or point to memory of the size the request implies:
    // the callers below and in `serve` see to that.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, u64::from(request), pid, address, data) };
    or_errno(result)
}

/// `wait4`; a negative error number, 0 or who it was, and the status.
pub fn wait(pid: i32, options: i32) -> (i64, i32) {
    let mut status = 0_i32;
    let nothing = ptr::null::<u8>();
    // SAFETY: `status` lives across the call.
    let result = unsafe { libc::syscall(libc::SYS_wait4, pid, &raw mut status, options, nothing) };
    (or_errno(result), status)
}

/// Whether a tracee has something to tell that nobody has waited for.
pub fn somebody_waits_to_be_heard() -> bool {
    let options = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
    wait_info(libc::P_ALL, 0, options).is_some()
}

/// The status with which `tid` has stopped, if nobody has waited for that. An end is left to be
/// waited for.
pub fn stop_of(tid: i32) -> Option<i32> {
    let info = wait_info(libc::P_PID, tid, libc::WSTOPPED | libc::WNOHANG)?;
    // SAFETY: filled by the kernel, for a tracee that has stopped.
    let code = unsafe { info.si_status() };
    // As wait4 has it: `wait_task_stopped` in kernel/exit.c.
    Some(code << 8 | 0x7f)
}

fn wait_info(kind: libc::idtype_t, id: i32, options: i32) -> Option<libc::siginfo_t> {
    // SAFETY: all integers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let at = &raw mut info;
    let options = options | libc::__WALL;
    let nothing = ptr::null::<u8>();
    // SAFETY: `info` lives across the call.
    let result = unsafe { libc::syscall(libc::SYS_waitid, kind, id, at, options, nothing) };
    // SAFETY: filled by the kernel, or zero.
    let found = result == 0 && unsafe { info.si_pid() } != 0;
    found.then_some(info)
}

/// Whether the number of this thread is that of its process.
pub fn is_first_thread(tid: i32) -> bool {
    // SAFETY: numbers only; signal 0 is never sent.
    unsafe { libc::syscall(libc::SYS_tgkill, tid, tid, 0) == 0 }
}

/// Lets others run that wait for this processor.
pub fn give_way() {
    // SAFETY: no arguments.
    unsafe { libc::sched_yield() };
}

pub fn registers(tid: i32) -> Option<Registers> {
    // SAFETY: all integers, for which zero is a value.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let mut area = area(&raw mut registers);
    let result = ptrace(GETREGSET, tid, NT_PRSTATUS, (&raw mut area) as u64);
    (result == 0).then_some(registers)
}

pub fn set_registers(tid: i32, mut registers: Registers) -> bool {
    let mut area = area(&raw mut registers);
    ptrace(SETREGSET, tid, NT_PRSTATUS, (&raw mut area) as u64) == 0
}

/// Registers as the kernel writes them, if they are those of a 64-bit program.
pub fn registers_in(bytes: &[u8]) -> Option<Registers> {
    if bytes.len() != size_of::<Registers>() {
        return None;
    }
    // SAFETY: as many bytes as the struct has, all integers; read without alignment.
    Some(unsafe { bytes.as_ptr().cast::<Registers>().read_unaligned() })
}

/// Reads a set of registers of a stopped thread into `into`; how many bytes there are of it.
///
/// The length of `into` is a multiple of a register's.
pub fn register_set(tid: i32, set: u64, into: &mut [u8]) -> Option<usize> {
    let mut area = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    let result = ptrace(GETREGSET, tid, set, (&raw mut area) as u64);
    (result == 0).then_some(area.iov_len)
}

fn area(registers: *mut Registers) -> libc::iovec {
    libc::iovec {
        iov_base: registers.cast(),
        iov_len: size_of::<Registers>(),
    }
}

/// Floating point and vector registers.
pub fn extended(tid: i32) -> Option<Vec<u8>> {
    let mut state = vec![0; EXTENDED_BYTES];
    let length = register_set(tid, NT_X86_XSTATE, &mut state)?;
    state.truncate(length);
    Some(state)
}

pub fn set_extended(tid: i32, state: &mut [u8]) -> bool {
    let mut area = libc::iovec {
        iov_base: state.as_mut_ptr().cast(),
        iov_len: state.len(),
    };
    ptrace(SETREGSET, tid, NT_X86_XSTATE, (&raw mut area) as u64) == 0
}

/// Blocked signals.
pub fn mask(tid: i32) -> Option<u64> {
    let mut mask = 0_u64;
    let result = ptrace(GETSIGMASK, tid, MASK_BYTES, (&raw mut mask) as u64);
    (result == 0).then_some(mask)
}

pub fn set_mask(tid: i32, mut mask: u64) -> bool {
    ptrace(SETSIGMASK, tid, MASK_BYTES, (&raw mut mask) as u64) == 0
}

/// Eight bytes of a tracee's memory.
pub fn word(tid: i32, address: u64) -> Option<u64> {
    let mut word = 0_u64;
    let result = ptrace(PEEKDATA, tid, address, (&raw mut word) as u64);
    (result == 0).then_some(word)
}

/// The same without tracing it.
pub fn peek(tid: i32, address: u64) -> Option<u64> {
    let mut word = 0_u64;
    let own = libc::iovec {
        iov_base: (&raw mut word).cast(),
        iov_len: size_of::<u64>(),
    };
    let theirs = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: size_of::<u64>(),
    };
    // SAFETY: one word of our own is written, which lives across the call.
    let read = unsafe { libc::process_vm_readv(tid, &raw const own, 1, &raw const theirs, 1, 0) };
    (read == 8).then_some(word)
}

pub fn set_word(tid: i32, address: u64, word: u64) -> bool {
    ptrace(POKEDATA, tid, address, word) == 0
}

/// Sends a signal to one thread.
pub fn send(tid: i32, signal: i32) {
    // SAFETY: numbers only. One that has ended needs none.
    unsafe { libc::syscall(libc::SYS_tkill, tid, signal) };
}

/// Waits for a tracee's next stop; `None` after `limit`.
pub fn next_stop(tid: i32, limit: Duration) -> Option<Stop> {
    let deadline = Instant::now() + limit;
    loop {
        let (result, status) = wait(tid, libc::__WALL | libc::WNOHANG);
        if result < 0 {
            return Some(Stop::Ended);
        }
        if result > 0 {
            return Some(Stop::from_status(status));
        }
        let left = deadline.checked_duration_since(Instant::now())?;
        next_signal(Some(left.min(Duration::from_millis(10))));
    }
}

/// Why the tracer wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// CRIU asks for something.
    Asked,
    /// A tracee has stopped or ended.
    Child,
    /// CRIU has ended.
    Orphaned,
    /// Nothing in time.
    None,
}

pub const ASKED: i32 = libc::SIGUSR2;
pub const ORPHANED: i32 = libc::SIGUSR1;

/// Takes the next of the signals the tracer lives by, all of them blocked.
pub fn next_signal(limit: Option<Duration>) -> Signal {
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: limit.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    let set = mask_of(&[ASKED, ORPHANED, libc::SIGCHLD]);
    let nothing = ptr::null::<u8>();
    // SAFETY: the set and the limit live across the call.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            nothing,
            limit,
            MASK_BYTES,
        )
    };
    match i32::try_from(signal) {
        Ok(ASKED) => Signal::Asked,
        Ok(ORPHANED) => Signal::Orphaned,
        Ok(libc::SIGCHLD) => Signal::Child,
        _ => Signal::None,
    }
}

/// Blocks more signals in this process; gives those blocked before.
pub fn block(mask: u64) -> u64 {
    change_mask(libc::SIG_BLOCK, mask)
}

/// Goes back to what [`block`] gave.
pub fn unblock_to(before: u64) {
    change_mask(libc::SIG_SETMASK, before);
}

fn change_mask(how: i32, mask: u64) -> u64 {
    let mut before = 0_u64;
    // SAFETY: both masks live across the call.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const mask,
            &raw mut before,
            MASK_BYTES,
        );
    }
    before
}

pub fn mask_of(signals: &[i32]) -> u64 {
    signals
        .iter()
        .fold(0, |mask, signal| mask | 1 << (signal - 1))
}

/// Keeps `pid` on one processor; for itself, 0.
pub fn stay_on(pid: i32, cpu: i32) {
    // SAFETY: an array of integers, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let Ok(cpu) = usize::try_from(cpu) else {
        return;
    };
    if cpu < 8 * size_of::<libc::cpu_set_t>() {
        // SAFETY: within the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        // SAFETY: the set lives across the call. Failing only costs time.
        unsafe { libc::sched_setaffinity(pid, size_of_val(&set), &raw const set) };
    }
}

/// A result, or minus the number of the error.
fn or_errno(result: libc::c_long) -> i64 {
    if result != -1 {
        return result;
    }
    -i64::from(
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
    )
}

/// `PTRACE_O_TRACESYSGOOD` sets this bit in the signal of a stop at a system call.
const SYSCALL_GOOD: i32 = 0x80;

/// `sizeof(struct user_fpregs_struct)`.
pub const FPREGS_BYTES: usize = 512;

/// `sizeof(siginfo_t)`.
pub const SIGINFO_BYTES: usize = 128;

pub const NT_PRSTATUS: u64 = 1;
pub const NT_X86_XSTATE: u64 = 0x202;
pub const MASK_BYTES: u64 = size_of::<u64>() as u64;

// Requests, from include/uapi/linux/ptrace.h and arch/x86/include/uapi/asm/ptrace-abi.h.
pub const PEEKTEXT: u32 = 1;
pub const PEEKDATA: u32 = 2;
pub const PEEKUSER: u32 = 3;
pub const POKEDATA: u32 = 5;
pub const POKEUSER: u32 = 6;
pub const CONT: u32 = 7;
pub const GETFPREGS: u32 = 14;
pub const SETFPREGS: u32 = 15;
pub const DETACH: u32 = 17;
pub const SYSCALL: u32 = 24;
pub const GET_THREAD_AREA: u32 = 25;
pub const ARCH_PRCTL: u32 = 30;
pub const SETOPTIONS: u32 = 0x4200;
pub const GETEVENTMSG: u32 = 0x4201;
pub const GETSIGINFO: u32 = 0x4202;
pub const GETREGSET: u32 = 0x4204;
pub const SETREGSET: u32 = 0x4205;
pub const SEIZE: u32 = 0x4206;
pub const INTERRUPT: u32 = 0x4207;
pub const PEEKSIGINFO: u32 = 0x4209;
pub const GETSIGMASK: u32 = 0x420a;
pub const SETSIGMASK: u32 = 0x420b;
pub const SECCOMP_GET_FILTER: u32 = 0x420c;
pub const SECCOMP_GET_METADATA: u32 = 0x420d;
pub const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
pub const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
