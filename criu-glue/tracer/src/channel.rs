//! Memory shared by CRIU and its tracer, and one call at a time through it.
//!
//! CRIU writes a call and raises `asked`; the tracer serves it, writes the result and raises
//! `answered`. Each side touches the call only in its turn, which is what makes sharing it sound.

use std::cell::UnsafeCell;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// `ptrace(2)`, with its request.
    Ptrace(u32),
    /// `wait4(2)`, with its options.
    Wait(i32),
}

/// Which of `ptrace`'s arguments point to the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Shape {
    /// None: both are numbers.
    Plain,
    /// `data`.
    Data,
    /// `addr`.
    Address,
    /// `data` is an `iovec` over the buffer.
    Vector,
    /// `addr` to its first [`PEEK_BYTES`] bytes, `data` behind them (`PTRACE_PEEKSIGINFO`).
    Both,
}

impl Shape {
    pub fn from_number(number: u32) -> Option<Self> {
        let all = [
            Self::Plain,
            Self::Data,
            Self::Address,
            Self::Vector,
            Self::Both,
        ];
        all.into_iter().find(|shape| *shape as u32 == number)
    }
}

/// One call, its arguments and its result.
#[derive(Debug)]
pub struct Call {
    pub what: What,
    pub shape: Shape,
    /// A thread, or -1 for a wait for any.
    pub pid: i32,
    /// The processor CRIU runs on.
    pub cpu: i32,
    pub address: u64,
    pub data: u64,
    /// What comes before, and is not worth a call of its own: so many bytes of a list of posts, see
    /// [`crate::told`].
    pub posted: [u8; POSTED_BYTES],
    pub posts: usize,
    /// What the kernel returned, negative errors included. If something posted failed, its error.
    pub result: i64,
    /// Of a wait.
    pub status: i32,
    /// Bytes of `buffer` that mean something.
    pub length: usize,
    pub buffer: [u8; BUFFER_BYTES],
    /// With the answer: so many bytes of a list of what is told besides, see [`crate::told`].
    pub told: usize,
    pub besides: [u8; BESIDES_BYTES],
}

/// Room for the changes of some threads: registers are the largest, with AMX 11 KiB.
pub const POSTED_BYTES: usize = 32 << 10;

/// Room for what is told of some dozen threads, 3 to 12 KiB each.
pub const BESIDES_BYTES: usize = 128 << 10;

impl Call {
    pub const NOTHING: Self = Self {
        what: What::Wait(0),
        shape: Shape::Plain,
        pid: 0,
        cpu: 0,
        address: 0,
        data: 0,
        posted: [0; POSTED_BYTES],
        posts: 0,
        result: 0,
        status: 0,
        length: 0,
        buffer: [0; BUFFER_BYTES],
        told: 0,
        besides: [0; BESIDES_BYTES],
    };
}

/// The largest thing passed: a seccomp filter of 4096 instructions (`BPF_MAXINSNS`) of 8 bytes.
pub const BUFFER_BYTES: usize = 32 << 10;

/// `sizeof(struct ptrace_peeksiginfo_args)`.
pub const PEEK_BYTES: usize = 16;

/// Lies in memory that both processes have mapped.
pub struct Channel {
    asked: AtomicU32,
    answered: AtomicU32,
    call: UnsafeCell<Call>,
}

/// A channel for this process and those it forks; never unmapped.
#[derive(Clone, Copy)]
pub struct Shared(NonNull<Channel>);

impl Shared {
    pub fn create() -> Option<Self> {
        let channel = crate::fork::shared_memory::<Channel>()?;
        // SAFETY: large enough, page-aligned, and known to nobody else yet.
        unsafe {
            channel.write(Channel {
                asked: AtomicU32::new(0),
                answered: AtomicU32::new(0),
                call: UnsafeCell::new(Call::NOTHING),
            });
        }
        Some(Self(channel))
    }

    pub fn as_ptr(self) -> *mut Channel {
        self.0.as_ptr()
    }

    /// `None` for null.
    pub fn from_ptr(channel: *mut Channel) -> Option<Self> {
        NonNull::new(channel).map(Self)
    }

    fn channel(&self) -> &Channel {
        // SAFETY: mapped and initialised by `create`, and never unmapped.
        unsafe { self.0.as_ref() }
    }

    /// CRIU's turn: fills the call and hands it over by `notify`; `alive` is asked whenever
    /// `patience` is over whether anybody is left to answer. Gives what `read` makes of the
    /// answered call and of whether a signal was handled meanwhile.
    ///
    /// Not to be called by a signal handler that interrupts it.
    pub fn ask<T>(
        &self,
        fill: impl FnOnce(&mut Call),
        notify: impl FnOnce(),
        patience: Duration,
        mut alive: impl FnMut() -> bool,
        read: impl FnOnce(&Call, bool) -> T,
    ) -> Option<T> {
        let channel = self.channel();
        let turn = channel.answered.load(Ordering::Acquire).wrapping_add(1);
        // SAFETY: everything asked has been answered, so the call is ours until `asked` is raised.
        fill(unsafe { &mut *channel.call.get() });
        channel.asked.store(turn, Ordering::Release);
        notify();
        let mut interrupted = false;
        loop {
            let answered = channel.answered.load(Ordering::Acquire);
            if answered == turn {
                // SAFETY: it was answered, so it is ours again.
                return Some(read(unsafe { &*channel.call.get() }, interrupted));
            }
            match futex_wait(&channel.answered, answered, patience) {
                Waited::TimedOut if !alive() => return None,
                Waited::Interrupted => interrupted = true,
                Waited::TimedOut | Waited::Woken => {}
            }
        }
    }

    /// The tracer's turn, if it is: serves what was asked for.
    pub fn serve(&self, serve: impl FnOnce(&mut Call)) {
        let channel = self.channel();
        let turn = channel.asked.load(Ordering::Acquire);
        if turn == channel.answered.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: it was asked and not answered, so the call is ours until `answered` is raised.
        serve(unsafe { &mut *channel.call.get() });
        channel.answered.store(turn, Ordering::Release);
        futex_wake(&channel.answered);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    Woken,
    Interrupted,
    TimedOut,
}

fn futex_wait(word: &AtomicU32, unchanged: u32, limit: Duration) -> Waited {
    let limit = libc::timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: limit.subsec_nanos().into(),
    };
    let limit = ptr::from_ref(&limit);
    // SAFETY: the word and the time limit live across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            unchanged,
            limit,
        )
    };
    let error = std::io::Error::last_os_error().raw_os_error();
    match error.filter(|_| result < 0) {
        Some(libc::ETIMEDOUT) => Waited::TimedOut,
        Some(libc::EINTR) => Waited::Interrupted,
        _ => Waited::Woken,
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word lives across the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(100);

    #[test]
    fn a_call_is_answered_by_the_other_side() {
        let shared = Shared::create().expect("memory");
        let channel = shared.as_ptr() as usize;
        let server = std::thread::spawn(move || {
            let shared = Shared::from_ptr(channel as *mut Channel).expect("not null");
            let mut served = 0;
            while served < 3 {
                shared.serve(|call| {
                    served += 1;
                    call.result = i64::from(call.pid) * 2;
                });
            }
        });
        for pid in 1..=3 {
            let result = shared.ask(
                |call| call.pid = pid,
                || (),
                PATIENCE,
                || true,
                |call, _| call.result,
            );
            assert_eq!(result, Some(2 * i64::from(pid)));
        }
        server.join().expect("no panic");
    }

    #[test]
    fn nobody_left_to_answer_is_noticed() {
        let shared = Shared::create().expect("memory");
        let result = shared.ask(
            |call| call.pid = 1,
            || (),
            PATIENCE,
            || false,
            |call, _| call.result,
        );
        assert_eq!(result, None);
    }

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn handle(_: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_signal_handled_while_nobody_answers_is_told() {
        // SAFETY: all integers or none, for which zero is a value; no flags, so nothing restarts.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        // SAFETY: the action lives across the call, and its handler only counts.
        unsafe { libc::sigaction(libc::SIGURG, &raw const action, ptr::null_mut()) };
        let shared = Shared::create().expect("memory");
        let channel = shared.as_ptr() as usize;
        // SAFETY: no arguments.
        let asker = unsafe { libc::gettid() };
        let server = std::thread::spawn(move || {
            let shared = Shared::from_ptr(channel as *mut Channel).expect("not null");
            let sleeps = || {
                let stat = std::fs::read_to_string(format!("/proc/self/task/{asker}/stat"));
                stat.is_ok_and(|stat| stat.contains(") S "))
            };
            while shared.channel().asked.load(Ordering::Acquire) == 0 || !sleeps() {}
            // SAFETY: numbers only.
            unsafe { libc::syscall(libc::SYS_tkill, asker, libc::SIGURG) };
            while HANDLED.load(Ordering::Relaxed) == 0 {}
            shared.serve(|call| call.result = 1);
        });
        let told = shared.ask(
            |_| (),
            || (),
            PATIENCE,
            || true,
            |call, signal| (call.result, signal),
        );
        assert_eq!(told, Some((1, true)));
        server.join().expect("no panic");
    }
}
