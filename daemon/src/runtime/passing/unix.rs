//! Unix sockets: descriptors in flight, and connections that wait to be accepted.
//!
//! CRIU carries a waiting connection of the tree if its client has sent nothing yet and still has
//! it. Descriptors in flight it dumps, but cannot restore unless somebody else has them open.

use std::collections::{HashMap, HashSet};
use std::io;

use super::diag::{BY_FAMILY, Diag, attribute, number};
use super::{Passing, State, descriptors, name_of};

#[derive(Clone, Debug)]
struct Socket {
    listens: bool,
    inode: u32,
    receive_queue: u32,
    send_queue: u32,
    /// Inodes of the clients that wait; 0 for one that has closed its end.
    waiting: Vec<u32>,
}

pub(super) fn look(diag: &mut Diag, pids: &[i32]) -> io::Result<Vec<Passing>> {
    let mut sockets = HashMap::new();
    diag.dump(BY_FAMILY, &request(), |record| {
        sockets.extend(parse(record).map(|socket| (socket.inode, socket)));
    })?;
    let queued: Vec<&Socket> = sockets
        .values()
        .filter(|socket| 0 < socket.receive_queue)
        .collect();
    let wanted: HashSet<u32> = queued
        .iter()
        .flat_map(|socket| socket.waiting.iter().copied().chain([socket.inode]))
        .filter(|inode| *inode != 0)
        .collect();
    let owners = descriptors::owners(pids, &wanted);
    let found = queued.into_iter().filter_map(|socket| {
        let owner = owners.get(&socket.inode)?;
        let carried = |client: &u32| {
            let silent = sockets.get(client).is_some_and(|c| c.send_queue == 0);
            silent && owners.contains_key(client)
        };
        let state = if socket.listens && !socket.waiting.iter().all(carried) {
            State::Unaccepted
        } else if 0 < owner.in_flight() {
            State::Descriptors
        } else {
            return None;
        };
        let holder = format!("{} at its unix socket {}", name_of(owner.pid), owner.number);
        Some(Passing { state, holder })
    });
    Ok(found.collect())
}

/// `struct unix_diag_req`.
fn request() -> [u8; 24] {
    let mut request = [0; 24];
    request[0] = u8::try_from(libc::AF_UNIX).unwrap_or_default();
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[12..16].copy_from_slice(&SHOW.to_ne_bytes());
    request
}

/// `struct unix_diag_msg` with its attributes.
fn parse(record: &[u8]) -> Option<Socket> {
    let queues = attribute(record, RECORD_BYTES, QUEUES)?;
    let waiting = attribute(record, RECORD_BYTES, WAITING).unwrap_or_default();
    Some(Socket {
        listens: *record.get(2)? == LISTEN,
        inode: number(record, 4)?,
        receive_queue: number(queues, 0)?,
        send_queue: number(queues, 4)?,
        waiting: (0..waiting.len() / 4)
            .filter_map(|index| number(waiting, index * 4))
            .collect(),
    })
}

const RECORD_BYTES: usize = 16;
const LISTEN: u8 = 10;
/// `UNIX_DIAG_ICONS`.
const WAITING: u16 = 3;
/// `UNIX_DIAG_RQLEN`.
const QUEUES: u16 = 4;
/// `UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN`.
const SHOW: u32 = 0x8 | 0x10;
