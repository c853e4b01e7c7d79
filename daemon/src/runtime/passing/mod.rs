//! States of a workload that pass by themselves, and in which a dump would fail or lose something:
//! a connection that nobody has accepted yet, a handshake, a descriptor on its way, an unread
//! netlink message, a `vfork`, a task in uninterruptible sleep.
//!
//! A busy server is in one of them at any moment, so none is a reason not to move it, but one
//! to look again a moment later. Of a running workload a look is a picture of that moment; of a
//! frozen one whose ports are closed it is exact.
//!
//! What is asked is what CRIU would stumble over ([`tcp`], [`unix`], [`netlink`], [`tasks`]), and
//! two things that it does not notice and that would end a connection: a handshake whose socket has
//! no descriptor yet, and a closed connection that still owes its peer bytes. One dump of sockets
//! by `sock_diag` for each family; descriptors are looked through only for sockets in such a state.
//!
//! Absent: sockets in another network namespace than the root's; control messages that a socket
//! asks for (`SO_PASSCRED`), which only CRIU sees, and says in its log.

pub(super) mod descriptors;
pub(super) mod diag;
mod netlink;
mod tasks;
mod tcp;
#[cfg(test)]
mod tests;
mod unix;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use pageferry_sys::namespace::{NamespaceKind, run_inside};

use diag::Diag;
pub use tasks::{Sleepers, uninterruptible, vfork};

/// What kind of state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The kernel has made a connection that the workload has not accepted yet.
    Unaccepted,
    /// A client has asked for a connection, and has not answered the answer yet.
    Handshake,
    /// A connection was closed by the workload, and its peer has not acknowledged the last bytes.
    Closing,
    /// A unix socket holds messages with descriptors that nobody has received yet.
    Descriptors,
    /// A netlink socket holds messages.
    Unread,
    /// A thread waits for the child it made by `vfork`, and cannot be interrupted.
    Vfork,
    /// A task sleeps in the kernel and cannot be interrupted, not even by a freeze.
    Uninterruptible,
    /// Somebody is in a container who is not of its tree.
    Stranger,
}

/// A state that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passing {
    /// Its kind.
    pub state: State,
    /// The process, and a word of what it has: a port, a descriptor, a thread.
    pub holder: String,
}

/// Looks for passing states of one workload.
#[derive(Debug)]
pub struct Observer {
    diag: Diag,
    own_network: bool,
}

impl State {
    /// Whether the workload ends it by running, though nothing reaches it from outside.
    pub const fn passes_alone(self) -> bool {
        match self {
            Self::Unaccepted | Self::Descriptors | Self::Unread | Self::Vfork => true,
            Self::Handshake | Self::Closing | Self::Uninterruptible | Self::Stranger => false,
        }
    }

    /// What it is, after the name of the process.
    const fn words(self) -> &'static str {
        match self {
            Self::Unaccepted => "has connections that wait to be accepted",
            Self::Handshake => "is in the middle of a client's handshake",
            Self::Closing => "has closed a connection that still owes its peer bytes",
            Self::Descriptors => "has not received descriptors that were sent to it",
            Self::Unread => "has not read the messages of its netlink socket",
            Self::Vfork => "waits for a child that it made by vfork",
            Self::Uninterruptible => "sleeps in the kernel and cannot be interrupted",
            Self::Stranger => "was started in the container from outside (runc exec)",
        }
    }

    /// What a person may do about one that does not pass.
    const fn advice(self) -> &'static str {
        match self {
            Self::Unaccepted => "move it when it accepts, or while fewer clients connect",
            Self::Handshake => "move it while fewer clients connect",
            Self::Closing => "move it while fewer connections are being closed",
            Self::Descriptors => "move it when the receiver has received them",
            Self::Unread => "move it when it has read them",
            Self::Vfork => "move it when the child has started its program, or has ended",
            Self::Uninterruptible => "move it when the storage or device it waits for answers",
            Self::Stranger => "move the container when that has ended",
        }
    }
}

impl fmt::Display for Passing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { state, holder } = self;
        write!(f, "{holder} {}: {}", state.words(), state.advice())
    }
}

impl Observer {
    /// An observer of a workload whose own network namespace is `net`, or which has none of its
    /// own.
    pub fn open(net: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let diag = match net {
            Some(net) => run_inside(&[(NamespaceKind::Net, net)], Diag::open)??,
            None => Diag::open()?,
        };
        Ok(Self {
            diag,
            own_network: net.is_some(),
        })
    }

    /// The passing states of sockets of the processes `pids`, which are all that the workload has.
    /// Blocks, for a fraction of a millisecond.
    pub fn look(&mut self, pids: &[i32]) -> io::Result<Vec<Passing>> {
        let mut found = tcp::look(&mut self.diag, pids, self.own_network)?;
        found.extend(unix::look(&mut self.diag, pids)?);
        found.extend(netlink::look(&mut self.diag, pids)?);
        Ok(found)
    }
}

/// `process 12 (nginx)`.
pub(super) fn name_of(pid: i32) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}
