//! Raw link-layer sockets: for the neighbour announcements after a workload arrived, for frames
//! that waited for it, and to see what passes a bridge for it.
//!
//! Invariants: the kernel queues nothing on a socket that only sends (it has protocol 0); one that
//! sees frames sees only those for one hardware address.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A raw packet socket bound to one link of the calling thread's network namespace.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

/// Sends frames by one link as they are, whatever else is done with what leaves by it.
#[derive(Debug)]
pub struct Injector(PacketSocket);

/// Sees frames for one hardware address that pass a bridge.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    bridge: i32,
}

impl PacketSocket {
    /// Opens the socket in the calling thread's network namespace, on the link `index`.
    pub fn open(index: u32) -> io::Result<Self> {
        let fd = socket()?;
        bind(&fd, link_number(index)?, 0)?;
        Ok(Self { fd })
    }

    /// Sends one whole frame, link-layer header included.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::sys::socket::send(
            self.fd.as_raw_fd(),
            frame,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        )?;
        Ok(())
    }
}

impl Injector {
    /// Opens the socket in the calling thread's network namespace, on the link `index`.
    pub fn open(index: u32) -> io::Result<Self> {
        let socket = PacketSocket::open(index)?;
        option(&socket.fd, PACKET_VNET_HDR, &1_i32)?;
        // Past programs and queues that what leaves by the link has to pass.
        option(&socket.fd, PACKET_QDISC_BYPASS, &1_i32)?;
        Ok(Self(socket))
    }

    /// Sends one whole frame, behind what [`crate::tap::Tap`] puts before each.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        for _ in 1..SEND_TRIES {
            match self.0.send(frame) {
                Err(error) if is_full(&error) => std::thread::yield_now(),
                sent => return sent,
            }
        }
        self.0.send(frame)
    }
}

impl Capture {
    /// Opens a socket that sees nothing yet, for what passes the bridge `index` of the calling
    /// thread's network namespace with the destination `mac`, from wherever.
    pub fn open(index: u32, mac: [u8; 6], bytes_max: usize) -> io::Result<Self> {
        let fd = socket()?;
        option(&fd, PACKET_VNET_HDR, &1_i32)?;
        let room = libc::c_int::try_from(bytes_max).map_err(io::Error::other)?;
        set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &room)?;
        let [a, b, c, d, e, f] = mac;
        let (first, last) = (
            u32::from_be_bytes([a, b, c, d]),
            u32::from_be_bytes([0, 0, e, f]),
        );
        // The first four bytes, the two behind them; all of it, or nothing.
        let mut filter = [
            code(0x20, 0, 0, 0),
            code(0x15, 0, 3, first),
            code(0x28, 0, 0, 4),
            code(0x15, 0, 1, last),
            code(0x06, 0, 0, u32::MAX),
            code(0x06, 0, 0, 0),
        ];
        let filter = libc::sock_fprog {
            len: filter.len() as libc::c_ushort,
            filter: filter.as_mut_ptr(),
        };
        set(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        let bridge = link_number(index)?;
        Ok(Self { fd, bridge })
    }

    /// Sees from here on.
    pub fn begin(&self) -> io::Result<()> {
        // A bridge shows to itself what it passes on, if it is promiscuous.
        let member = Membership {
            link: self.bridge,
            kind: PACKET_MR_PROMISC,
            length: 0,
            address: [0; 8],
        };
        option(&self.fd, PACKET_ADD_MEMBERSHIP, &member)?;
        bind(&self.fd, self.bridge, libc::ETH_P_ALL as u16)
    }

    /// The next frame, with what precedes it; none if none waits. One that is longer than `buffer`
    /// is cut.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        use nix::sys::socket::{MsgFlags, recv};
        match recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(length)),
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN))
}

fn code(code: u16, yes: u8, no: u8, number: u32) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: yes,
        jf: no,
        k: number,
    }
}

fn link_number(index: u32) -> io::Result<i32> {
    i32::try_from(index)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "link index too large"))
}

/// A raw socket that is bound to nothing, and receives nothing.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers; a negative result is an error, checked below.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` was just returned by socket(2), is open, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn bind(fd: &OwnedFd, link: i32, protocol: u16) -> io::Result<()> {
    // SAFETY: sockaddr_ll is a plain C struct for which all-zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = link;
    // SAFETY: the pointer is to a live sockaddr_ll and the length is its size.
    let result = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(result)
}

fn option<T: Plain>(fd: &OwnedFd, name: libc::c_int, value: &T) -> io::Result<()> {
    set(fd, libc::SOL_PACKET, name, value)
}

fn set<T: Plain>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let raw: RawFd = fd.as_raw_fd();
    // SAFETY: the pointer is to a live value and the length is its size; the kernel reads it, and
    // of a filter what that points to, which its caller keeps.
    let result = unsafe {
        libc::setsockopt(
            raw,
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    check(result)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

/// What the options of sockets above are made of.
trait Plain {}
impl Plain for i32 {}
impl Plain for libc::sock_fprog {}
impl Plain for Membership {}

/// `struct packet_mreq`.
#[repr(C)]
struct Membership {
    link: i32,
    kind: u16,
    length: u16,
    address: [u8; 8],
}

const _: () = assert!(size_of::<Membership>() == 16);

const PACKET_ADD_MEMBERSHIP: libc::c_int = 1;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_MR_PROMISC: u16 = 1;

/// How often it is tried to send what there is no room for.
const SEND_TRIES: u32 = 50;
