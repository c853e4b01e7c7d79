//! Connections over loopback between the workload and somebody who does not move.
//!
//! A connection between two processes of one network namespace has both its ends in the tables of
//! that namespace. When one end moves and the other does not, each is left without the other, and
//! the kernels reset what is left. So both ends must be held by the tree. A connection that waits
//! to be accepted is held by its listener.
//!
//! One that has both its ends in the tree moves if what passes loopback can be held back meanwhile,
//! and is refused if not.
//!
//! Who else is in the namespace stays behind in it, without links. Only connections are looked
//! at: datagrams may be lost anyway, and unix sockets with an end outside CRIU refuses.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind, run_inside};

use super::passing::diag::{Diag, INET_SOCKETS, inet_request, number};

/// Tells the connections of one network namespace.
#[derive(Clone, Debug)]
pub struct Connections {
    diag: Arc<Mutex<Diag>>,
    /// Why what passes its loopback cannot be held back, if so.
    ungated: Option<Arc<str>>,
}

impl Connections {
    /// Those of the namespace that process `root` is in.
    pub fn of(root: i32) -> Result<Self, Failure> {
        let open = || {
            let net = namespace::open(root, NamespaceKind::Net)?;
            run_inside(&[(NamespaceKind::Net, net.as_fd())], Diag::open)?
        };
        let diag = open().map_err(|error| unreadable(root, &error))?;
        Ok(Self {
            diag: Arc::new(Mutex::new(diag)),
            ungated: None,
        })
    }

    /// What passes loopback cannot be held back in a freeze, for that reason: from here on a
    /// connection between two sockets of the tree is refused, too.
    pub fn ungated(&mut self, why: &str) {
        self.ungated = Some(why.into());
    }

    fn tables(&self) -> io::Result<Tables> {
        let mut tables = Tables::default();
        let mut diag = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        diag.dump(INET_SOCKETS, &inet_request(STATES), |record| {
            if let Some(connection) = parse(record) {
                tables.add(connection);
            }
        })?;
        Ok(tables)
    }
}

/// Refuses a connection of which one end is held by the tree of `pids` and the other by a process
/// outside of it; and one within it, where its loopback cannot be shut. `holds` tells the inodes of
/// sockets that the tree is known to hold; one that it does not know is looked for. To be asked of
/// a tree that has a network namespace of its own.
///
/// Blocks: 0.2 ms, since the kernel looks for the sockets of one namespace among all. (The tables
/// in `/proc/PID/net` take ten times as long.)
pub fn check(
    connections: &Connections,
    root: i32,
    pids: &[i32],
    holds: impl Fn(u64) -> bool,
) -> Result<(), Failure> {
    let unreadable = |error: io::Error| unreadable(root, &error);
    let tables = connections.tables().map_err(unreadable)?;
    let within = |here, there| match &connections.ungated {
        Some(why) => Err(not_held_back(here, there, why)),
        None => Ok(()),
    };
    if let Some((here, there)) = tables.within(&holds) {
        within(here, there)?;
    }
    for pair in tables.pairs(&holds) {
        // The tree may have made it since it was asked what it holds.
        if holder(pids.iter().copied(), pair.other).is_some() {
            within(pair.here, pair.there)?;
            continue;
        }
        let elsewhere = processes().map_err(unreadable)?;
        let elsewhere = elsewhere.into_iter().filter(|pid| !pids.contains(pid));
        // Held by nobody: it is being closed.
        let Some(peer) = holder(elsewhere, pair.other) else {
            continue;
        };
        let own = holder(pids.iter().copied(), pair.ours).unwrap_or(root);
        let name = fs::read_to_string(format!("/proc/{peer}/comm")).unwrap_or_default();
        return Err(Failure::new(
            ErrorCode::LoopbackPeer,
            format!(
                "process {own} has a connection over loopback, {} to {}, with process {peer} ({}), \
                 which does not move: end it, or let both be in one tree",
                pair.here,
                pair.there,
                name.trim_end()
            ),
        ));
    }
    Ok(())
}

/// Of a connection within the tree, in a network whose loopback cannot be shut.
pub fn not_held_back(here: SocketAddr, there: SocketAddr, why: &str) -> Failure {
    Failure::new(
        ErrorCode::NodeUnfit,
        format!(
            "processes of the workload have a connection over loopback, {here} to {there}, and \
             what they say to each other cannot be held back while it is moved: {why}"
        ),
    )
}

fn unreadable(root: i32, error: &io::Error) -> Failure {
    Failure::new(
        ErrorCode::NetworkUnfit,
        format!("the connections of process {root} cannot be read: {error}"),
    )
}

/// Own address, address of the peer, state, inode.
type Connection = (SocketAddr, SocketAddr, u8, u64);

/// The connections of one network namespace.
#[derive(Debug, Default)]
struct Tables {
    /// By their own address and that of their peer.
    connections: HashMap<(SocketAddr, SocketAddr), Socket>,
    /// Who waits for connections, and where.
    listeners: Vec<(SocketAddr, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    state: u8,
    /// 0 while nobody has accepted it, and when nobody has it any more.
    inode: u64,
}

/// A connection with one end in the tree and one that may be outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    here: SocketAddr,
    there: SocketAddr,
    /// The socket, or its listener, that the tree holds.
    ours: u64,
    /// That at the other end.
    other: u64,
}

impl Tables {
    fn add(&mut self, (local, remote, state, inode): Connection) {
        match state {
            LISTEN => self.listeners.push((local, inode)),
            TIME_WAIT | CLOSE => {}
            _ => {
                let socket = Socket { state, inode };
                self.connections.insert((local, remote), socket);
            }
        }
    }

    /// Connections within the namespace that have one end in the tree and one not known to be.
    fn pairs(&self, holds: impl Fn(u64) -> bool) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for ((here, there), socket) in &self.connections {
            let Some(peer) = self.connections.get(&(*there, *here)) else {
                continue;
            };
            let ours = self.owners(*here, *socket);
            let others = self.owners(*there, *peer);
            let Some(&ours) = ours.iter().find(|inode| holds(**inode)) else {
                continue;
            };
            let other = others.iter().find(|inode| !holds(**inode));
            pairs.extend(other.map(|other| Pair {
                here: *here,
                there: *there,
                ours,
                other: *other,
            }));
        }
        pairs.sort_unstable_by_key(|pair| (pair.here, pair.there));
        pairs
    }

    /// A connection within the namespace that has both its ends in the tree; of several always the
    /// same.
    fn within(&self, holds: impl Fn(u64) -> bool) -> Option<(SocketAddr, SocketAddr)> {
        let is_held = |at: SocketAddr, socket: Socket| {
            let mut owners = self.owners(at, socket).into_iter();
            owners.any(&holds)
        };
        let within = self.connections.iter().filter(|((here, there), socket)| {
            let peer = self.connections.get(&(*there, *here));
            peer.is_some_and(|peer| is_held(*here, **socket) && is_held(*there, *peer))
        });
        within.map(|(ends, _)| *ends).min()
    }

    /// The socket itself, or those one of which will accept it; none if nobody has it any more.
    fn owners(&self, at: SocketAddr, socket: Socket) -> Vec<u64> {
        if socket.inode != 0 {
            return vec![socket.inode];
        }
        if !matches!(socket.state, ESTABLISHED | SYN_RECEIVED | CLOSE_WAIT) {
            return Vec::new();
        }
        let accepts = |listener: &&(SocketAddr, u64)| {
            let (place, _) = listener;
            place.port() == at.port() && (place.ip() == at.ip() || place.ip().is_unspecified())
        };
        let listeners = self.listeners.iter().filter(accepts);
        listeners.map(|(_, inode)| *inode).collect()
    }
}

/// `struct inet_diag_msg`: family, state, ports, addresses, inode. An IPv6 address that maps an
/// IPv4 one is that one.
fn parse(record: &[u8]) -> Option<Connection> {
    let family = i32::from(*record.first()?);
    let place = |port: usize, address: usize| {
        let port = u16::from_be_bytes(record.get(port..port + 2)?.try_into().ok()?);
        let bytes: [u8; 16] = record.get(address..address + 16)?.try_into().ok()?;
        let ip = match family {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
            libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    };
    let inode = number(record, 68)?;
    Some((
        place(4, 8)?,
        place(6, 24)?,
        *record.get(1)?,
        u64::from(inode),
    ))
}

/// The first of `pids` that has the socket open.
fn holder(mut pids: impl Iterator<Item = i32>, inode: u64) -> Option<i32> {
    let name = format!("socket:[{inode}]");
    pids.find(|pid| {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        let is_it = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
        let mut targets = entries.flatten().filter_map(is_it);
        targets.any(|target| target.as_os_str() == name.as_str())
    })
}

fn processes() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc")?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect())
}

// From include/net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const SYN_RECEIVED: u8 = 3;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;

/// All but those that nobody holds any more.
const STATES: u32 = 0xfff & !(1 << TIME_WAIT | 1 << CLOSE) & !1;

#[cfg(test)]
mod tests;
