//! Datagrams that wait in a UDP socket of a process that stands still, read without taking them
//! out.
//!
//! The socket is the process's own, by a duplicate of its descriptor. Two options of it are
//! changed for the time of a call, and put back: where a peek begins (`SO_PEEK_OFF`), and whether
//! it is told to which address a datagram came. Absent: datagrams that the kernel has joined
//! (`UDP_GRO`), which cannot be told apart.

#![allow(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, getsockopt, recvmsg, setsockopt, sockopt,
};

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Who has sent it.
    pub from: SocketAddr,
    /// To which address.
    pub to: IpAddr,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// Those that wait in a socket, from the first on, as many as have so many bytes together. The
/// socket must be one of UDP, and nobody may read from it meanwhile.
pub fn peek(socket: impl AsFd, bytes_max: usize) -> io::Result<Vec<Datagram>> {
    if number(&socket, libc::SOL_UDP, UDP_GRO)? != 0 {
        return Ok(Vec::new());
    }
    let is_six = number(&socket, libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6;
    let changed = Changed::of(&socket, is_six)?;
    let peeked = peek_all(&socket, bytes_max);
    changed.put_back()?;
    peeked
}

fn peek_all(socket: &impl AsFd, bytes_max: usize) -> io::Result<Vec<Datagram>> {
    let (mut all, mut bytes) = (Vec::new(), 0);
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut control = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
    while bytes < bytes_max {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let raw = socket.as_fd().as_raw_fd();
        let message = match recvmsg::<SockaddrStorage>(raw, &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(error) => return Err(error.into()),
        };
        let length = message.bytes;
        let from = message.address.as_ref().and_then(address_of);
        let to = message.cmsgs()?.find_map(|told| destination(&told));
        let (Some(from), Some(to)) = (from, to) else {
            return Err(io::Error::other("a datagram without its addresses"));
        };
        bytes += length;
        let bytes = buffer[..length].to_vec();
        all.push(Datagram { from, to, bytes });
        // The kernel shows an empty one once, and then for ever what is behind it.
        if DATAGRAMS_MAX <= all.len() {
            break;
        }
    }
    Ok(all)
}

/// The options of a socket as they were.
struct Changed<'a, S: AsFd> {
    socket: &'a S,
    is_six: bool,
    offset: i32,
    tells: [bool; 2],
}

impl<'a, S: AsFd> Changed<'a, S> {
    fn of(socket: &'a S, is_six: bool) -> io::Result<Self> {
        let offset = number(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let six = is_six.then(|| getsockopt(socket, sockopt::Ipv6RecvPacketInfo));
        let tells = [
            getsockopt(socket, sockopt::Ipv4PacketInfo)?,
            six.transpose()?.unwrap_or_default(),
        ];
        let changed = Self {
            socket,
            is_six,
            offset,
            tells,
        };
        match changed.tell([true; 2]).and_then(|()| begin_at(socket, 0)) {
            Ok(()) => Ok(changed),
            Err(error) => {
                changed.put_back()?;
                Err(error)
            }
        }
    }

    fn tell(&self, [four, six]: [bool; 2]) -> io::Result<()> {
        setsockopt(self.socket, sockopt::Ipv4PacketInfo, &four)?;
        if self.is_six {
            setsockopt(self.socket, sockopt::Ipv6RecvPacketInfo, &six)?;
        }
        Ok(())
    }

    fn put_back(&self) -> io::Result<()> {
        let told = self.tell(self.tells);
        begin_at(self.socket, self.offset).and(told)
    }
}

fn address_of(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(four) = address.as_sockaddr_in() {
        return Some((four.ip(), four.port()).into());
    }
    let six = address.as_sockaddr_in6()?;
    Some((six.ip().to_canonical(), six.port()).into())
}

fn destination(told: &ControlMessageOwned) -> Option<IpAddr> {
    match told {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            let octets = info.ipi_addr.s_addr.to_ne_bytes();
            Some(Ipv4Addr::from(octets).into())
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            let six = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
            Some(six.to_canonical())
        }
        _ => None,
    }
}

fn begin_at(socket: &impl AsFd, offset: i32) -> io::Result<()> {
    // SAFETY: the pointer is to a live int and the length is its size; the kernel reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

fn number(socket: &impl AsFd, level: libc::c_int, name: libc::c_int) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: both pointers are to live values, and the length is that of the int, which the kernel
    // writes at most.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(value),
    }
}

const UDP_GRO: libc::c_int = 104;
const DATAGRAM_BYTES_MAX: usize = 1 << 16;
/// More of one socket are not looked at.
const DATAGRAMS_MAX: usize = 8192;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn waiting(to: &UdpSocket, from: &UdpSocket, texts: &[&[u8]]) {
        let target = to.local_addr().expect("an address");
        for text in texts {
            from.send_to(text, target).expect("room");
        }
    }

    #[test]
    fn what_waits_is_seen_with_its_addresses_and_stays() {
        for address in ["127.0.0.1", "::1"] {
            let made = || UdpSocket::bind((address, 0)).expect("a socket");
            let (to, from) = (made(), made());
            waiting(&to, &from, &[b"one", b"", b"three"]);
            let seen = peek(&to, 1 << 20).expect("it is one of UDP");
            let sender = from.local_addr().expect("an address");
            assert!(seen.iter().all(|one| one.from == sender), "{seen:?}");
            let own: IpAddr = address.parse().expect("an address");
            assert!(seen.iter().all(|one| one.to == own), "{seen:?}");
            let texts: Vec<&[u8]> = seen.iter().map(|one| &*one.bytes).collect();
            assert_eq!(texts, [&b"one"[..], b"", b"three"]);
            let mut buffer = [0; 8];
            to.set_nonblocking(true).expect("a socket");
            for length in [3, 0, 5] {
                assert_eq!(to.peek(&mut buffer).expect("it waits"), length);
                assert_eq!(to.recv(&mut buffer).expect("it waits"), length);
            }
            assert_eq!(peek(&to, 1 << 20).expect("nothing waits"), []);
            assert_eq!(
                number(&to, libc::SOL_SOCKET, libc::SO_PEEK_OFF).ok(),
                Some(-1)
            );
        }
    }

    #[test]
    fn no_more_is_looked_at_than_is_asked_for_and_nothing_but_udp() {
        let made = || UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let (to, from) = (made(), made());
        waiting(&to, &from, &[b"one", b"two", b"three"]);
        assert_eq!(peek(&to, 4).expect("it is one of UDP").len(), 2);
        let file = std::fs::File::open("/proc/self/exe").expect("a file");
        assert!(peek(&file, 4).is_err());
    }
}
