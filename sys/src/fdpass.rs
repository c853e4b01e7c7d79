//! Descriptors that pass from process to process: in messages over a unix socket, and by a child
//! that shares its parent's whole table.
//!
//! Invariants: every descriptor received is close-on-exec and owned from the moment it exists; a
//! message that was cut short, or brought more descriptors than allowed, is an error and closes
//! what it brought.

#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, accept4, recvmsg, sendmsg,
};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most descriptors in one message. The kernel allows 253.
pub const FDS_MAX: usize = 64;

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet {
    /// What was sent; empty when the other side has closed.
    pub bytes: Vec<u8>,
    /// In the order in which they were sent.
    pub fds: Vec<OwnedFd>,
}

/// Which of the two a process is after [`fork_sharing_descriptors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// The calling process.
    Parent {
        /// Process id of the child.
        child: Pid,
    },
    /// The new one.
    Child,
}

/// Sends one packet on a `SOCK_SEQPACKET` socket, or bytes on a stream. At most [`FDS_MAX`]
/// descriptors. `EAGAIN` passes through as [`io::ErrorKind::WouldBlock`].
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if FDS_MAX < fds.len() {
        let text = format!(
            "{} descriptors in one message, more than {FDS_MAX}",
            fds.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights };
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &parts,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != bytes.len() {
        return Err(io::Error::new(
            io::ErrorKind::WriteZero,
            "message was cut short",
        ));
    }
    Ok(())
}

/// Receives one packet of at most `bytes_max` bytes.
pub fn receive(socket: BorrowedFd<'_>, bytes_max: usize) -> io::Result<Packet> {
    let mut bytes = vec![0; bytes_max];
    let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just opened these descriptors for this process, and nothing
            // else knows their numbers.
            fds.extend(numbers.iter().map(|n| unsafe { OwnedFd::from_raw_fd(*n) }));
        }
    }
    let (length, flags) = (message.bytes, message.flags);
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        let text = format!("message is longer than {bytes_max} bytes or {FDS_MAX} descriptors");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    bytes.truncate(length);
    Ok(Packet { bytes, fds })
}

/// Accepts a connection, non-blocking.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let number = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the descriptor has just been made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Waits for readiness of `fd` in the runtime of the caller.
pub fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and the same until it is dropped, and the result owns it.
    let watched = unsafe { AsyncFd::register(fd) };
    watched.map_err(io::Error::from)
}

/// Waits until `fd`, which can only become readable, does so.
pub fn watched_for_reading(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `watched`.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(io::Error::from)
}

/// A descriptor of the process `pid`: readable when it has ended.
pub fn open_process(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and returns a new descriptor or an error.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let number = i32::try_from(Errno::result(number)?).map_err(io::Error::other)?;
    // SAFETY: the descriptor has just been made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Forks a child that shares the table of descriptors with its parent: one that either of them
/// opens or closes is open or closed in both, and while one of them lives they all stay open.
///
/// To be called while the process has one thread; any other use is refused.
pub fn fork_sharing_descriptors() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other(
            "a process with several threads cannot be copied",
        ));
    }
    // SAFETY: without CLONE_VM this is a fork. The process has one thread, so no lock is held and
    // nothing is half done; the child uses neither the C library's record of its thread id nor
    // handlers registered for forks, which the bare call leaves as they are.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::CLONE_FILES | libc::SIGCHLD,
            0,
            0,
            0,
            0,
        )
    };
    match Errno::result(result)? {
        0 => Ok(Fork::Child),
        pid => {
            let pid = i32::try_from(pid).map_err(io::Error::other)?;
            Ok(Fork::Parent {
                child: Pid::from_raw(pid),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockType, socketpair};
    use std::fs::File;
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn a_packet_arrives_with_its_descriptors_closed_on_exec() {
        let (left, right) = pair();
        let files = [null(), null()];
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(left.as_fd(), b"hello", &fds).unwrap();
        let packet = receive(right.as_fd(), 100).unwrap();
        assert_eq!(
            (packet.bytes.as_slice(), packet.fds.len()),
            (&b"hello"[..], 2)
        );
        for fd in &packet.fds {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_leaks_nothing() {
        let (left, right) = pair();
        let file = null();
        send(left.as_fd(), b"too long", &[file.as_fd()]).unwrap();
        let error = receive(right.as_fd(), 3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let fds = vec![file.as_fd(); FDS_MAX + 1];
        let error = send(left.as_fd(), b"many", &fds).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = receive(right.as_fd(), 100).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_end_of_the_conversation_is_an_empty_packet() {
        let (left, right) = pair();
        drop(left);
        let packet = receive(right.as_fd(), 100).unwrap();
        assert!(packet.bytes.is_empty() && packet.fds.is_empty());
    }

    #[test]
    fn a_process_with_threads_is_not_copied() {
        let error = fork_sharing_descriptors().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
    }
}
