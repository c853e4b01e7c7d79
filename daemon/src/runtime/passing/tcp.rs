//! TCP: connections that wait to be accepted, handshakes, and what closed sockets still owe.
//!
//! CRIU refuses a listener whose queue is not empty. It does not see the other two, since no
//! descriptor leads to them; the restored kernel would not know them and answer with a reset. Whose
//! they are tells the port: others may have sockets in the same namespace.

use std::collections::HashSet;
use std::io;

use super::diag::{Diag, INET_SOCKETS, inet_request, number};
use super::{Passing, State, descriptors, name_of};

/// One socket of a dump.
#[derive(Clone, Copy, Debug)]
struct Socket {
    state: u8,
    /// Timeouts in a row without an answer of the peer.
    retransmits: u8,
    port: u16,
    peer_port: u16,
    receive_queue: u32,
    send_queue: u32,
    inode: u32,
}

/// Without a network of its own a workload has listeners, and nothing else that could be told from
/// what others have.
pub(super) fn look(diag: &mut Diag, pids: &[i32], own_network: bool) -> io::Result<Vec<Passing>> {
    let states = if own_network { STATES } else { 1 << LISTEN };
    let mut sockets = Vec::new();
    diag.dump(INET_SOCKETS, &inet_request(states), |record| {
        sockets.extend(parse(record));
    })?;
    let listeners = || sockets.iter().filter(|socket| socket.state == LISTEN);
    let passing: Vec<(State, Socket)> = sockets
        .iter()
        .filter_map(|socket| Some((socket.passing()?, *socket)))
        .collect();
    let mut wanted = HashSet::new();
    for (_, socket) in &passing {
        let same_port = listeners().filter(|listener| listener.port == socket.port);
        wanted.extend(same_port.map(|listener| listener.inode));
    }
    let owners = descriptors::owners(pids, &wanted);
    let found = passing.into_iter().filter_map(|(state, socket)| {
        let mut same_port = listeners().filter(|listener| listener.port == socket.port);
        let owner = same_port.find_map(|listener| owners.get(&listener.inode));
        // Where others listen and the workload does not, it came to them. Where nobody listens
        // nobody can tell.
        if owner.is_none() && listeners().any(|listener| listener.port == socket.port) {
            return None;
        }
        let place = match state {
            State::Unaccepted => {
                owners.get(&socket.inode)?;
                format!("port {}", socket.port)
            }
            _ => format!("port {}, client port {}", socket.port, socket.peer_port),
        };
        let process = owner.map_or("the workload".to_owned(), |owner| name_of(owner.pid));
        Some(Passing {
            state,
            holder: format!("{process} at TCP {place}"),
        })
    });
    Ok(found.collect())
}

impl Socket {
    /// A peer that has let several time-outs pass is gone: nobody waits for it. One of them it may
    /// have let pass because the answer met a port that was closed for a moment.
    fn passing(&self) -> Option<State> {
        let lively = self.retransmits < RETRANSMITS_GONE;
        match self.state {
            LISTEN if 0 < self.receive_queue => Some(State::Unaccepted),
            SYN_RECEIVED if lively => Some(State::Handshake),
            FIN_WAIT_1 | CLOSING | LAST_ACK if lively && self.inode == 0 && 0 < self.send_queue => {
                Some(State::Closing)
            }
            _ => None,
        }
    }
}

/// `struct inet_diag_msg`.
fn parse(record: &[u8]) -> Option<Socket> {
    let port = |at: usize| {
        let bytes = record.get(at..at + 2)?;
        Some(u16::from_be_bytes(bytes.try_into().ok()?))
    };
    Some(Socket {
        state: *record.get(1)?,
        retransmits: *record.get(3)?,
        port: port(4)?,
        peer_port: port(6)?,
        receive_queue: number(record, 56)?,
        send_queue: number(record, 60)?,
        inode: number(record, 68)?,
    })
}

/// 0.6 s for bytes on a local network, 3 s for a handshake.
const RETRANSMITS_GONE: u8 = 2;

const SYN_RECEIVED: u8 = 3;
const FIN_WAIT_1: u8 = 4;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;

const STATES: u32 =
    1 << LISTEN | 1 << SYN_RECEIVED | 1 << FIN_WAIT_1 | 1 << LAST_ACK | 1 << CLOSING;
