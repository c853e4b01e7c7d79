//! `SO_REUSEADDR` of the sockets that CRIU has in repair mode.
//!
//! The kernel sets it when the mode begins and takes it away when the mode ends; CRIU, which asked
//! before, then puts it back. So that a CRIU that ends in between does not cost a server its
//! address, every `setsockopt` is looked at, and what was true before is marked per descriptor in
//! memory that the tracer has, too. The descriptors themselves are shared.

use std::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

use crate::{fork, repair};

/// A mark for each descriptor.
pub struct Marks {
    /// One behind the highest descriptor that was ever marked.
    end: AtomicU32,
    marks: [AtomicU8; DESCRIPTORS],
}

/// Not in repair mode.
const NONE: u8 = 0;
/// In repair mode, and `SO_REUSEADDR` was off, or on, before.
const WAS_OFF: u8 = 1;
const WAS_ON: u8 = 2;

/// The kernel's default for the highest a process may have (`fs.nr_open`).
const DESCRIPTORS: usize = 1 << 20;

/// Of `linux/tcp.h`.
const TCP_REPAIR_ON: c_int = 1;

static MARKS: AtomicPtr<Marks> = AtomicPtr::new(ptr::null_mut());

impl Marks {
    /// New ones, shared with whoever is forked, and never unmapped.
    pub fn create() -> Option<&'static Self> {
        let memory = crate::fork::shared_memory::<Self>()?;
        // SAFETY: never unmapped, and zeros are values of all its integers.
        Some(unsafe { memory.as_ref() })
    }

    /// From now on CRIU's calls leave marks here.
    pub fn attach(&'static self) {
        MARKS.store(ptr::from_ref(self).cast_mut(), Ordering::Release);
    }

    fn current() -> Option<&'static Self> {
        // SAFETY: null, or from `attach`.
        unsafe { MARKS.load(Ordering::Acquire).as_ref() }
    }

    fn mark(&self, fd: c_int, mark: u8) {
        if let Ok(number) = u32::try_from(fd)
            && let Some(place) = self.marks.get(number as usize)
        {
            place.store(mark, Ordering::Relaxed);
            self.end.fetch_max(number + 1, Ordering::Release);
        }
    }

    fn is_marked(&self, fd: c_int) -> bool {
        let mark = usize::try_from(fd).ok().and_then(|fd| self.marks.get(fd));
        mark.is_some_and(|mark| mark.load(Ordering::Relaxed) != NONE)
    }

    /// Takes all marked sockets out of repair mode, and makes them what they were.
    ///
    /// # Errors
    /// The last that the kernel told; the others are done.
    pub fn end_repair(&self) -> std::io::Result<()> {
        let end = self.end.load(Ordering::Acquire) as usize;
        let mut result = Ok(());
        for (fd, mark) in (0..).zip(&self.marks[..end.min(DESCRIPTORS)]) {
            let mark = mark.swap(NONE, Ordering::Relaxed);
            if mark == NONE {
                continue;
            }
            // SAFETY: looked at only for the length of the call, in which nobody closes any.
            let socket = unsafe { BorrowedFd::borrow_raw(fd) };
            let ended = repair::end_one(socket);
            if mark == WAS_ON && ended.is_ok() {
                let on: c_int = 1;
                let value = ptr::from_ref(&on).cast();
                set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, value, LENGTH);
            }
            // CRIU has closed it since.
            let gone = matches!(&ended, Err(error) if error.raw_os_error() == Some(libc::EBADF));
            if !gone {
                result = ended.map(drop).and(result);
            }
        }
        result
    }
}

/// `setsockopt(2)`.
///
/// # Safety
/// As for that.
pub unsafe fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> c_int {
    // Before that CRIU tries things on sockets of its own.
    let is_dump = fork::dumps();
    let marks = Marks::current().filter(|_| is_dump);
    if let Some(marks) = marks
        && (level, name) == (libc::IPPROTO_TCP, repair::TCP_REPAIR)
        && length == LENGTH
        // SAFETY: the caller passes a value of that length, or null.
        && unsafe { value.cast::<c_int>().as_ref() } == Some(&TCP_REPAIR_ON)
        && !marks.is_marked(fd)
    {
        marks.mark(fd, if is_reused(fd) { WAS_ON } else { WAS_OFF });
    }
    let result = set(fd, level, name, value, length);
    if let Some(marks) = marks
        && (level, name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR)
        && marks.is_marked(fd)
    {
        // It is the last that CRIU does to a socket.
        marks.mark(fd, NONE);
    }
    result
}

/// The call itself. The C library's function would be the one above.
fn set(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> c_int {
    // SAFETY: passed on as it came.
    let result = unsafe { libc::syscall(libc::SYS_setsockopt, fd, level, name, value, length) };
    c_int::try_from(result).unwrap_or(-1)
}

fn is_reused(fd: c_int) -> bool {
    let (mut value, mut length) = (0 as c_int, LENGTH);
    let place = (&raw mut value).cast();
    // SAFETY: both pointers are to live local variables, and `length` is the size of the first.
    let asked = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            place,
            &raw mut length,
        )
    };
    asked == 0 && value != 0
}

const LENGTH: libc::socklen_t = size_of::<c_int>() as libc::socklen_t;
