//! Connections over loopback between the workload and somebody who does not move.
//!
//! A connection between two processes of one network namespace has both its ends in the tables of
//! that namespace. When one end moves and the other does not, each is left without the other, and
//! the kernels reset what is left. So both ends must be held by the tree. A connection that waits
//! to be accepted is held by its listener.
//!
//! Who else is in the namespace stays behind in it, without links. Only connections are looked
//! at: datagrams may be lost anyway, and unix sockets with an end outside CRIU refuses.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pageferry_proto::wire::code::{ErrorCode, Failure};

/// Refuses a connection of which one end is held by the tree of `pids` and the other by a process
/// outside of it. `holds` tells the inodes of sockets that the tree is known to hold; one that it
/// does not know is looked for. To be asked of a tree that has a network namespace of its own.
///
/// Blocks: 2 ms, since the kernel looks for the sockets of one namespace among all.
pub fn check(root: i32, pids: &[i32], holds: impl Fn(u64) -> bool) -> Result<(), Failure> {
    let unreadable = |error: io::Error| {
        Failure::new(
            ErrorCode::NetworkUnfit,
            format!("the connections of process {root} cannot be read: {error}"),
        )
    };
    let mut tables = Tables::default();
    for table in ["tcp", "tcp6"] {
        match fs::read_to_string(format!("/proc/{root}/net/{table}")) {
            Ok(text) => tables.add(&text),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table == "tcp6" => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
    for pair in tables.pairs(holds) {
        // The tree may have made it since it was asked what it holds.
        if holder(pids.iter().copied(), pair.other).is_some() {
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
    /// Adds the lines of `/proc/PID/net/tcp` or `tcp6`.
    fn add(&mut self, text: &str) {
        for (local, remote, state, inode) in text.lines().skip(1).filter_map(parse_line) {
            match state {
                LISTEN => self.listeners.push((local, inode)),
                TIME_WAIT | CLOSE => {}
                _ => {
                    let socket = Socket { state, inode };
                    self.connections.insert((local, remote), socket);
                }
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

/// Own address, address of the peer, state, inode.
fn parse_line(line: &str) -> Option<(SocketAddr, SocketAddr, u8, u64)> {
    let mut words = line.split_ascii_whitespace();
    let local = parse_address(words.nth(1)?)?;
    let remote = parse_address(words.next()?)?;
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    Some((local, remote, state, words.nth(5)?.parse().ok()?))
}

/// An address is printed as words of 32 bits, each as a number of this machine. One that maps an
/// IPv4 address is that address.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |index: usize| {
        let digits = address.get(8 * index..8 * index + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.as_flattened().try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
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

#[cfg(test)]
mod tests;
