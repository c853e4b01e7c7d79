//! Connections that are not yet anybody's: established and not accepted, or not even answered.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, connect, getsockname, listen,
    socket,
};

use super::Case;
use super::passing::Phase;

/// Connections that wait to be accepted.
#[derive(Debug)]
pub struct Backlogged {
    phase: Phase,
    connecting: bool,
    listener: Option<TcpListener>,
    clients: Vec<TcpStream>,
    /// In the middle of its handshake.
    late: Option<OwnedFd>,
}

impl Backlogged {
    /// With `connecting` one more client finds no place in the backlog.
    pub fn start(phase: Phase, connecting: bool) -> Box<dyn Case> {
        Box::new(Self {
            phase,
            connecting,
            listener: None,
            clients: Vec::new(),
            late: None,
        })
    }

    fn make(&mut self) -> Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let made = || socket(AddressFamily::Inet, SockType::Stream, flags, None);
        let listener = made().context("making a socket")?;
        let any = SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
        bind(listener.as_raw_fd(), &any).context("binding")?;
        // One more than it says fits.
        let places = i32::try_from(CLIENTS - 1).unwrap_or_default();
        let places = Backlog::new(places).context("a backlog")?;
        listen(&listener, places).context("listening")?;
        let at: SockaddrIn = getsockname(listener.as_raw_fd()).context("its address")?;
        let address = SocketAddr::from((at.ip(), at.port()));
        for _ in 0..CLIENTS {
            let client = TcpStream::connect(address).context("connecting")?;
            self.clients.push(client);
        }
        self.clients[0].write_all(REQUEST).context("asking")?;
        if self.connecting {
            let late = made().context("making a socket")?;
            match connect(late.as_raw_fd(), &at) {
                Err(Errno::EINPROGRESS) => self.late = Some(late),
                other => anyhow::bail!("a full backlog answers {other:?}"),
            }
        }
        self.listener = Some(TcpListener::from(listener));
        Ok(())
    }

    /// Accepts all; whatever is wrong.
    fn accept(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        let Some(listener) = self.listener.take() else {
            return wrong;
        };
        for client in self.clients.drain(..) {
            let Ok((mut server, _)) = listener.accept() else {
                wrong.push("a connection waits no more to be accepted".to_owned());
                continue;
            };
            let _ = client.set_read_timeout(Some(ANSWER_MAX));
            let _ = server.set_read_timeout(Some(ANSWER_MAX));
            // They are accepted in the order in which they came.
            if server.peer_addr().ok() != client.local_addr().ok() {
                wrong.push("a connection comes out of its turn".to_owned());
            }
            let answered = server.write_all(REPLY).and_then(|()| {
                let mut reply = [0; REPLY.len()];
                (&client).read_exact(&mut reply)
            });
            if let Err(error) = answered {
                wrong.push(format!("a client does not hear its reply: {error}"));
            }
        }
        self.late = None;
        wrong
    }
}

impl Case for Backlogged {
    fn arrange(&mut self) -> Result<()> {
        self.phase.begin();
        self.make()
    }

    fn step(&mut self) -> Result<()> {
        if !self.phase.changes() {
            return Ok(());
        }
        if self.phase.is_on() {
            return self.make();
        }
        let wrong = self.accept();
        anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        if let Some(client) = self.clients.first()
            && self.listener.is_some()
        {
            client.set_nonblocking(false).context("a client")?;
        }
        Ok(self.accept())
    }
}

const CLIENTS: usize = 3;
const REQUEST: &[u8] = b"request";
const REPLY: &[u8] = b"reply";
const ANSWER_MAX: Duration = Duration::from_secs(3);
