//! The socket between a daemon and a pager: messages in JSON, one per packet, with descriptors.
//!
//! Invariants: a message is whole or an error; who may not connect is turned away before a byte of
//! it is read.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, getsockopt,
    listen, shutdown, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use pageferry_sys::fdpass;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::message::{Ask, MESSAGE_BYTES_MAX};

/// One end of a conversation.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

/// Where a pager is talked to.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

/// Why a conversation cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket cannot be made or bound.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody listens.
    #[error("cannot connect to {path}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A connection could not be taken.
    #[error("cannot accept a connection")]
    Accept(#[source] io::Error),
    /// Another user.
    #[error("a process of user {uid} may not connect")]
    Stranger {
        /// Its user id.
        uid: u32,
    },
    /// A message could not be sent.
    #[error("cannot send a message")]
    Send(#[source] io::Error),
    /// A message could not be received.
    #[error("cannot receive a message")]
    Receive(#[source] io::Error),
    /// A message that means nothing here.
    #[error("cannot make sense of a message")]
    Message(#[source] serde_json::Error),
    /// A message that is too long.
    #[error("message of {0} bytes is longer than {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
}

impl Listener {
    /// Listens at `path`, for root and the own user only. A file left there is replaced.
    pub fn bind(path: &Path) -> Result<Self, ChannelError> {
        let failed = |source| ChannelError::Listen {
            path: path.to_owned(),
            source,
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let socket = listening(path).map_err(|errno| failed(errno.into()))?;
        let socket = fdpass::watched(socket).map_err(failed)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Waits for somebody to connect who may. Cancelling loses nothing.
    pub async fn accept(&self) -> Result<Channel, ChannelError> {
        let accepted = self
            .socket
            .async_io(Interest::READABLE, |socket| fdpass::accept(socket.as_fd()))
            .await;
        let fd = accepted.map_err(ChannelError::Accept)?;
        let peer = getsockopt(&fd, sockopt::PeerCredentials);
        let uid = peer
            .map_err(|errno| ChannelError::Accept(errno.into()))?
            .uid();
        if uid != 0 && uid != geteuid().as_raw() {
            return Err(ChannelError::Stranger { uid });
        }
        Channel::new(fd).map_err(ChannelError::Accept)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The directory may be gone already, with the file in it.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn listening(path: &Path) -> nix::Result<OwnedFd> {
    let socket = seqpacket()?;
    let address = UnixAddr::new(path)?;
    // Nobody else gets at it, not even between the call and a later change of its mode. The
    // process has one thread that makes files.
    let old = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(socket.as_raw_fd(), &address);
    umask(old);
    bound?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

fn seqpacket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

impl Channel {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(fdpass::watched(fd)?))
    }

    /// Connects to a pager.
    pub fn connect(path: &Path) -> Result<Self, ChannelError> {
        let connected = seqpacket().and_then(|socket| {
            connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        });
        let connected = connected.map_err(io::Error::from).and_then(Self::new);
        connected.map_err(|source| ChannelError::Connect {
            path: path.to_owned(),
            source,
        })
    }

    /// Ends the conversation for both sides.
    pub fn shut(&self) {
        // Fails when the other side has ended it.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// Whether the other side has ended the conversation, whatever it had said before.
    pub fn is_over(&self) -> bool {
        let mut polled = [PollFd::new(self.0.get_ref().as_fd(), PollFlags::empty())];
        // The kernel tells a hang-up unasked.
        let told = poll(&mut polled, PollTimeout::ZERO);
        told.is_ok()
            && polled[0]
                .revents()
                .is_some_and(|it| it.contains(PollFlags::POLLHUP))
    }

    /// Sends a message.
    pub async fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Message)?;
        if MESSAGE_BYTES_MAX < bytes.len() {
            return Err(ChannelError::TooLong(bytes.len()));
        }
        let sent = self
            .0
            .async_io(Interest::WRITABLE, |socket| {
                fdpass::send(socket.as_fd(), &bytes, fds)
            })
            .await;
        sent.map_err(ChannelError::Send)
    }

    /// Waits for a message; `None` when the other side is gone. Cancelling loses nothing.
    pub async fn receive<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        let received = self
            .0
            .async_io(Interest::READABLE, |socket| {
                fdpass::receive(socket.as_fd(), MESSAGE_BYTES_MAX)
            })
            .await;
        let packet = match received {
            Ok(packet) if packet.bytes.is_empty() => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other.map_err(ChannelError::Receive)?,
        };
        let message = serde_json::from_slice(&packet.bytes).map_err(ChannelError::Message)?;
        Ok(Some((message, packet.fds)))
    }
}

/// Connections that may wait to be accepted: a daemon and one that takes its place.
const BACKLOG: i32 = 4;

/// The next question; none when there is nobody who could ask any more.
pub async fn next_question(connection: Option<&Channel>) -> Option<(Ask, Vec<OwnedFd>)> {
    match connection {
        None => std::future::pending().await,
        Some(channel) => channel.receive().await.unwrap_or_else(|error| {
            warn!(%error, "the daemon does not make sense");
            None
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Ask, Request};

    #[tokio::test]
    async fn messages_cross_and_the_end_is_seen_on_both_sides() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pager.sock");
        std::fs::write(&path, "stale").unwrap();
        let listener = Listener::bind(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let ours = Channel::connect(&path).unwrap();
        let theirs = listener.accept().await.unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let ask = Ask {
            id: 3,
            request: Request::Status,
        };
        ours.send(&ask, &[file.as_fd()]).await.unwrap();
        let (ask, fds) = theirs.receive::<Ask>().await.unwrap().unwrap();
        assert_eq!((ask.id, fds.len()), (3, 1));
        assert!(!theirs.is_over());
        drop(ours);
        assert!(theirs.is_over());
        assert!(theirs.receive::<Ask>().await.unwrap().is_none());
        drop(listener);
        assert!(Channel::connect(&path).is_err());
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error_and_what_is_too_long_is_not_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pager.sock");
        let listener = Listener::bind(&path).unwrap();
        let ours = Channel::connect(&path).unwrap();
        let theirs = listener.accept().await.unwrap();
        ours.send(&"hello", &[]).await.unwrap();
        let received = theirs.receive::<Ask>().await;
        assert!(matches!(received, Err(ChannelError::Message(_))));
        let sent = ours.send(&"x".repeat(MESSAGE_BYTES_MAX), &[]).await;
        assert!(matches!(sent, Err(ChannelError::TooLong(_))));
    }
}
