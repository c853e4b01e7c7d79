//! The socket on which a lazy restore hands over page faults.
//!
//! `criu restore` connects once, before anything is restored, to `lazy-pages.socket` in its work
//! directory, and does not try again: bind it before the request. Each restored task then sends its
//! process id and its userfaultfd, just before it starts to remap its memory; faults may come at
//! once and block the restore until they are served. When all tasks are ready CRIU says that it has
//! finished. Should our end be closed before that, CRIU kills what it restored.
//!
//! A userfaultfd comes with UFFDIO_API done, non-blocking, with the events fork, remap, remove and
//! unmap; its ranges are registered for missing pages only. The task closes its own copy, so ours
//! is the only one: closing it lets waiting threads read zeros.
//!
//! Absent: serving the faults.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::MsgFlags;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use crate::sys;

/// A bound `lazy-pages.socket`; the file is removed on drop.
#[derive(Debug)]
pub struct LazySocket {
    listener: UnixListener,
    path: PathBuf,
}

/// The connection of one restore.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    /// Bytes of a number that has not come whole.
    partial: Vec<u8>,
    /// The task whose userfaultfd comes next.
    expected: Option<i32>,
}

/// What a restore says. Process ids are those of the dump (`pstree.img`).
#[derive(Debug)]
#[non_exhaustive]
pub enum LazyMessage {
    /// Page faults of this process are served through `fd` from now on.
    Uffd { vpid: i32, fd: OwnedFd },
    /// This process is a zombie and has no memory.
    Dead { vpid: i32 },
    /// All tasks are ready; background filling may begin.
    Finished,
}

/// Why page faults could not be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    #[error("cannot bind {path}")]
    Bind {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot accept a restore on {path}")]
    Accept {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot receive from the restore")]
    Receive(#[source] io::Error),
    #[error("the restore sent no descriptor for process {vpid}")]
    NoDescriptor { vpid: i32 },
    #[error("the restore sent {number} instead of a process id")]
    NoProcess { number: i32 },
    #[error("the restore ended in the middle of a message")]
    CutOff,
}

impl LazySocket {
    /// Binds the socket in a restore's work directory. A file left there by an earlier restore is
    /// replaced.
    ///
    /// # Errors
    /// [`LazyError::Bind`], also for a directory whose path is too long for a socket (100 bytes).
    pub fn bind(directory: &Path) -> Result<Self, LazyError> {
        let path = directory.join(SOCKET_NAME);
        let bound = match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => UnixListener::bind(&path),
        };
        match bound {
            Ok(listener) => Ok(Self { listener, path }),
            Err(source) => Err(LazyError::Bind { path, source }),
        }
    }

    /// Waits for a restore to connect. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`LazyError::Accept`].
    pub async fn accept(&self) -> Result<Session, LazyError> {
        let accepted = self.listener.accept().await;
        let failed = |source| LazyError::Accept {
            path: self.path.clone(),
            source,
        };
        let (stream, _) = accepted.map_err(failed)?;
        Ok(Session {
            stream,
            partial: Vec::new(),
            expected: None,
        })
    }
}

impl Drop for LazySocket {
    fn drop(&mut self) {
        // The directory may be gone already, with the file in it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Session {
    /// The next message; `None` when the restore has closed the connection. Before
    /// [`LazyMessage::Finished`] that means that the restore has failed. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`LazyError`] for what no restore would send.
    pub async fn next(&mut self) -> Result<Option<LazyMessage>, LazyError> {
        let vpid = match self.expected {
            Some(vpid) => vpid,
            None => match self.number().await? {
                None => return Ok(None),
                Some(FINISHED) => return Ok(Some(LazyMessage::Finished)),
                Some(number) if number == 0 || number == i32::MIN => {
                    return Err(LazyError::NoProcess { number });
                }
                Some(number) if number < 0 => {
                    return Ok(Some(LazyMessage::Dead { vpid: -number }));
                }
                Some(vpid) => vpid,
            },
        };
        self.expected = Some(vpid);
        let (length, fd) = self.receive(1).await?;
        self.expected = None;
        match fd {
            Some(fd) => Ok(Some(LazyMessage::Uffd { vpid, fd })),
            None if length.is_empty() => Err(LazyError::CutOff),
            None => Err(LazyError::NoDescriptor { vpid }),
        }
    }

    /// A number in the machine's byte order.
    async fn number(&mut self) -> Result<Option<i32>, LazyError> {
        loop {
            if let Ok(bytes) = <[u8; 4]>::try_from(self.partial.as_slice()) {
                self.partial.clear();
                return Ok(Some(i32::from_ne_bytes(bytes)));
            }
            let (bytes, _) = self.receive(4 - self.partial.len()).await?;
            match (bytes.is_empty(), self.partial.is_empty()) {
                (true, true) => return Ok(None),
                (true, false) => return Err(LazyError::CutOff),
                (false, _) => self.partial.extend_from_slice(&bytes),
            }
        }
    }

    async fn receive(&self, length: usize) -> Result<(Vec<u8>, Option<OwnedFd>), LazyError> {
        let received = self
            .stream
            .async_io(Interest::READABLE, || {
                let mut buffer = vec![0; length];
                let received = sys::receive(self.stream.as_fd(), &mut buffer, MsgFlags::empty())?;
                buffer.truncate(received.length);
                // More than one is not what was agreed on: the others are closed here.
                Ok((buffer, received.descriptors.into_iter().next()))
            })
            .await;
        match received {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok((Vec::new(), None)),
            other => other.map_err(LazyError::Receive),
        }
    }
}

/// CRIU's name for it, fixed.
const SOCKET_NAME: &str = "lazy-pages.socket";

/// "RSTF", sent by the restore when all tasks are ready.
const FINISHED: i32 = 0x5253_5446;

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::{IoSlice, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream as Blocking;

    async fn session() -> (tempfile::TempDir, Blocking, Session) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let socket = LazySocket::bind(directory.path()).expect("bindable");
        let criu = Blocking::connect(directory.path().join(SOCKET_NAME)).expect("bound");
        let session = socket.accept().await.expect("connected");
        (directory, criu, session)
    }

    fn send_descriptor(criu: &Blocking, fd: &impl AsRawFd) {
        let numbers = [fd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        let byte = [IoSlice::new(&[0])];
        sendmsg::<()>(criu.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None).expect("sent");
    }

    #[tokio::test]
    async fn tasks_zombies_and_the_end_are_told_apart() {
        let (_directory, mut criu, mut session) = session().await;
        let file = tempfile::tempfile().expect("temporary file");
        criu.write_all(&7_i32.to_ne_bytes()).expect("connected");
        send_descriptor(&criu, &file);
        criu.write_all(&(-8_i32).to_ne_bytes()).expect("connected");
        criu.write_all(&FINISHED.to_ne_bytes()).expect("connected");
        drop(criu);
        let message = session.next().await.expect("valid");
        assert!(
            matches!(message, Some(LazyMessage::Uffd { vpid: 7, .. })),
            "{message:?}"
        );
        let message = session.next().await.expect("valid");
        assert!(
            matches!(message, Some(LazyMessage::Dead { vpid: 8 })),
            "{message:?}"
        );
        let message = session.next().await.expect("valid");
        assert!(
            matches!(message, Some(LazyMessage::Finished)),
            "{message:?}"
        );
        assert!(session.next().await.expect("valid").is_none());
    }

    #[tokio::test]
    async fn what_no_restore_would_send_is_an_error() {
        let (_directory, mut criu, mut session) = session().await;
        criu.write_all(&0_i32.to_ne_bytes()).expect("connected");
        assert!(matches!(
            session.next().await,
            Err(LazyError::NoProcess { number: 0 })
        ));
        criu.write_all(&7_i32.to_ne_bytes()).expect("connected");
        criu.write_all(&[0]).expect("connected");
        assert!(matches!(
            session.next().await,
            Err(LazyError::NoDescriptor { vpid: 7 })
        ));
        criu.write_all(&[1, 2]).expect("connected");
        drop(criu);
        assert!(matches!(session.next().await, Err(LazyError::CutOff)));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_the_file_goes_with_its_owner() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join(SOCKET_NAME);
        std::fs::write(&path, "stale").expect("writable");
        let socket = LazySocket::bind(directory.path()).expect("bindable");
        assert!(path.exists());
        drop(socket);
        assert!(!path.exists());
    }
}
