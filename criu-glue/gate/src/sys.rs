//! The unsafe code of this program: descriptors by number.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// The descriptor that the runtime has opened for CRIU; none if nothing is open there.
pub fn inherited(number: RawFd) -> Option<BorrowedFd<'static>> {
    // SAFETY: `fcntl(F_GETFD)` reads a flag of whatever the number means, or fails.
    let is_open = 0 <= number && 0 <= unsafe { libc::fcntl(number, libc::F_GETFD) };
    // SAFETY: it was open when this program began, nothing here closes it, and `put_at` only
    // exchanges what it means.
    is_open.then(|| unsafe { BorrowedFd::borrow_raw(number) })
}

/// Has `number` mean what `descriptor` means, also after an exec.
pub fn put_at(descriptor: &OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: both are numbers; the one that is closed here is the runtime's, which nobody owns.
    Errno::result(unsafe { libc::dup2(descriptor.as_raw_fd(), number) })?;
    Ok(())
}

/// Keeps a descriptor open over an exec.
pub fn keep(descriptor: &OwnedFd) -> io::Result<()> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(())
}

/// Everything that is mapped from now on, here and after an exec, has small pages.
pub fn no_huge_pages() -> io::Result<()> {
    let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: numbers only, each as wide as the kernel reads it.
    let set = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, on, unused, unused, unused) };
    Errno::result(set)?;
    Ok(())
}

/// One packet and its descriptors; both are empty when the other end is closed.
pub fn receive(
    socket: &OwnedFd,
    bytes_max: usize,
    descriptors_max: usize,
) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; bytes_max];
    let mut control = vec![0; descriptors_max * 8 + 64];
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let number = socket.as_fd().as_raw_fd();
    let message = recvmsg::<()>(number, &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made these descriptors for us alone.
            let own = |number: RawFd| unsafe { OwnedFd::from_raw_fd(number) };
            descriptors.extend(numbers.into_iter().map(own));
        }
    }
    let length = message.bytes;
    bytes.truncate(length);
    Ok((bytes, descriptors))
}
