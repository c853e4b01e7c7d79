//! What a process may lose while it goes on: pages, its first thread, and the will to be frozen.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{check, pointer};

/// Makes pages that nothing was ever in such as the kernel can no longer read, as after an error of
/// memory or swap: by a userfaultfd that is gone again afterwards, while what it did stays.
pub(super) fn poison(address: u64, pages: usize) -> io::Result<()> {
    let fd = register(address, pages)?;
    let mut poison = [address, pages as u64 * 4096, 0, 0];
    // SAFETY: as long as the kernel reads and writes it; the test mapped the pages for this.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), POISON, poison.as_mut_ptr()) })
}

/// A thread that waits in the kernel for a page which nobody brings, and cannot be frozen there.
pub(super) fn wait_for_page(address: u64) -> io::Result<()> {
    let fd = register(address, 1)?;
    std::thread::spawn(move || {
        // The kernel, on behalf of this process, looks at this process from outside.
        let _kept = fd;
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: pointer(address),
            iov_len: 1,
        };
        // SAFETY: room for one byte; the other address is only looked at by the kernel.
        unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        }
    });
    Ok(())
}

/// A userfaultfd that is asked for what is missing in these pages.
fn register(address: u64, pages: usize) -> io::Result<OwnedFd> {
    // Not for faults of the process alone: the kernel's own wait, too.
    // SAFETY: one number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = libc::c_int::try_from(fd).unwrap();
    check(fd)?;
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = pages as u64 * 4096;
    // What the kernel asks for: version, features and calls; range, mode and calls.
    let mut api = [0xaa_u64, FEATURE_POISON, 0];
    let mut register = [address, length, MODE_MISSING, 0];
    for (request, argument) in [(API, api.as_mut_ptr()), (REGISTER, register.as_mut_ptr())] {
        // SAFETY: as long as the kernel reads and writes it; the pages were mapped for this.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })?;
    }
    Ok(fd)
}

/// Ends the first thread, which the test harness waits in, and no other.
pub(super) fn end_first_thread() -> io::Result<()> {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: ends the thread, with nothing of its own being touched again.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let handler = end as extern "C" fn(libc::c_int);
    // SAFETY: the handler makes a system call and no more.
    unsafe { libc::signal(libc::SIGUSR2, handler as libc::sighandler_t) };
    // SAFETY: numbers only; the first thread has the number of its process.
    let sent = unsafe {
        let pid = libc::getpid();
        libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR2)
    };
    check(libc::c_int::try_from(sent).unwrap())
}

/// `UFFD_FEATURE_POISON`.
const FEATURE_POISON: u64 = 1 << 14;

/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;

const API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, 24);
const REGISTER: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x00, 32);
const POISON: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x08, 32);
