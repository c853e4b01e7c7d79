//! The two userfaultfd calls a page-fault side cannot do without, a restartable sequence, a signal
//! for one thread, and descriptors that come and go by number.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;

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

/// Stays in the middle of a restartable sequence, from which the kernel sends it back to the
/// beginning whenever something else has run. Returns when the kernel has forgotten that.
#[cfg(target_arch = "x86_64")]
pub fn stay_in_sequence() {
    // SAFETY: a C string; the C library has one such symbol, or none.
    let offset = unsafe { nix::libc::dlsym(nix::libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    assert!(!offset.is_null(), "a C library that registers its threads");
    // SAFETY: a `ptrdiff_t` that the C library has set before `main`.
    let offset = unsafe { offset.cast::<isize>().read() };
    // SAFETY: writes only the field `rseq_cs` of this thread's own `struct rseq`, which is there
    // for it. The descriptor is a `struct rseq_cs`; the abort handler has the signature glibc
    // registers (RSEQ_SIG of sys/rseq.h) before it. Registers are told; the stack is not touched.
    unsafe {
        std::arch::asm!(
            ".pushsection .data.sequence, \"aw\"",
            ".balign 32",
            "22: .long 0, 0",
            ".quad 33f, 44f - 33f, 55f",
            ".popsection",
            "add {area}, fs:[0]",
            "66: lea {descriptor}, [rip + 22b]",
            "mov [{area} + 8], {descriptor}",
            "33: cmp qword ptr [{area} + 8], 0",
            "jne 33b",
            "44: jmp 77f",
            ".long 0x53053053",
            "55: jmp 66b",
            "77:",
            area = inout(reg) offset => _,
            descriptor = out(reg) _,
            options(nostack),
        );
    }
}

/// Sends a signal to one thread of a process.
pub fn signal(pid: i32, tid: i32, signal: Signal) -> Result<(), Errno> {
    // SAFETY: numbers only.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal as i32) };
    Errno::result(sent).map(drop)
}

/// A descriptor that this process has just been given by number.
pub fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it, or `exec` has handed it on, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Lets a descriptor stay open in what this process starts.
pub fn keep_on_exec(fd: &OwnedFd) {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("an open descriptor");
}

/// Puts `fd` where `number` is, for what this process becomes.
pub fn put_at(fd: &OwnedFd, number: RawFd) {
    // SAFETY: numbers only; what was there is closed, and nobody here uses it any more.
    let put = unsafe { libc::dup2(fd.as_raw_fd(), number) };
    assert_eq!(put, number, "both are open");
}
