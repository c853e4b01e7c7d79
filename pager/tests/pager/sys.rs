//! The workload's own memory, handled as addresses: it is missing, moved and given up under test.

#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags};
use nix::unistd::ForkResult;

fn pointer(address: u64) -> NonNull<libc::c_void> {
    let address = usize::try_from(address).unwrap();
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap()
}

fn length(bytes: u64) -> NonZeroUsize {
    NonZeroUsize::new(usize::try_from(bytes).unwrap()).unwrap()
}

/// Maps private anonymous memory at `address`, where nothing may be.
pub fn map(address: u64, bytes: u64) -> nix::Result<()> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
    let address = NonZeroUsize::new(usize::try_from(address).unwrap());
    // SAFETY: the kernel refuses a place where something is mapped.
    unsafe { nix::sys::mman::mmap_anonymous(address, length(bytes), protection, flags) }.map(drop)
}

/// Unmaps memory that [`map`] made.
pub fn unmap(address: u64, bytes: u64) -> nix::Result<()> {
    // SAFETY: the tests give memory that only they know, by address.
    unsafe { nix::sys::mman::munmap(pointer(address), length(bytes).get()) }
}

/// Moves memory that [`map`] made to `to`, replacing what is there.
pub fn remap(address: u64, bytes: u64, to: u64) -> nix::Result<()> {
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    let size = length(bytes).get();
    let to = Some(pointer(to));
    // SAFETY: as in `unmap`, for both places.
    unsafe { nix::sys::mman::mremap(pointer(address), size, size, flags, to) }.map(drop)
}

/// Gives up the contents of memory that [`map`] made.
pub fn give_up(address: u64, bytes: u64) -> nix::Result<()> {
    let advice = MmapAdvise::MADV_DONTNEED;
    // SAFETY: as in `unmap`.
    unsafe { nix::sys::mman::madvise(pointer(address), length(bytes).get(), advice) }
}

/// The word at `address`.
pub fn read(address: u64) -> u64 {
    // SAFETY: the tests give aligned addresses in memory that they have mapped.
    unsafe { pointer(address).cast::<u64>().as_ptr().read_volatile() }
}

/// Changes the word at `address`.
pub fn write(address: u64, word: u64) {
    // SAFETY: as in `read`; nothing refers to this memory.
    unsafe { pointer(address).cast::<u64>().as_ptr().write_volatile(word) }
}

/// Forks the calling thread.
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: the child only reads memory, makes plain system calls and exits.
    unsafe { nix::unistd::fork() }
}

/// Ends a forked child at once, without what its parent wants to be done at an end.
pub fn exit(code: i32) -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(code) }
}

/// Takes a descriptor that was inherited, once.
pub fn inherited(number: i32) -> OwnedFd {
    // SAFETY: whoever started this process left the descriptor for it, and it is asked for once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Lets a descriptor survive exec.
pub fn keep_on_exec(fd: &OwnedFd) -> io::Result<()> {
    let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
    nix::fcntl::fcntl(fd, flags)?;
    Ok(())
}
