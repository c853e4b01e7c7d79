//! A server that says everything again: lines of TCP, and datagrams of UDP; over IPv4 and IPv6.
//!
//! Datagrams at one port it takes as they come, and those at another one only now and then, so that
//! some wait unread at nearly every moment. What clients have again tells them all: this case has
//! nothing to say of itself.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result};

use super::Case;

/// Where it says lines again, and datagrams: at once, and now and then.
pub const LINES: u16 = 7601;
/// See [`LINES`].
pub const DATAGRAMS: u16 = 7602;
/// See [`LINES`].
pub const UNREAD: u16 = 7603;

/// The case.
#[derive(Debug)]
pub struct Echo {
    listener: TcpListener,
    lines: Vec<TcpStream>,
    unread: UdpSocket,
    steps: u32,
}

impl Echo {
    /// Listens at all ports.
    pub fn start() -> Result<Box<dyn Case>> {
        // One that is bound to all addresses of IPv6 has those of IPv4, too.
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = TcpListener::bind(any(LINES)).context("listening")?;
        listener.set_nonblocking(true).context("a socket")?;
        let unread = UdpSocket::bind(any(UNREAD)).context("a socket")?;
        unread.set_nonblocking(true).context("a socket")?;
        let datagrams = UdpSocket::bind(any(DATAGRAMS)).context("a socket")?;
        let thread = std::thread::Builder::new().name("datagrams".to_owned());
        let again = move || {
            let mut buffer = [0; DATAGRAM_MAX];
            while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
                // Whom it cannot be said to has gone.
                let _ = datagrams.send_to(&buffer[..length], from);
            }
        };
        thread.spawn(again).context("starting a thread")?;
        Ok(Box::new(Self {
            listener,
            lines: Vec::new(),
            unread,
            steps: 0,
        }))
    }
}

impl Case for Echo {
    fn arrange(&mut self) -> Result<()> {
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).context("a socket")?;
            stream.set_nodelay(true).context("a socket")?;
            self.lines.push(stream);
        }
        self.lines.retain_mut(is_open);
        self.steps += 1;
        if self.steps.is_multiple_of(STEPS_UNREAD) {
            let mut buffer = [0; DATAGRAM_MAX];
            while let Ok((length, from)) = self.unread.recv_from(&mut buffer) {
                let _ = self.unread.send_to(&buffer[..length], from);
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Says again what has come, which is short. Whether more may come.
fn is_open(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; DATAGRAM_MAX];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return false;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
}

const DATAGRAM_MAX: usize = 2048;
/// Ten milliseconds or so.
const STEPS_UNREAD: u32 = 5;
