//! System calls that a stop must not fail.
//!
//! A call that a stop interrupts leaves one of the kernel's restart codes in the result register,
//! and the kernel restarts the call when the thread goes on: nobody notices. Some calls, listed in
//! signal(7) under "stop signals", give up with a plain `EINTR` instead. Programs that have no
//! signal handler seldom expect that. For those the result is replaced by the restart code
//! `ERESTARTNOHAND`: the kernel restarts the call if there is no handler to run, and makes it
//! `EINTR` if there is, which is what `EINTR` was meant for. A timeout begins anew, so that such a
//! call may wait up to twice its time after one stop; after several, up to its time after the last.
//!
//! Calls on sockets do so if the socket has a timeout; without one the kernel restarts the very
//! same calls itself.
//!
//! Not in the list: calls that may have done a part of their work (`connect`).

use std::sync::mpsc;
use std::time::{Duration, Instant};

use pageferry_sys::ptrace::{self, Registers, TracersEnd};
use pageferry_sys::task;

use super::stop::{Advance, UNINTERRUPTIBLE_AFTER, advance, pause, seize};

/// Whether a call with this number fails where others are restarted.
pub fn is_restarted(call: i64) -> bool {
    RESTARTED.contains(&call)
}

/// Lets frozen threads go by `thaw`, and repairs the calls of these ones before they return.
///
/// The registers of a thread that is frozen cannot be reached. So each is seized and asked to stop
/// while it is frozen: it comes to that stop, on its way to user mode, before it does anything of
/// its own. What takes too long is let go as it is.
pub fn thaw<T>(threads: &[i32], thaw: impl FnOnce() -> T) -> T {
    if threads.is_empty() {
        return thaw();
    }
    let (asked, all_asked) = mpsc::channel::<()>();
    let (thawed, is_thawed) = mpsc::channel::<()>();
    let mend = move || {
        // Nobody waits for it any more if that fails.
        let _ = asked.send(());
        let threads = ask(threads, Instant::now() + ASK_MAX);
        drop(asked);
        // Ends when the other end is dropped.
        let _ = is_thawed.recv();
        mend_all(threads, Instant::now() + MEND_MAX);
    };
    std::thread::scope(|scope| {
        // What an OS thread holds is let go when that ends, so it has one of its own.
        let mending = std::thread::Builder::new().name("mend".to_owned());
        match mending.spawn_scoped(scope, mend) {
            // To seize a thread that job control has stopped may take until it is thawed.
            Ok(_) => {
                if all_asked.recv_timeout(BEGIN_MAX).is_ok() {
                    // Ends without a word when all are asked.
                    let _ = all_asked.recv_timeout(ASK_MAX);
                }
            }
            Err(error) => tracing::warn!("interrupted calls are not restarted: {error}"),
        }
        let done = thaw();
        drop(thawed);
        done
    })
}

/// Seizes threads and asks them to stop, until then; returns those it has asked.
fn ask(threads: &[i32], deadline: Instant) -> Vec<i32> {
    let in_time = threads.iter().take_while(|_| Instant::now() < deadline);
    // One that is traced, or that has ended, is left.
    in_time
        .copied()
        .filter(|tid| seize(*tid, TracersEnd::LetsGo).is_ok_and(|seized| seized))
        .collect()
}

/// Repairs each of these threads when it stops, and lets it go.
fn mend_all(mut threads: Vec<i32>, deadline: Instant) {
    let began = Instant::now();
    let mut idle = 0;
    while !threads.is_empty() && Instant::now() < deadline {
        let before = threads.len();
        threads.retain(|&tid| match advance(tid) {
            Advance::Running => true,
            Advance::Stopped => {
                mend(tid);
                // Fails only for a thread that has been killed.
                let _ = ptrace::detach(tid, 0);
                false
            }
            Advance::Ended => false,
        });
        if threads.len() < before {
            idle = 0;
            continue;
        }
        // One in an uninterruptible call is not about to fail it.
        if UNINTERRUPTIBLE_AFTER <= began.elapsed()
            && threads.iter().all(|&tid| task::is_uninterruptible(tid))
        {
            return;
        }
        pause(&mut idle);
    }
}

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
    let mends = interrupted && is_restarted(call);
    if mends {
        registers.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
    mends
}

const RESTARTED: [i64; 18] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
];

/// From `include/linux/errno.h`: restart if no handler runs.
const ERESTARTNOHAND: i64 = 514;

/// How long is waited for a turn on a processor to do so: where three others compete for two of
/// them, 5 ms are often not enough.
const BEGIN_MAX: Duration = Duration::from_millis(100);

/// How long frozen threads are asked to stop then; all stand still for it. 2 us for each.
const ASK_MAX: Duration = Duration::from_millis(20);

/// How long thawed ones may take to stop: as long as they need to get a turn on a processor.
const MEND_MAX: Duration = Duration::from_secs(1);
