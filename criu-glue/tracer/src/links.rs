//! The names CRIU gives to open files that have lost theirs.
//!
//! A file that is open, deleted, and has another name somewhere is linked as `link_remap.N` beside
//! where it was, for the restore to open. CRIU takes these names away when it takes a dump back. A
//! CRIU that ends before would leave them, and the next dump would choose the same ones and fail;
//! so they are noted in memory that the tracer has, too.
//!
//! Absent: more than [`LINKS`] of them in one dump.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::fork;

/// The names that are there.
pub struct Links([Link; LINKS]);

struct Link {
    state: AtomicU32,
    /// The directory, a descriptor of its own, and the path below it.
    place: UnsafeCell<(c_int, [u8; PATH_BYTES])>,
}

const EMPTY: u32 = 0;
const THERE: u32 = 1;

const LINKS: usize = 64;
const PATH_BYTES: usize = libc::PATH_MAX as usize;

static LINKED: AtomicPtr<Links> = AtomicPtr::new(ptr::null_mut());

impl Links {
    /// None yet; shared with whoever is forked, and never unmapped.
    pub fn create() -> Option<&'static Self> {
        let memory = crate::fork::shared_memory::<Self>()?;
        // SAFETY: never unmapped, and zeros are values of all its integers.
        Some(unsafe { memory.as_ref() })
    }

    /// From now on CRIU's calls are noted here.
    pub fn attach(&'static self) {
        LINKED.store(ptr::from_ref(self).cast_mut(), Ordering::Release);
    }

    /// Of a dump, in the process that makes it.
    fn current() -> Option<&'static Self> {
        // SAFETY: null, or from `attach`.
        let links = unsafe { LINKED.load(Ordering::Acquire).as_ref() }?;
        fork::dumps().then_some(links)
    }

    fn note(&self, directory: c_int, path: &CStr) {
        let bytes = path.to_bytes_with_nul();
        let empty = self.0.iter().find(|link| !link.is_there());
        let Some(link) = empty.filter(|_| bytes.len() <= PATH_BYTES) else {
            return;
        };
        // SAFETY: numbers only.
        let directory = unsafe { libc::fcntl(directory, libc::F_DUPFD_CLOEXEC, 0) };
        if directory < 0 {
            return;
        }
        // SAFETY: only CRIU's one thread writes, and the tracer reads when CRIU is no more.
        let place = unsafe { &mut *link.place.get() };
        place.0 = directory;
        place.1[..bytes.len()].copy_from_slice(bytes);
        link.state.store(THERE, Ordering::Release);
    }

    fn forget(&self, path: &CStr) {
        let there = self.0.iter().filter(|link| link.is_there());
        for link in there {
            // SAFETY: as in `note`.
            let place = unsafe { &*link.place.get() };
            if CStr::from_bytes_until_nul(&place.1) == Ok(path) {
                link.state.store(EMPTY, Ordering::Release);
                // SAFETY: opened by `note`, and known only here.
                unsafe { libc::close(place.0) };
            }
        }
    }

    /// Takes all of them away. CRIU must have ended.
    ///
    /// # Errors
    /// The last that the kernel told; the others are done.
    pub fn remove(&self) -> std::io::Result<()> {
        let mut result = Ok(());
        for link in self.0.iter().filter(|link| link.is_there()) {
            // SAFETY: as in `note`.
            let place = unsafe { &*link.place.get() };
            // SAFETY: a C string, which `note` has written with its end.
            let removed = unsafe { real_unlinkat(place.0, place.1.as_ptr().cast(), 0) };
            let error = std::io::Error::last_os_error();
            if removed < 0 && error.raw_os_error() != Some(libc::ENOENT) {
                result = Err(error);
            }
            link.state.store(EMPTY, Ordering::Release);
        }
        result
    }
}

impl Link {
    fn is_there(&self) -> bool {
        self.state.load(Ordering::Acquire) == THERE
    }
}

/// `linkat(2)`.
///
/// # Safety
/// As for that.
pub unsafe fn linkat(
    from: c_int,
    from_path: *const c_char,
    directory: c_int,
    path: *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: passed on as it came.
    let result =
        unsafe { libc::syscall(libc::SYS_linkat, from, from_path, directory, path, flags) };
    if result == 0
        && let Some(links) = Links::current()
        && !path.is_null()
    {
        // SAFETY: the kernel has just read a path there.
        let path = unsafe { CStr::from_ptr(path) };
        if is_of_criu(path) {
            links.note(directory, path);
        }
    }
    c_int::try_from(result).unwrap_or(-1)
}

/// `unlinkat(2)`.
///
/// # Safety
/// As for that.
pub unsafe fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: passed on as it came.
    let result = unsafe { real_unlinkat(directory, path, flags) };
    if result == 0
        && let Some(links) = Links::current()
        && !path.is_null()
    {
        // SAFETY: the kernel has just read a path there.
        links.forget(unsafe { CStr::from_ptr(path) });
    }
    result
}

/// # Safety
/// As for `unlinkat(2)`.
unsafe fn real_unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: as the caller says.
    let result = unsafe { libc::syscall(libc::SYS_unlinkat, directory, path, flags) };
    c_int::try_from(result).unwrap_or(-1)
}

fn is_of_criu(path: &CStr) -> bool {
    let path = path.to_bytes();
    let name = path.rsplit(|byte| *byte == b'/').next();
    name.is_some_and(|name| name.starts_with(b"link_remap."))
}
