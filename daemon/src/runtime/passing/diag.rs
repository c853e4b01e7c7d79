//! Dumps of sockets by `sock_diag`: requests written and answers cut up, byte by byte.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::stat::fstat;
use nix::sys::time::TimeVal;

/// A socket of `sock_diag`; it speaks of the network namespace it was made in.
#[derive(Debug)]
pub(in crate::runtime) struct Diag {
    socket: OwnedFd,
    /// Its own number, which the answers name too.
    pub(in crate::runtime) inode: u64,
    buffer: Vec<u8>,
}

impl Diag {
    /// One for the namespace of the calling thread.
    pub(in crate::runtime) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        // The kernel answers within the call; this only keeps a fault of it from hanging a freeze.
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::new(ANSWER_SECONDS, 0),
        )?;
        let inode = fstat(&socket)?.st_ino;
        Ok(Self {
            socket,
            inode,
            buffer: vec![0; ANSWER_BYTES],
        })
    }

    /// Asks for all sockets that `request` describes, and gives each one's record to `each`.
    ///
    /// A kernel that has no such dump has no such sockets.
    pub(in crate::runtime) fn dump(
        &mut self,
        kind: u16,
        request: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let length = u32::try_from(HEADER_BYTES + request.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER_BYTES + request.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(REQUEST_DUMP.to_ne_bytes());
        message.extend([0; 8]); // sequence and port: one request at a time
        message.extend(request);
        let raw = self.socket.as_raw_fd();
        send(raw, &message, MsgFlags::empty())?;
        loop {
            let length = recv(raw, &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..length];
            while let Some((kind, payload, tail)) = split(rest) {
                rest = tail;
                match kind {
                    DONE => return Ok(()),
                    ERROR => match number(payload, 0).map(u32::cast_signed) {
                        Some(error) if error == -libc::ENOENT => return Ok(()),
                        Some(error) => return Err(io::Error::from_raw_os_error(-error)),
                        None => return Err(io::ErrorKind::InvalidData.into()),
                    },
                    _ => each(payload),
                }
            }
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// What asks for the TCP sockets in these states, each a bit: `struct inet_diag_req`, the older
/// form, of which one walk covers both families.
pub(in crate::runtime) fn inet_request(states: u32) -> [u8; INET_REQUEST_BYTES] {
    let mut request = [0; INET_REQUEST_BYTES];
    request[INET_REQUEST_BYTES - 8..INET_REQUEST_BYTES - 4].copy_from_slice(&states.to_ne_bytes());
    request
}

/// The first message of `bytes`, its type and payload, and what follows it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(number(bytes, 0)?).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let payload = bytes.get(HEADER_BYTES..length)?;
    Some((
        kind,
        payload,
        bytes.get(aligned(length)..).unwrap_or_default(),
    ))
}

/// The attribute `wanted` among those that follow the first `fixed` bytes of a record.
pub(in crate::runtime) fn attribute(record: &[u8], fixed: usize, wanted: u16) -> Option<&[u8]> {
    let mut rest = record.get(aligned(fixed)..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(aligned(length)..)?;
    }
}

/// The number of this machine's byte order at `offset`.
pub(in crate::runtime) fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

const fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// `SOCK_DIAG_BY_FAMILY`.
pub(in crate::runtime) const BY_FAMILY: u16 = 20;

/// `TCPDIAG_GETSOCK`: answers are `struct inet_diag_msg`.
pub(in crate::runtime) const INET_SOCKETS: u16 = 18;
const INET_REQUEST_BYTES: usize = 60;

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_DUMP: u16 = 0x301;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;

/// The kernel makes answers of at most 32 KiB.
const ANSWER_BYTES: usize = 64 << 10; // 64 KiB
const ANSWER_SECONDS: i64 = 1;
