//! Memory mappings of the self-checking writer, as the kernel knows them.
//!
//! A [`Mapping`] owns its address range, so reading and writing it is safe as long as it is
//! accessible; what is made inaccessible on purpose is for the caller to leave alone.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use super::check;

pub const PAGE: usize = 4096;

/// A range of this process's memory, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

// SAFETY: the range belongs to the value alone; nothing about it is tied to a thread.
unsafe impl Send for Mapping {}

/// Words of 0 that this process shares with those it forks, for as long as one of them lives.
pub fn shared_words(count: usize) -> io::Result<&'static [AtomicU64]> {
    let length = (count * size_of::<AtomicU64>()).next_multiple_of(PAGE);
    let mapping = std::mem::ManuallyDrop::new(Mapping::new(Backing::Shared, length)?);
    // SAFETY: zeros, page-aligned, large enough, never unmapped, and only ever used as atomics.
    Ok(unsafe { std::slice::from_raw_parts(mapping.address.cast(), count) })
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    Private,
    Shared,
    /// Private (copy on write) or shared memory of a file.
    File {
        file: &'a OwnedFd,
        shared: bool,
    },
    /// Huge pages of hugetlbfs; nothing is reserved, so it can be had without any.
    HugeTlb,
}

impl Mapping {
    /// `length` is a multiple of the page size (2 MiB for huge pages), above 0.
    pub fn new(backing: Backing<'_>, length: usize) -> io::Result<Self> {
        let anonymous = libc::MAP_ANONYMOUS;
        let (flags, fd) = match backing {
            Backing::Private => (libc::MAP_PRIVATE | anonymous, -1),
            Backing::Shared => (libc::MAP_SHARED | anonymous, -1),
            Backing::File { file, shared: true } => (libc::MAP_SHARED, file.as_raw_fd()),
            Backing::File {
                file,
                shared: false,
            } => (libc::MAP_PRIVATE, file.as_raw_fd()),
            Backing::HugeTlb => (
                libc::MAP_PRIVATE | anonymous | libc::MAP_HUGETLB | libc::MAP_NORESERVE,
                -1,
            ),
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses a free range, so no existing memory changes.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            length,
        })
    }

    pub fn address(&self) -> usize {
        self.address as usize
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped for the life of self, and other processes that share it write
        // only when asked to and waited for.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in bytes(), and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }

    /// Grows or shrinks, wherever the kernel finds room.
    pub fn resize(&mut self, length: usize) -> io::Result<()> {
        // SAFETY: the range is ours and no borrow of it is alive while self is borrowed
        // exclusively.
        let address = unsafe {
            libc::mremap(
                self.address.cast(),
                self.length,
                length,
                libc::MREMAP_MAYMOVE,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.address = address.cast();
        self.length = length;
        Ok(())
    }

    /// Gives the pages from byte `from` on back.
    pub fn truncate(&mut self, from: usize) -> io::Result<()> {
        assert!(from > 0 && from < self.length && from.is_multiple_of(PAGE));
        // SAFETY: the tail is ours, and no longer reachable through self afterwards.
        check(unsafe { libc::munmap(self.at(from), self.length - from) })?;
        self.length = from;
        Ok(())
    }

    /// `madvise` on part of the range.
    pub fn advise(&mut self, from: usize, length: usize, advice: i32) -> io::Result<()> {
        self.check_range(from, length);
        // SAFETY: the range is ours; advice may drop its contents but not other memory.
        check(unsafe { libc::madvise(self.at(from), length, advice) })
    }

    /// Takes every access away.
    pub fn hide(&mut self) -> io::Result<()> {
        // SAFETY: the range is ours; callers leave hidden memory alone.
        check(unsafe { libc::mprotect(self.address.cast(), self.length, libc::PROT_NONE) })
    }

    /// Gives access back.
    pub fn show(&mut self) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is ours.
        check(unsafe { libc::mprotect(self.address.cast(), self.length, access) })
    }

    pub fn lock(&mut self) -> io::Result<()> {
        // SAFETY: the range is ours; locking changes no contents.
        check(unsafe { libc::mlock(self.address.cast(), self.length) })
    }

    pub fn unlock(&mut self) -> io::Result<()> {
        // SAFETY: as in lock().
        check(unsafe { libc::munlock(self.address.cast(), self.length) })
    }

    /// Whether the kernel can read this byte on our behalf: false for a guard page.
    pub fn is_readable(&self, at: usize) -> bool {
        self.check_range(at, 1);
        let mut byte = [0u8; 1];
        let local = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: self.at(at),
            iov_len: 1,
        };
        // SAFETY: both vectors describe one valid byte of this process; an inaccessible remote byte
        // makes the call fail, not the process.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        read == 1
    }

    fn at(&self, offset: usize) -> *mut c_void {
        self.address.wrapping_add(offset).cast()
    }

    fn check_range(&self, from: usize, length: usize) {
        assert!(from <= self.length && length <= self.length - from);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours and nobody can reach it any more.
        let result = check(unsafe { libc::munmap(self.address.cast(), self.length) });
        debug_assert!(result.is_ok(), "a range of ours can be unmapped");
    }
}

/// An anonymous file.
pub fn memory_file(length: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"lab-writer".as_ptr(), libc::MFD_CLOEXEC) };
    let file = owned(fd)?;
    let length = libc::off_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: file is a valid descriptor.
    check(unsafe { libc::ftruncate(file.as_raw_fd(), length) })?;
    Ok(file)
}

/// A file whose memory not even the kernel maps (Linux 5.14, where it is enabled).
pub fn secret_file(length: usize) -> io::Result<OwnedFd> {
    // SAFETY: memfd_secret takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let file = owned(i32::try_from(fd).map_err(io::Error::other)?)?;
    let length = libc::off_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: file is a valid descriptor.
    check(unsafe { libc::ftruncate(file.as_raw_fd(), length) })?;
    Ok(file)
}

/// Makes the first `length` bytes of memory that was never touched such as the kernel can no longer
/// read (Linux 6.6), as after an error of memory or swap: by a userfaultfd that is closed again.
pub fn lose_pages(mapping: &Mapping, length: usize) -> io::Result<()> {
    // SAFETY: userfaultfd takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = owned(i32::try_from(fd).map_err(io::Error::other)?)?;
    let (start, length) = (mapping.address() as u64, length as u64);
    // Version, features and calls; range, mode and calls; range, mode and result.
    let mut api = [0xaa_u64, UFFD_FEATURE_POISON, 0, 0];
    let mut register = [start, length, UFFDIO_REGISTER_MODE_MISSING, 0];
    let mut poison = [start, length, 0, 0];
    let api = (UFFDIO_API, &mut api);
    for (request, argument) in [
        api,
        (UFFDIO_REGISTER, &mut register),
        (UFFDIO_POISON, &mut poison),
    ] {
        // SAFETY: each argument is at least as long as the kernel reads and writes it, and the
        // mapping is ours.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument.as_mut_ptr()) })?;
    }
    Ok(())
}

const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, 24);
const UFFDIO_REGISTER: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x00, 32);
const UFFDIO_POISON: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x08, 32);

/// Reads from a file at an offset; how much there was.
pub fn read_at(file: impl AsFd, offset: usize, out: &mut [u8]) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: out is valid for its length.
    let read = unsafe { libc::pread(fd, out.as_mut_ptr().cast(), out.len(), offset) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Gives free heap memory back to the kernel.
pub fn trim_heap() {
    // SAFETY: malloc_trim touches free memory only.
    unsafe { libc::malloc_trim(0) };
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: the kernel just returned it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Linux 6.13: accesses fault, without a mapping of its own.
pub const MADV_GUARD_INSTALL: i32 = 102;
