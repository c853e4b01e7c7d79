//! Packets: a message each, with the descriptors that ride on it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, Shutdown, getsockopt, recv, sendmsg, setsockopt, shutdown, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::TalkError;
use crate::sys;

/// A message as it was sent, byte for byte.
#[derive(Debug, Default)]
pub(super) struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// A packet, and who has sent it if senders are named.
pub(super) type Received = (Packet, Option<i32>);

/// Who is at the other end of a socket.
#[derive(Debug)]
pub struct Peer {
    pid: i32,
    pidfd: OwnedFd,
}

/// One end of a `SOCK_SEQPACKET` connection. Its flags are left alone: they belong to everybody
/// who has this end, too.
#[derive(Debug)]
pub(super) struct Channel {
    socket: AsyncFd<OwnedFd>,
}

impl From<Vec<u8>> for Packet {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            descriptors: Vec::new(),
        }
    }
}

impl Peer {
    /// The process that connected, or that made the socket pair; in our pid namespace.
    ///
    /// # Errors
    /// What the kernel says: the process has ended, or is in no pid namespace of ours. Linux 6.5
    /// or newer.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let pid = getsockopt(&socket, sockopt::PeerCredentials)?.pid();
        let pidfd = sys::peer_pidfd(socket)?;
        if pid == 0 {
            return Err(Errno::ESRCH.into());
        }
        Ok(Self { pid, pidfd })
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A duplicate of a descriptor it has.
    pub(super) fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        sys::pidfd_getfd(self.pidfd.as_fd(), number)
    }

    pub(super) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }
}

impl Channel {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = sys::register(socket)?;
        Ok(Self { socket })
    }

    /// Has the kernel write beside each packet who has sent it.
    pub fn name_senders(&self) -> io::Result<()> {
        Ok(setsockopt(&self.socket, sockopt::PassCred, &true)?)
    }

    pub async fn send(&self, packet: &Packet) -> io::Result<()> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let descriptors: Vec<RawFd> = packet.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let rights = &rights[..usize::from(!descriptors.is_empty())];
        let parts = [io::IoSlice::new(&packet.bytes)];
        let sent = self.socket.async_io(Interest::WRITABLE, |socket| {
            let sent = sendmsg::<()>(socket.as_raw_fd(), &parts, rights, flags, None);
            sent.map_err(io::Error::from)
        });
        sent.await.map(drop)
    }

    /// The next packet. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`TalkError::Closed`] when everybody has closed the other end.
    pub async fn receive(&self) -> Result<Received, TalkError> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
        let received = self.socket.async_io(Interest::READABLE, |socket| {
            // With MSG_TRUNC the kernel tells the packet's true length.
            let length = recv(socket.as_raw_fd(), &mut [], peek)?;
            if length > PACKET_MAX {
                return Ok(Err(TalkError::PacketTooLong { length }));
            }
            let mut bytes = vec![0; length];
            let received = sys::receive(socket.as_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
            let packet = Packet {
                bytes,
                descriptors: received.descriptors,
            };
            Ok(Ok((packet, received.sender)))
        });
        match received.await {
            Ok(Ok((packet, _))) if packet.bytes.is_empty() => Err(TalkError::Closed),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(TalkError::Closed),
            Err(error) => Err(TalkError::Receive(error)),
        }
    }

    /// Whether somebody has the other end open, or something of theirs waits to be read.
    pub fn is_open(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked = recv(self.socket.as_raw_fd(), &mut [0], flags);
        peeked == Err(Errno::EAGAIN) || peeked.is_ok_and(|length| length > 0)
    }

    /// Shows the other end an end of file. What it says is still heard.
    pub fn hang_up(&self) {
        // Fails only when the other end is gone already, which is what was asked for.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    pub fn peer(&self) -> io::Result<Peer> {
        Peer::of(self.socket.as_fd())
    }
}

/// Longest packet that is taken, in bytes. Notifications and answers are some hundred, a runtime's
/// requests some thousand.
pub(super) const PACKET_MAX: usize = 1 << 20; // 1 MiB
