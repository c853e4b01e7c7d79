//! Forgetting what a node's firewall remembers of a workload's connections.
//!
//! A firewall that follows connections knows how far each of them was when the workload left this
//! node. When it comes back they are further, and their packets would be invalid, and dropped. What
//! is forgotten is followed anew from its next packet on. What the node translates is not
//! forgotten: it could not be followed anew.
//!
//! `ctnetlink` has no request for all of an address that older kernels know: so all is listed, and
//! deleted one by one.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// The kernel answers within the call.
const ANSWER_SECONDS: i64 = 5;
const ANSWER_BYTES: usize = 64 << 10; // 64 KiB

/// A message's head: its length, kind, flags, a sequence and a port; then family and version.
const HEADER: usize = 16;
const FAMILY: usize = 4;

/// Of `NFNL_SUBSYS_CTNETLINK`: `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;

/// `NLM_F_REQUEST` with `NLM_F_DUMP`, or with `NLM_F_ACK`.
const LIST: u16 = 0x301;
const ACKNOWLEDGE: u16 = 0x5;

/// `NLMSG_ERROR` and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Attributes of a connection: its addresses in either direction, its number, its zone.
const TUPLES: [u16; 2] = [1, 2];
const NAMES: [u16; 3] = [1, 12, 18];
/// In a tuple: its addresses, four kinds of them.
const ADDRESSES: u16 = 1;
/// Its status, and of that `IPS_SRC_NAT` and `IPS_DST_NAT`.
const STATUS: u16 = 3;
const TRANSLATED: u32 = 0x30;

/// Forgets connections of these addresses in the network namespace of the calling thread; how many
/// there were. A kernel that follows none has none.
pub fn forget(addresses: &[IpAddr]) -> io::Result<usize> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let limit = TimeVal::new(ANSWER_SECONDS, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
    let mut forgotten = 0;
    for (family, is_of) in [(libc::AF_INET, true), (libc::AF_INET6, false)] {
        let bytes = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let own = addresses.iter().filter(|ip| ip.is_ipv4() == is_of);
        let own: Vec<Vec<u8>> = own.map(bytes).collect();
        if own.is_empty() {
            continue;
        }
        let mut known = Vec::new();
        ask(&socket, (GET, LIST), family, &[])?;
        answers(&socket, |message| known.extend(named(message, &own)))?;
        for name in known {
            ask(&socket, (DELETE, ACKNOWLEDGE), family, &name)?;
            match answers(&socket, |_| ()) {
                // It has ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(()) => forgotten += 1,
            }
        }
    }
    Ok(forgotten)
}

fn ask(socket: &OwnedFd, (kind, flags): (u16, u16), family: i32, rest: &[u8]) -> io::Result<()> {
    let length = HEADER + FAMILY + rest.len();
    let mut message = Vec::with_capacity(length);
    message.extend(
        u32::try_from(length)
            .map_err(io::Error::other)?
            .to_ne_bytes(),
    );
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([u8::try_from(family).map_err(io::Error::other)?, 0, 0, 0]);
    message.extend(rest);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    Ok(())
}

/// Gives each message of the answer to `each`, up to its end.
fn answers(socket: &OwnedFd, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, message)) = cut(&mut rest) {
            match kind {
                DONE => return Ok(()),
                ERROR => {
                    let number = message
                        .first_chunk()
                        .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                    return match -number {
                        0 => Ok(()),
                        number => Err(io::Error::from_raw_os_error(number)),
                    };
                }
                _ => each(message.get(FAMILY..).unwrap_or_default()),
            }
        }
    }
}

/// Cuts the first message off, behind its head.
fn cut<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
    let message = rest.get(HEADER..length)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, message))
}

/// What names a connection, if it is one of these addresses, and not translated.
fn named(message: &[u8], own: &[Vec<u8>]) -> Option<Vec<u8>> {
    let attributes: Vec<_> = Attributes(message).collect();
    let mut status = attributes.iter().filter(|(kind, ..)| *kind == STATUS);
    let status = status.next().and_then(|(_, bytes, _)| bytes.first_chunk());
    if status.is_some_and(|bytes| u32::from_be_bytes(*bytes) & TRANSLATED != 0) {
        return None;
    }
    let mut addresses = attributes
        .iter()
        .filter(|(kind, ..)| TUPLES.contains(kind))
        .flat_map(|(_, tuple, _)| Attributes(tuple).filter(|(kind, ..)| *kind == ADDRESSES))
        .flat_map(|(_, addresses, _)| Attributes(addresses));
    addresses
        .any(|(_, bytes, _)| own.iter().any(|own| own == bytes))
        .then(|| {
            let names = attributes.iter().filter(|(kind, ..)| NAMES.contains(kind));
            names
                .flat_map(|(_, _, whole)| whole.iter().copied())
                .collect()
        })
}

/// Attributes one behind the other: the kind of each, what is in it, and all of it.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        let kind = u16::from_ne_bytes(*self.0.get(2..)?.first_chunk()?);
        let inside = self.0.get(4..length)?;
        // With what fills it up, which a copy of it needs, too.
        let end = length.next_multiple_of(4).min(self.0.len());
        let (whole, rest) = self.0.split_at(end);
        self.0 = rest;
        // The two highest bits say how it is written.
        Some((kind & 0x3fff, inside, whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, inside: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + inside.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(inside);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_connection_is_named_if_it_is_of_the_address() {
        let nested = 0x8000;
        let tuple = |kind: u16, ips: [[u8; 4]; 2]| {
            let ips = [attribute(1, &ips[0]), attribute(2, &ips[1])].concat();
            attribute(kind | nested, &attribute(ADDRESSES | nested, &ips))
        };
        let (own, peer, node) = ([10, 88, 0, 2], [10, 90, 0, 1], [10, 90, 0, 11]);
        let orig = tuple(1, [peer, own]);
        let reply = tuple(2, [own, peer]);
        // Seen in both directions, and sure to last.
        let status = attribute(STATUS, &[0, 0, 0, 0xe]);
        let id = attribute(12, &[0, 0, 0, 7]);
        let message = [&*orig, &reply, &status, &id].concat();
        let name = named(&message, &[own.to_vec()]).unwrap();
        assert_eq!(name, [&*orig, &id].concat());
        // A published port: the address is only in what comes back.
        let forwarded = tuple(1, [peer, node]);
        let status = attribute(STATUS, &[0, 0, 0, 0x2e]);
        let translated = [&*forwarded, &reply, &status, &id].concat();
        assert_eq!(named(&translated, &[own.to_vec()]), None);
        assert_eq!(named(&message, &[vec![10, 88, 0, 3]]), None);
        assert_eq!(named(&message[..7], &[own.to_vec()]), None);
    }

    #[test]
    fn nothing_is_known_of_an_address_that_nobody_has() {
        // For root alone; others have no answer either.
        if let Ok(forgotten) =
            forget(&["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()])
        {
            assert_eq!(forgotten, 0);
        }
    }
}
