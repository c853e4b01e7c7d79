//! A program that follows its network and is behind: an answer of the kernel waits to be read.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::Case;
use super::passing::Phase;

/// The case.
#[derive(Debug)]
pub struct Unread {
    phase: Phase,
    socket: Option<OwnedFd>,
}

impl Unread {
    pub fn start(phase: Phase) -> Box<dyn Case> {
        Box::new(Self {
            phase,
            socket: None,
        })
    }

    fn ask(&mut self) -> Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let netlink = SockProtocol::NetlinkRoute;
        let made = socket(AddressFamily::Netlink, SockType::Raw, flags, netlink);
        let made = made.context("making a netlink socket")?;
        // RTMGRP_LINK | RTMGRP_IPV4_IFADDR
        bind(made.as_raw_fd(), &NetlinkAddr::new(0, 0x11)).context("binding a netlink socket")?;
        // nlmsghdr { length 20, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, sequence 9, port 0 } and
        // rtgenmsg { AF_UNSPEC }.
        let mut request = Vec::from(20_u32.to_ne_bytes());
        request.extend(RTM_GETLINK.to_ne_bytes());
        request.extend(0x301_u16.to_ne_bytes());
        request.extend(9_u32.to_ne_bytes());
        request.extend([0; 8]);
        send(made.as_raw_fd(), &request, MsgFlags::empty()).context("asking for links")?;
        self.socket = Some(made);
        Ok(())
    }

    /// Reads all that waits; how many links it tells of.
    fn read(&mut self) -> Result<usize> {
        let Some(socket) = self.socket.take() else {
            return Ok(0);
        };
        let mut links = 0;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => links += count(&buffer[..length]),
                Err(Errno::EAGAIN) => return Ok(links),
                Err(error) => return Err(error).context("reading an answer"),
            }
        }
    }
}

/// How many of the messages tell of a link.
fn count(mut messages: &[u8]) -> usize {
    let mut links = 0;
    while let Some((head, _)) = messages.split_first_chunk::<6>() {
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        links += usize::from(u16::from_ne_bytes([head[4], head[5]]) == RTM_NEWLINK);
        let next = length.next_multiple_of(4).max(16);
        messages = messages.get(next..).unwrap_or_default();
    }
    links
}

impl Case for Unread {
    fn arrange(&mut self) -> Result<()> {
        self.phase.begin();
        self.ask()
    }

    fn step(&mut self) -> Result<()> {
        if !self.phase.changes() {
            return Ok(());
        }
        if self.phase.is_on() {
            return self.ask();
        }
        ensure!(self.read()? > 0, "the answer has no link");
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        let is_on = self.socket.is_some();
        let links = self.read()?;
        let is_lost = is_on && links == 0;
        Ok(is_lost
            .then(|| "the answer that waited is lost".to_owned())
            .into_iter()
            .collect())
    }
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
