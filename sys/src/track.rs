//! Userfaultfd as a write tracker: a context of another process, made ready for `PAGEMAP_SCAN`.
//!
//! The context is used for nothing but asynchronous write protection (`UFFD_FEATURE_WP_ASYNC`): the
//! kernel resolves every fault by itself, no message is ever read, no thread of the workload waits.
//! The features are asked for, never guessed from a version (`include/uapi/linux/userfaultfd.h`).
//!
//! Absent: missing pages, faults, copies; that is [`crate::uffd`].

#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Flags of `userfaultfd(2)` for a tracker. User mode only: without it a kernel whose
/// `vm.unprivileged_userfaultfd` is 0 refuses the call to a workload that is not root. Writes by
/// the kernel are tracked all the same, since asynchronous protection never waits for a handler.
pub const USERFAULTFD_FLAGS: u64 =
    (libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY).cast_unsigned() as u64;

/// A userfaultfd context with asynchronous write protection. Closing it unregisters everything
/// and clears every protection in the process it belongs to.
#[derive(Debug)]
pub struct WriteTracker(OwnedFd);

impl WriteTracker {
    /// Negotiates the features with a fresh context. `EINVAL` means that the kernel lacks them.
    pub fn negotiate(userfaultfd: OwnedFd) -> io::Result<Self> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features: UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                | UFFD_FEATURE_WP_UNPOPULATED
                | UFFD_FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: `api` is the struct of this request number (size asserted below) and outlives it.
        let result = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(result)?;
        Ok(Self(userfaultfd))
    }

    /// Tracks the mappings in `start..end`. What is registered already stays as it is.
    ///
    /// `EBUSY`: a mapping belongs to another context. `EPERM`, `EINVAL`: one cannot be tracked.
    /// `ENOMEM`: nothing is mapped there. `ESRCH`: the memory is gone (exec, exit).
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let mut register = UffdioRegister {
            range: UffdioRange::new(start, end),
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: as for UFFDIO_API. The range is of the other process and only a number here.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(result)
    }

    /// Stops tracking the mappings in `start..end`.
    pub fn unregister(&self, start: u64, end: u64) -> io::Result<()> {
        let mut range = UffdioRange::new(start, end);
        // SAFETY: as for UFFDIO_API.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) };
        check(result)
    }

    /// Takes the protection off every page of `start..end`: all of them count as written.
    ///
    /// `ENOENT`: a part of the range is not mapped or not tracked. `ESRCH`: the memory is gone.
    pub fn unprotect(&self, start: u64, end: u64) -> io::Result<()> {
        let mut protect = UffdioWriteProtect {
            range: UffdioRange::new(start, end),
            mode: 0,
        };
        // SAFETY: as for UFFDIO_API.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) };
        check(result)
    }
}

/// Whether this kernel has asynchronous write protection, by making and closing a context of
/// the calling process.
pub fn probe() -> io::Result<bool> {
    // SAFETY: takes one integer and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, USERFAULTFD_FLAGS) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(false),
            error => Err(error),
        };
    }
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    let context = unsafe { OwnedFd::from_raw_fd(fd) };
    match WriteTracker::negotiate(context) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl UffdioRange {
    const fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            len: end.saturating_sub(start),
        }
    }
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteProtect {
    range: UffdioRange,
    mode: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioRange>() == 16);
const _: () = assert!(size_of::<UffdioRegister>() == 32);
const _: () = assert!(size_of::<UffdioWriteProtect>() == 24);

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Protects pages that are not there yet by markers; the scan demands it of anonymous mappings.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

const UFFDIO_API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::c_ulong =
    nix::request_code_readwrite!(0xaa, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: libc::c_ulong =
    nix::request_code_read!(0xaa, 0x01, size_of::<UffdioRange>());
const UFFDIO_WRITEPROTECT: libc::c_ulong =
    nix::request_code_readwrite!(0xaa, 0x06, size_of::<UffdioWriteProtect>());
