//! System calls that a stop must not fail.
//!
//! A call that a stop interrupts leaves one of the kernel's restart codes in the result register,
//! and the kernel restarts the call when the thread goes on: nobody notices. Some calls, listed in
//! signal(7) under "stop signals", give up with a plain `EINTR` instead. Programs that have no
//! signal handler seldom expect that. For those the result is replaced by the restart code
//! `ERESTARTNOHAND`: the kernel restarts the call if there is no handler to run, and makes it
//! `EINTR` if there is, which is what `EINTR` was meant for. A timeout begins anew, so that such a
//! call may wait up to twice its time, once.
//!
//! Not in the list: calls that may have done a part of their work (`connect`), and socket calls
//! with a timeout, whose `EINTR` every network program handles.

use pageferry_sys::ptrace::{self, Registers};

/// Repairs the result of the call a stopped thread is in, if it needs that.
pub(crate) fn mend(tid: i32) {
    if let Ok(mut registers) = ptrace::registers(tid)
        && mend_registers(&mut registers)
    {
        // Failing leaves the EINTR: legal, if unkind.
        let _ = ptrace::set_registers(tid, &registers);
    }
}

/// The same for registers that are going to be put back; true when they were changed.
pub(crate) fn mend_registers(registers: &mut Registers) -> bool {
    let call = registers.orig_rax.cast_signed();
    let interrupted = registers.rax.cast_signed() == -i64::from(libc::EINTR);
    let mends = interrupted && RESTARTED.contains(&call);
    if mends {
        registers.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
    mends
}

const RESTARTED: [i64; 6] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
];

/// From `include/linux/errno.h`: restart if no handler runs.
const ERESTARTNOHAND: i64 = 514;
