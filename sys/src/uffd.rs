//! Userfaultfd: the descriptor through which a missing page of another process is filled.
//!
//! Every page-sized operation answers how far it came and what stopped it, as values: the kernel
//! stops in the middle of a range for reasons that are part of normal work ([`Stop`]).
//! Structs, numbers and events are those of `include/uapi/linux/userfaultfd.h`; what each error
//! means is from `fs/userfaultfd.c` and `mm/userfaultfd.c` of Linux 6.18 and was tried there.
//!
//! Absent: deciding which page gets what; write protection and minor faults.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// The events a process whose memory is filled by someone else must report: without them pages
/// move, go away or are inherited unseen, and zeros would be read for them.
pub const EVENTS: u64 = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP;

/// Most messages taken by one [`Uffd::read`].
pub const MESSAGES_MAX: usize = 64;

/// A userfaultfd, non-blocking.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// What the kernel tells through a userfaultfd. Addresses are of the process it belongs to, bytes.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for the page at `address`, or is about to see that it is there already.
    Fault {
        /// Where it faulted; not aligned.
        address: u64,
    },
    /// The process forked; the child has a userfaultfd of its own with the same registrations.
    /// The child does not run before the message has been read.
    Fork(Uffd),
    /// `len` bytes moved from `from` to `to`.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// How much.
        len: u64,
    },
    /// `start..end` was given up (`MADV_DONTNEED` and its kin) and stays mapped: zeros from now on.
    Remove {
        /// First byte.
        start: u64,
        /// One after the last byte.
        end: u64,
    },
    /// `start..end` is not mapped any more.
    Unmap {
        /// First byte.
        start: u64,
        /// One after the last byte.
        end: u64,
    },
    /// An event that was not asked for, by its number.
    Unknown(u8),
}

/// How far a copy or a zeroing came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes from the start of the range that are done: whole pages.
    pub done: u64,
    /// Why the rest is not, if there is a rest. After partial work the kernel does not tell; ask
    /// again from there.
    pub stop: Option<Stop>,
}

/// Why the kernel did not fill a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It came some way and would not say more: ask again for the rest.
    Partial,
    /// An event has not been read, or its cause is still at work: read events, then ask again.
    Changing,
    /// The page is there already. Threads that wait for it were not woken.
    Present,
    /// Not inside one registered mapping: it has gone, or the range crosses the edge of one.
    Unmapped,
    /// The process has gone.
    Gone,
    /// No memory, or the limit of the process's cgroup is reached.
    NoMemory,
    /// Anything else.
    Failed(Errno),
}

impl Uffd {
    /// A userfaultfd for the memory of the calling process that reports [`EVENTS`].
    ///
    /// Needs `CAP_SYS_PTRACE` for the fork event.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call takes flags only and returns a new descriptor or an error.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS) };
        let number = i32::try_from(Errno::result(number)?).map_err(io::Error::other)?;
        // SAFETY: the descriptor has just been made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let mut api = Api {
            api: API_VERSION,
            features: EVENTS,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_api`, which lives here.
        unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
        Ok(Self(fd))
    }

    /// Takes a descriptor that somebody sent: it must be a userfaultfd and is made non-blocking.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if !name.as_os_str().as_encoded_bytes().starts_with(LINK_NAME) {
            let text = format!("descriptor is {}, not a userfaultfd", name.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// The features it was set up with, as bits of `UFFDIO_API`.
    pub fn features(&self) -> io::Result<u64> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        // `API:\tAPI:FEATURES:IOCTLS`, each hexadecimal.
        let features = text
            .lines()
            .find_map(|line| line.strip_prefix("API:"))
            .and_then(|rest| rest.trim().split(':').nth(1))
            .and_then(|field| u64::from_str_radix(field, 16).ok())
            .map(|features| features & !FEATURE_INITIALIZED);
        features.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fdinfo has no features"))
    }

    /// Appends the messages that wait, at most [`MESSAGES_MAX`]; none if none waits.
    ///
    /// An error means that nothing was taken. An event is over for its thread once it was read:
    /// that thread goes on, so whatever is decided about its memory must rest on the event from
    /// here on.
    pub fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut bytes = [0; MESSAGES_MAX * MESSAGE_BYTES];
        let length = match nix::unistd::read(&self.0, &mut bytes) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for message in bytes[..length].chunks_exact(MESSAGE_BYTES) {
            messages.push(parse(message));
        }
        Ok(())
    }

    /// Fills the pages at `to` with `bytes` and wakes whoever waits for them. `to` and the length
    /// of `bytes` are multiples of the page size.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Progress {
        let mut request = Copy {
            to,
            from: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the kernel reads `bytes`, which outlives the call, and writes the request.
        let result = unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut request) };
        progress(result, request.copied)
    }

    /// Maps the zero page over `len` bytes at `start` and wakes whoever waits for them.
    pub fn zero(&self, start: u64, len: u64) -> Progress {
        let mut request = Zero {
            range: Range { start, len },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_zeropage`, which lives here.
        let result = unsafe { uffdio_zeropage(self.0.as_raw_fd(), &raw mut request) };
        progress(result, request.zeroed)
    }

    /// Wakes the threads that wait for a page of the range; they look again.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let range = Range { start, len };
        // SAFETY: the kernel reads one `struct uffdio_range`, which lives here.
        unsafe { uffdio_wake(self.0.as_raw_fd(), &raw const range) }?;
        Ok(())
    }

    /// Whether an event is unread or its cause still at work, so that nothing can be filled.
    pub fn is_changing(&self) -> bool {
        self.probe(0) == Err(Errno::EAGAIN)
    }

    /// Whether its process is gone, with all its memory. No event tells.
    pub fn is_gone(&self) -> bool {
        self.probe(0) == Err(Errno::ESRCH)
    }

    /// Whether the page at `start` is in a mapping that is registered with some userfaultfd. `None`
    /// while the mappings change.
    pub fn is_registered(&self, start: u64) -> Option<bool> {
        match self.probe(start) {
            Err(Errno::EAGAIN) => None,
            // Found, but neither shared memory nor huge pages.
            Err(Errno::EINVAL) | Ok(()) => Some(true),
            Err(_) => Some(false),
        }
    }

    /// Registers for missing pages. Of the memory of the process that made the descriptor.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut request = Register {
            range: Range { start, len },
            mode: REGISTER_MISSING,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_register`, which lives here.
        unsafe { uffdio_register(self.0.as_raw_fd(), &raw mut request) }?;
        Ok(())
    }

    /// Undoes [`Uffd::register`]. Pages that are missing read as zero from now on.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let range = Range { start, len };
        // SAFETY: the kernel reads one `struct uffdio_range`, which lives here.
        unsafe { uffdio_unregister(self.0.as_raw_fd(), &raw const range) }?;
        Ok(())
    }

    /// `UFFDIO_CONTINUE` on private anonymous memory never does anything; how it refuses tells
    /// what is there: EAGAIN before all else, then ENOENT without a registered mapping, then
    /// EINVAL.
    fn probe(&self, start: u64) -> Result<(), Errno> {
        let mut request = Continue {
            range: Range {
                start,
                len: PAGE_BYTES,
            },
            mode: 0,
            mapped: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_continue`, which lives here.
        unsafe { uffdio_continue(self.0.as_raw_fd(), &raw mut request) }.map(drop)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.0
    }
}

fn parse(message: &[u8]) -> Message {
    let word = |index: usize| {
        let bytes = &message[8 + 8 * index..16 + 8 * index];
        u64::from_ne_bytes(bytes.try_into().expect("a slice of 8 bytes"))
    };
    match message[0] {
        MESSAGE_FAULT => Message::Fault { address: word(1) },
        MESSAGE_FORK => {
            let bytes = message[8..12].try_into().expect("a slice of 4 bytes");
            // SAFETY: the kernel has just opened this descriptor for the process that reads, and
            // nothing else knows its number.
            let fd = unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(bytes)) };
            Message::Fork(Uffd(fd))
        }
        MESSAGE_REMAP => Message::Remap {
            from: word(0),
            to: word(1),
            len: word(2),
        },
        MESSAGE_REMOVE => Message::Remove {
            start: word(0),
            end: word(1),
        },
        MESSAGE_UNMAP => Message::Unmap {
            start: word(0),
            end: word(1),
        },
        other => Message::Unknown(other),
    }
}

fn progress(result: Result<libc::c_int, Errno>, done: i64) -> Progress {
    let stop = match result {
        Ok(_) => None,
        Err(Errno::EAGAIN) if 0 < done => Some(Stop::Partial),
        Err(Errno::EAGAIN) => Some(Stop::Changing),
        Err(Errno::EEXIST) => Some(Stop::Present),
        Err(Errno::ENOENT) => Some(Stop::Unmapped),
        // ENOSPC is what kernels before 4.15 said.
        Err(Errno::ESRCH | Errno::ENOSPC) => Some(Stop::Gone),
        Err(Errno::ENOMEM) => Some(Stop::NoMemory),
        Err(error) => Some(Stop::Failed(error)),
    };
    Progress {
        done: u64::try_from(done).unwrap_or(0),
        stop,
    }
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct Continue {
    range: Range,
    mode: u64,
    mapped: i64,
}

const _: () = assert!(
    size_of::<Api>() == 24
        && size_of::<Register>() == 32
        && size_of::<Copy>() == 40
        && size_of::<Zero>() == 32
        && size_of::<Continue>() == 32
);

nix::ioctl_readwrite!(uffdio_api, IOCTL_TYPE, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, IOCTL_TYPE, 0x00, Register);
// These two only read, but are numbered as if they wrote.
nix::ioctl_read!(uffdio_unregister_raw, IOCTL_TYPE, 0x01, Range);
nix::ioctl_read!(uffdio_wake_raw, IOCTL_TYPE, 0x02, Range);
nix::ioctl_readwrite!(uffdio_copy, IOCTL_TYPE, 0x03, Copy);
nix::ioctl_readwrite!(uffdio_zeropage, IOCTL_TYPE, 0x04, Zero);
nix::ioctl_readwrite!(uffdio_continue, IOCTL_TYPE, 0x07, Continue);

/// # Safety
/// `range` points to a range.
unsafe fn uffdio_unregister(fd: i32, range: *const Range) -> Result<i32, Errno> {
    // SAFETY: as the caller promises; the kernel does not write.
    unsafe { uffdio_unregister_raw(fd, range.cast_mut()) }
}

/// # Safety
/// `range` points to a range.
unsafe fn uffdio_wake(fd: i32, range: *const Range) -> Result<i32, Errno> {
    // SAFETY: as the caller promises; the kernel does not write.
    unsafe { uffdio_wake_raw(fd, range.cast_mut()) }
}

const IOCTL_TYPE: u8 = 0xaa;
const API_VERSION: u64 = 0xaa;
const CREATE_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
const REGISTER_MISSING: u64 = 1;
const PAGE_BYTES: u64 = 4096;

/// The kernel's own mark among the features, `UFFD_FEATURE_INITIALIZED`.
const FEATURE_INITIALIZED: u64 = 1 << 31;
const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;

/// Size of `struct uffd_msg`, in bytes.
const MESSAGE_BYTES: usize = 32;
const MESSAGE_FAULT: u8 = 0x12;
const MESSAGE_FORK: u8 = 0x13;
const MESSAGE_REMAP: u8 = 0x14;
const MESSAGE_REMOVE: u8 = 0x15;
const MESSAGE_UNMAP: u8 = 0x16;

/// What `/proc/self/fd` calls a userfaultfd.
const LINK_NAME: &[u8] = b"anon_inode:[userfaultfd]";

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    const PAGE: usize = PAGE_BYTES as usize;

    /// Memory that nobody has touched, and a userfaultfd over it.
    fn registered(pages: usize) -> (MmapMut, Uffd, u64) {
        let memory = MmapMut::map_anon(pages * PAGE).unwrap();
        let start = memory.as_ptr().addr() as u64;
        let uffd = Uffd::new().unwrap();
        uffd.register(start, (pages * PAGE) as u64).unwrap();
        (memory, uffd, start)
    }

    #[test]
    fn copies_and_zeros_are_what_the_process_reads() {
        let (memory, uffd, start) = registered(4);
        let done = |done| Progress { done, stop: None };
        assert_eq!(uffd.copy(start, &[7; 2 * PAGE]), done(2 * PAGE_BYTES));
        assert_eq!(
            uffd.zero(start + 2 * PAGE_BYTES, 2 * PAGE_BYTES),
            done(2 * PAGE_BYTES)
        );
        assert!(memory[..2 * PAGE].iter().all(|byte| *byte == 7));
        assert!(memory[2 * PAGE..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_present_page_stops_a_copy_where_it_lies() {
        let (memory, uffd, start) = registered(3);
        uffd.copy(start + PAGE_BYTES, &[1; PAGE]);
        let progress = uffd.copy(start, &[2; 3 * PAGE]);
        let partial = Progress {
            done: PAGE_BYTES,
            stop: Some(Stop::Partial),
        };
        assert_eq!(progress, partial);
        let progress = uffd.copy(start + PAGE_BYTES, &[2; 2 * PAGE]);
        let present = Progress {
            done: 0,
            stop: Some(Stop::Present),
        };
        assert_eq!(progress, present);
        uffd.zero(start + 2 * PAGE_BYTES, PAGE_BYTES);
        assert_eq!((memory[0], memory[PAGE], memory[2 * PAGE]), (2, 1, 0));
    }

    #[test]
    fn ranges_that_leave_their_mapping_are_refused_whole() {
        let (memory, uffd, start) = registered(2);
        let progress = uffd.copy(start + PAGE_BYTES, &[1; 4 * PAGE]);
        let unmapped = Progress {
            done: 0,
            stop: Some(Stop::Unmapped),
        };
        assert_eq!(progress, unmapped);
        assert_eq!(uffd.is_registered(start), Some(true));
        assert!(!uffd.is_changing());
        assert_eq!(uffd.is_registered(0), Some(false));
        drop(uffd);
        drop(memory);
    }

    #[test]
    fn unmapping_waits_until_its_event_was_read() {
        let (memory, uffd, start) = registered(2);
        let messages = std::thread::scope(|scope| {
            let unmapping = scope.spawn(move || drop(memory));
            let mut messages = Vec::new();
            while messages.is_empty() {
                uffd.read(&mut messages).unwrap();
                std::thread::yield_now();
            }
            unmapping.join().unwrap();
            messages
        });
        let end = start + 2 * PAGE_BYTES;
        let [
            Message::Unmap {
                start: from,
                end: to,
            },
        ] = messages[..]
        else {
            panic!("{messages:?}");
        };
        assert_eq!((from, to), (start, end));
        assert_eq!(uffd.copy(start, &[1; PAGE]).stop, Some(Stop::Unmapped));
    }

    #[test]
    fn features_are_what_was_asked_for_and_strangers_are_refused() {
        let uffd = Uffd::new().unwrap();
        assert_eq!(uffd.features().unwrap(), EVENTS);
        assert!(Uffd::from_fd(uffd.into()).is_ok());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Uffd::from_fd(file.into()).is_err());
    }
}
