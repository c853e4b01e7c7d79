//! The two userfaultfd calls a page-fault side cannot do without.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// `struct uffdio_copy` of `linux/userfaultfd.h`.
#[repr(C)]
pub struct UffdioCopy {
    target: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
pub struct UffdioZeropage {
    start: u64,
    length: u64,
    mode: u64,
    zeroed: i64,
}

nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdioCopy);
nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, UffdioZeropage);

/// Puts `contents` at `address` of the process behind `uffd` and wakes who waits for it.
pub fn copy(uffd: BorrowedFd<'_>, address: u64, contents: &[u8]) -> Result<(), Errno> {
    let source = contents.as_ptr() as u64;
    let length = contents.len() as u64;
    let mut argument = UffdioCopy {
        target: address,
        source,
        length,
        mode: 0,
        copied: 0,
    };
    // SAFETY: the kernel reads `contents` and writes the argument, both alive; memory of another
    // process is written, of ours none.
    unsafe { uffdio_copy(uffd.as_raw_fd(), &raw mut argument) }.map(drop)
}

/// Puts a page of zeros at `address`.
pub fn zero(uffd: BorrowedFd<'_>, address: u64) -> Result<(), Errno> {
    let mut argument = UffdioZeropage {
        start: address,
        length: 4096,
        mode: 0,
        zeroed: 0,
    };
    // SAFETY: the kernel writes the argument only; memory of ours none.
    unsafe { uffdio_zeropage(uffd.as_raw_fd(), &raw mut argument) }.map(drop)
}
