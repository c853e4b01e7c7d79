//! Datagrams that a frozen workload has not read: CRIU drops them, with a warning in its log.
//!
//! They are looked at in the sockets themselves, and stay there: a workload that stays has them.
//!
//! Invariant: only sockets of the workload's own network that hold something are touched, and each
//! is as it was afterwards. Absent: those that the kernel has joined (`UDP_GRO`).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use pageferry_sys::namespace::{NamespaceKind, run_inside};
use pageferry_sys::ptrace::{pidfd_getfd, pidfd_open};
use pageferry_sys::unread::{Datagram, peek};

use super::passing::descriptors;
use super::passing::diag::{BY_FAMILY, Diag, number};

/// Looks for them in one network namespace.
#[derive(Debug)]
pub struct Unread(Diag);

/// What waits in one socket, from the first on.
#[derive(Debug)]
pub struct Waiting {
    /// The port it waits at.
    pub port: u16,
    /// All of it, or as much as is looked at.
    pub datagrams: Vec<Datagram>,
}

/// A socket that holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Holding {
    inode: u32,
    port: u16,
}

impl Unread {
    /// One for the network namespace `net`.
    pub fn open(net: BorrowedFd<'_>) -> io::Result<Self> {
        run_inside(&[(NamespaceKind::Net, net)], Diag::open)?.map(Self)
    }

    /// What waits in sockets of the frozen processes `pids`, at most so many bytes of each. Takes a
    /// fraction of a millisecond where nothing does.
    pub fn look(&mut self, pids: &[i32], bytes_max: usize) -> io::Result<Vec<Waiting>> {
        let mut holding = HashSet::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            self.0.dump(BY_FAMILY, &request(family), |record| {
                holding.extend(parse(record));
            })?;
        }
        let inodes = holding.iter().map(|one| one.inode).collect();
        let owners = descriptors::owners(pids, &inodes);
        let mut all = Vec::new();
        for Holding { inode, port } in holding {
            let Some(owner) = owners.get(&inode) else {
                continue;
            };
            let pidfd = pidfd_open(owner.pid)?;
            let socket = pidfd_getfd(pidfd.as_fd(), owner.number)?;
            let datagrams = peek(&socket, bytes_max)?;
            all.push(Waiting { port, datagrams });
        }
        Ok(all)
    }
}

/// `struct inet_diag_req_v2`, of UDP in any state.
fn request(family: libc::c_int) -> [u8; 56] {
    let mut request = [0; 56];
    request[0] = u8::try_from(family).unwrap_or_default();
    request[1] = 17;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request
}

/// The socket of a `struct inet_diag_msg` that holds something.
fn parse(record: &[u8]) -> Option<Holding> {
    let port = u16::from_be_bytes(record.get(4..6)?.try_into().ok()?);
    let inode = number(record, INODE).filter(|inode| *inode != 0)?;
    (0 < number(record, WAITING)?).then_some(Holding { inode, port })
}

/// `idiag_rqueue` and `idiag_inode`.
const WAITING: usize = 56;
const INODE: usize = 68;
