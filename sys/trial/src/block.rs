//! System calls that block, for tests that interrupt them.

use std::io;
use std::ptr;
use std::sync::mpsc;

use super::{check, say};

/// Starts a thread that blocks in a system call; says `blocked TID` and, when the call returns,
/// `returned RESULT ERRNO`. What ends the call is a byte on a pipe, or its timeout.
pub(super) fn block(call: &str) -> io::Result<String> {
    let (announce, announced) = mpsc::channel();
    let call = call.to_owned();
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) })?;
    let [read_end, write_end] = pipe;
    std::thread::spawn(move || {
        // SAFETY: no arguments.
        announce.send(unsafe { libc::gettid() }).unwrap();
        let result = blocking_call(&call, read_end);
        let errno = io::Error::last_os_error().raw_os_error().unwrap();
        let errno = if result < 0 { errno } else { 0 };
        say(&format!("returned {result} {errno}"));
    });
    let tid = announced.recv().unwrap();
    Ok(format!("blocked {tid} {write_end}"))
}

fn blocking_call(call: &str, pipe: libc::c_int) -> i64 {
    let second = libc::timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let mut byte = 0u8;
    let word = 0u32;
    match call {
        // SAFETY: room for one byte.
        "read" => (unsafe { libc::read(pipe, (&raw mut byte).cast(), 1) }) as i64,
        // SAFETY: both arguments live across the call.
        "nanosleep" => i64::from(unsafe { libc::nanosleep(&raw const second, ptr::null_mut()) }),
        "futex" => {
            let (operation, expected) = (libc::FUTEX_WAIT, 0);
            // SAFETY: the word and the timeout live across the call.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    &raw const word,
                    operation,
                    expected,
                    &raw const second,
                )
            }
        }
        "epoll" => i64::from(epoll(pipe)),
        "poll" => {
            let mut poll = libc::pollfd {
                fd: pipe,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd.
            i64::from(unsafe { libc::poll(&raw mut poll, 1, -1) })
        }
        "sigtimedwait" => {
            // SAFETY: a set of signals is plain data.
            let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: the set lives across the calls; the timeout too.
            i64::from(unsafe {
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGUSR2);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
                libc::sigtimedwait(&raw const set, ptr::null_mut(), &raw const second)
            })
        }
        "vfork" => i64::from(vfork(pipe)),
        "ppoll" => {
            let mut poll = libc::pollfd {
                fd: pipe,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: a set of signals is plain data.
            let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: all arguments live across the calls.
            i64::from(unsafe {
                libc::sigfillset(&raw mut set);
                libc::ppoll(&raw mut poll, 1, ptr::null(), &raw const set)
            })
        }
        other => panic!("unknown call {other}"),
    }
}

/// Returns when the child has ended, which is when its pipe is poked. Uninterruptible.
fn vfork(pipe: libc::c_int) -> bool {
    extern "C" fn wait(pipe: *mut libc::c_void) -> libc::c_int {
        let mut byte = 0u8;
        let read_end = libc::c_int::try_from(pipe.addr()).unwrap_or(-1);
        // SAFETY: room for one byte.
        unsafe { libc::read(read_end, (&raw mut byte).cast(), 1) };
        0
    }
    let stack = Box::leak(vec![0u64; 8192].into_boxed_slice())
        .as_mut_ptr_range()
        .end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let argument = ptr::without_provenance_mut(usize::try_from(pipe).unwrap());
    // SAFETY: the stack is leaked, so it outlives the process, which makes one system call.
    0 < unsafe { libc::clone(wait, stack.cast(), flags, argument) }
}

fn epoll(pipe: libc::c_int) -> libc::c_int {
    // SAFETY: a number.
    let epoll = unsafe { libc::epoll_create1(0) };
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN.cast_unsigned(),
        u64: 7,
    };
    // SAFETY: the event lives across the calls.
    unsafe {
        assert_eq!(
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, pipe, &raw mut event),
            0
        );
        libc::epoll_wait(epoll, &raw mut event, 1, -1)
    }
}
