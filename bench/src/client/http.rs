//! A client that opens connections at a fixed rate: one GET on each, and the whole answer compared.
//!
//! An answer may be late, since a SYN that met a closed port is sent again after a second. A
//! connection that is refused, reset or closed early, a wrong byte, and no answer are failures.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, getsockopt, socket, sockopt,
};

use super::resp::ANSWER_TIME_MAX;
use crate::lab::inside::in_network;
use crate::workload::nginx;

/// A client that is running.
#[derive(Debug)]
pub struct Requests {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// What a client has seen so far.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Right answers.
    pub answers: u64,
    /// Those of them that took more than half a second.
    pub late: u64,
    /// What went wrong, the first few of them.
    pub failures: Vec<String>,
    /// How many went wrong.
    pub failed: u64,
    last_answer: Instant,
    /// The longest time without an answer since [`Requests::mark`].
    silence: Duration,
    /// The longest time that an answer took since then.
    slowest: Duration,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    begun: Instant,
    request: String,
    /// Bytes of the request that are sent; `None` until the connection is made.
    sent: Option<usize>,
    expected: Vec<u8>,
    received: Vec<u8>,
}

/// What became of a connection that can go on.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Waiting,
    Answered,
}

impl Requests {
    /// Opens so many connections per second from the network `net`.
    pub fn start(net: &OwnedFd, target: SocketAddr, per_second: u32) -> Result<Self> {
        let net = net.try_clone().context("duplicating a descriptor")?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Seen {
            answers: 0,
            late: 0,
            failures: Vec::new(),
            failed: 0,
            last_answer: Instant::now(),
            silence: Duration::ZERO,
            slowest: Duration::ZERO,
        }));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::Builder::new().name("requests".to_owned());
        let thread = thread.spawn(move || {
            let work = || {
                drive(
                    target,
                    Duration::from_secs(1) / per_second,
                    &stopped,
                    &shared,
                )
            };
            in_network(&net, work)?
        });
        Ok(Self {
            stop,
            seen,
            thread: Some(thread.context("starting the client")?),
        })
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Forgets the silences and the slow answers so far.
    pub fn mark(&self) {
        let mut seen = lock(&self.seen);
        (seen.silence, seen.slowest) = (Duration::ZERO, Duration::ZERO);
    }

    /// The longest time that an answer took since the mark.
    pub fn slowest(&self) -> Duration {
        lock(&self.seen).slowest
    }

    /// The longest silence since the mark, the present one included.
    pub fn silence(&self) -> Duration {
        let seen = lock(&self.seen);
        seen.silence.max(seen.last_answer.elapsed())
    }

    /// Waits until so many more answers have come; false if they do not.
    pub fn wait_for_answers(&self, answers: u64) -> bool {
        let wanted = lock(&self.seen).answers + answers;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while Instant::now() < deadline {
            if wanted <= lock(&self.seen).answers {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }

    /// Opens no more connections, waits for the answers to those that are open, and says what was
    /// seen in all.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the client does not panic")?;
        }
        Ok(self.seen())
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn drive(
    target: SocketAddr,
    period: Duration,
    stop: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<()> {
    let mut open: Vec<Connection> = Vec::new();
    let mut number = 0;
    let mut next = Instant::now();
    loop {
        let stopped = stop.load(Ordering::Relaxed);
        if stopped && open.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        while !stopped && next <= now {
            next += period;
            // A client that was not let run does not make up for it with a burst.
            if next + BURST_MAX < now {
                next = now;
            }
            if open.len() < OPEN_MAX {
                open.push(Connection::open(target, number)?);
                number += 1;
            }
        }
        wait(
            &open,
            if stopped {
                POLL
            } else {
                next.saturating_duration_since(now)
            },
        )?;
        open.retain_mut(|connection| {
            let step = match connection.advance() {
                Ok(Step::Waiting) if connection.begun.elapsed() < ANSWER_TIME_MAX => return true,
                Ok(Step::Waiting) => Err("no answer".to_owned()),
                Ok(Step::Answered) => Ok(connection.begun.elapsed()),
                Err(reason) => Err(reason),
            };
            lock(seen).note(step.map_err(|reason| connection.failure(&reason)));
            false
        });
    }
}

/// Until something can go on, at most so long.
fn wait(open: &[Connection], time: Duration) -> Result<()> {
    let mut wanted: Vec<PollFd<'_>> = open
        .iter()
        .map(|connection| {
            let sending = connection
                .sent
                .is_none_or(|sent| sent < connection.request.len());
            let flags = if sending {
                PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            PollFd::new(connection.stream.as_fd(), flags)
        })
        .collect();
    let millis = u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
    match poll(&mut wanted, PollTimeout::from(millis)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("waiting for answers"),
    }
}

impl Connection {
    fn open(target: SocketAddr, number: u64) -> Result<Self> {
        let SocketAddr::V4(address) = target else {
            anyhow::bail!("the lab's workloads have IPv4 addresses");
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)
            .context("making a socket")?;
        match connect(
            std::os::fd::AsRawFd::as_raw_fd(&fd),
            &SockaddrIn::from(address),
        ) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).with_context(|| format!("connecting to {target}")),
        }
        let (path, expected) = if number.is_multiple_of(BLOB_EVERY) {
            let blob = (0..nginx::BLOB_BYTES).map(nginx::blob_byte).collect();
            ("/blob".to_owned(), blob)
        } else {
            (format!("/echo/{number}"), nginx::echo(number).into_bytes())
        };
        Ok(Self {
            stream: TcpStream::from(fd),
            begun: Instant::now(),
            request: format!("GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n"),
            sent: None,
            expected,
            received: Vec::new(),
        })
    }

    fn advance(&mut self) -> Result<Step, String> {
        match self.try_advance() {
            Ok(step) => Ok(step),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Step::Waiting),
            Err(error) => Err(error.to_string()),
        }
    }

    fn try_advance(&mut self) -> io::Result<Step> {
        let sent = match self.sent {
            Some(sent) => sent,
            None => {
                match getsockopt(&self.stream, sockopt::SocketError)? {
                    0 => {}
                    error => return Err(io::Error::from_raw_os_error(error)),
                }
                // Fails until the connection is made.
                if self.stream.peer_addr().is_err() {
                    return Ok(Step::Waiting);
                }
                self.sent = Some(0);
                0
            }
        };
        let request = self.request.as_bytes();
        if sent < request.len() {
            self.sent = Some(sent + self.stream.write(&request[sent..])?);
        }
        let mut buffer = [0; 16 << 10];
        loop {
            match self.stream.read(&mut buffer)? {
                0 => return self.judge().map(|()| Step::Answered),
                bytes => self.received.extend(&buffer[..bytes]),
            }
            if ANSWER_BYTES_MAX < self.received.len() {
                return Err(io::Error::other("an answer without an end"));
            }
        }
    }

    /// The server closes when all is said, so that the end of the stream is part of the answer.
    fn judge(&self) -> io::Result<()> {
        let text = &self.received;
        let head = text.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let Some(head) = head else {
            return Err(io::Error::other(format!(
                "closed after {} bytes",
                text.len()
            )));
        };
        let body = &text[head + 4..];
        if !text.starts_with(b"HTTP/1.1 200 ") {
            let line = String::from_utf8_lossy(&text[..head.min(40)]).into_owned();
            return Err(io::Error::other(format!("the answer is {line:?}")));
        }
        if body == self.expected {
            return Ok(());
        }
        let right = body.iter().zip(&self.expected).take_while(|(a, b)| a == b);
        Err(io::Error::other(format!(
            "{} bytes of {} came, wrong from byte {} on",
            body.len(),
            self.expected.len(),
            right.count()
        )))
    }

    fn failure(&self, reason: &str) -> String {
        let line = self.request.lines().next().unwrap_or_default();
        format!(
            "{line}, {:.3} s after its beginning, {} bytes received: {reason}",
            self.begun.elapsed().as_secs_f64(),
            self.received.len()
        )
    }
}

impl Seen {
    fn note(&mut self, answer: Result<Duration, String>) {
        match answer {
            Ok(time) => {
                self.answers += 1;
                self.late += u64::from(LATE < time);
                self.silence = self.silence.max(self.last_answer.elapsed());
                self.slowest = self.slowest.max(time);
                self.last_answer = Instant::now();
            }
            Err(reason) => {
                self.failed += 1;
                if self.failures.len() < FAILURES_MAX {
                    self.failures.push(reason);
                }
            }
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock()
        .expect("no thread panics while it notes an answer")
}

const BLOB_EVERY: u64 = 4;
/// Some seconds of connections that wait; more would only say that nobody answers at all.
const OPEN_MAX: usize = 4000;
const BURST_MAX: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_millis(500);
const ANSWER_BYTES_MAX: usize = 1 << 20; // 1 MiB
const FAILURES_MAX: usize = 10;
const POLL: Duration = Duration::from_millis(5);
