//! System calls that block, for tests that interrupt them.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::mpsc;

use super::{check, pointer, say};

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
        say_returned(blocking_call(&call, read_end));
    });
    let tid = announced.recv().unwrap();
    Ok(format!("blocked {tid} {write_end}"))
}

/// Says what a call has returned that was the thread's last.
fn say_returned(result: i64) {
    let errno = io::Error::last_os_error().raw_os_error().unwrap();
    let errno = if result < 0 { errno } else { 0 };
    say(&format!("returned {result} {errno}"));
}

/// Starts a thread that reads the beginning of a file into memory by direct I/O; says that it is
/// `blocked TID` and, when it has read, what came of it, as [`block`] does.
pub(super) fn read_direct(path: &str, address: u64, length: usize) -> io::Result<String> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let (announce, announced) = mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: no arguments.
        announce.send(unsafe { libc::gettid() }).unwrap();
        // SAFETY: the test mapped these pages for this.
        let read = unsafe { libc::pread(file.as_raw_fd(), pointer(address), length, 0) };
        say_returned(read as i64);
        // Open for ever.
        let _ = file.into_raw_fd();
    });
    Ok(format!("blocked {}", announced.recv().unwrap()))
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
        "semop" => i64::from(semop(pipe)),
        "recv" => receive(pipe) as i64,
        "read-socket" => read_socket(pipe) as i64,
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

/// Runs `end` when the pipe is poked.
fn when_poked(pipe: libc::c_int, end: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let mut byte = 0u8;
        // SAFETY: room for one byte.
        unsafe { libc::read(pipe, (&raw mut byte).cast(), 1) };
        end();
    });
}

/// Waits for a semaphore that is raised when the pipe is poked.
fn semop(pipe: libc::c_int) -> libc::c_int {
    // SAFETY: numbers.
    let set = unsafe { libc::semget(libc::IPC_PRIVATE, 1, 0o600) };
    when_poked(pipe, move || {
        // SAFETY: a number for the first of one semaphore.
        unsafe { libc::semctl(set, 0, libc::SETVAL, 1) };
    });
    let mut lower = libc::sembuf {
        sem_num: 0,
        sem_op: -1,
        sem_flg: 0,
    };
    // SAFETY: one operation.
    let result = unsafe { libc::semop(set, &raw mut lower, 1) };
    let error = io::Error::last_os_error();
    // SAFETY: numbers, and the error of the last call of this thread, as it was. The semaphore
    // would outlive the process.
    unsafe {
        libc::semctl(set, 0, libc::IPC_RMID);
        *libc::__errno_location() = error.raw_os_error().unwrap();
    }
    result
}

/// Waits for a byte on a socket with a timeout, which is sent when the pipe is poked.
fn receive(pipe: libc::c_int) -> libc::ssize_t {
    let mut pair = [0; 2];
    let timeout = libc::timeval {
        tv_sec: 100,
        tv_usec: 0,
    };
    let size = libc::socklen_t::try_from(size_of_val(&timeout)).unwrap();
    // SAFETY: room for two descriptors, and a timeout of the size it has.
    unsafe {
        assert_eq!(
            libc::socketpair(libc::AF_UNIX, libc::SOCK_DGRAM, 0, pair.as_mut_ptr()),
            0
        );
        let (level, name) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        let set = libc::setsockopt(pair[0], level, name, (&raw const timeout).cast(), size);
        assert_eq!(set, 0);
    }
    let [one, other] = pair;
    when_poked(pipe, move || {
        // SAFETY: one byte.
        unsafe { libc::send(other, c"x".as_ptr().cast(), 1, 0) };
    });
    let mut byte = 0u8;
    // SAFETY: room for one byte.
    unsafe { libc::recv(one, (&raw mut byte).cast(), 1, 0) }
}

/// Waits for a byte on a socket in a plain `read`, which is sent when the pipe is poked.
fn read_socket(pipe: libc::c_int) -> libc::ssize_t {
    let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
    when_poked(pipe, move || {
        let other = other.into_raw_fd();
        // SAFETY: one byte.
        unsafe { libc::write(other, c"x".as_ptr().cast(), 1) };
    });
    let mut byte = 0u8;
    // SAFETY: room for one byte.
    unsafe { libc::read(one.as_raw_fd(), (&raw mut byte).cast(), 1) }
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
