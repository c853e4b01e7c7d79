//! The self-checking writer: a workload that knows what its memory must hold.
//!
//! Every page of its region holds its address, a version, a checksum and contents; the versions are
//! also in a table beside it, so that a page from the past is noticed as well as a torn one. One
//! loop dirties pages at a set rate, checks some, runs one step of a *case* (odd things programs do
//! with memory), and answers a text protocol on TCP. After the first mismatch it changes nothing
//! more and answers everything with what it found.
//!
//! Plain std: the binary should map little and be easy to dump.
//!
//! Protocol, one line each way: `ping` → `pong`; `status` → `ok ticks=N dirtied=N …`; `verify` →
//! `ok verified=PAGES`; `rate N` → `ok`; `stream N` → `frame NUMBER …` N times a second from then
//! on; anything after a mismatch → `mismatch …`.

pub mod case;
pub mod options;
pub mod pages;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::content::Generator;
use crate::sys::memory::{Backing, PAGE};
use crate::sys::process::forbid_userfaultfd;
use case::Case;
use options::{Options, Pattern};
use pages::Checked;

/// The program `lab-writer`.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some(case::EXEC_CHILD) => case::tree::exec_child(&arguments[1..]),
        _ => Options::parse(&arguments).and_then(|options| run(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-writer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if let Some(verdict) = options.seccomp {
        forbid_userfaultfd(verdict).context("installing a seccomp filter")?;
    }
    // Before the sockets, so that children of a case do not inherit them.
    let case = case::start(&options.case)?;
    let mut region = Checked::new(Backing::Private, options.memory, options.content)?;
    region.write_all();
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listening")?;
    listener.set_nonblocking(true)?;
    let mut writer = Writer {
        region,
        case,
        hot_pages: options.hot / PAGE,
        pattern: options.pattern,
        rate: options.rate,
        checks_per_tick: options.checks,
        generator: Generator(1),
        debt: 0.0,
        next_sequential: 0,
        next_check: 0,
        ticks: 0,
        dirtied: 0,
        verified: 0,
        mismatch: None,
    };
    serve(&mut writer, &listener)
}

/// One tick per millisecond, and whatever clients ask between them.
fn serve(writer: &mut Writer, listener: &TcpListener) -> Result<()> {
    let mut clients: Vec<Client> = Vec::new();
    let mut next_tick = Instant::now();
    loop {
        wait_for_input(
            listener,
            &clients,
            next_tick.saturating_duration_since(Instant::now()),
        )?;
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            if clients.len() < CLIENTS_MAX {
                clients.push(Client {
                    stream,
                    line: Vec::new(),
                    frames: None,
                });
            }
        }
        clients.retain_mut(|client| client.serve(writer).is_ok());
        let now = Instant::now();
        if now >= next_tick {
            writer.tick();
            clients.retain_mut(|client| client.send_frames(now).is_ok());
            // After an outage there is nothing to catch up with.
            next_tick = (next_tick + TICK).max(now);
        }
    }
}

fn wait_for_input(listener: &TcpListener, clients: &[Client], time: Duration) -> Result<()> {
    let mut inputs = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    inputs.extend(
        clients
            .iter()
            .map(|c| PollFd::new(c.stream.as_fd(), PollFlags::POLLIN)),
    );
    let milliseconds = u16::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
    match poll(&mut inputs, PollTimeout::from(milliseconds)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("waiting for clients"),
    }
}

struct Client {
    stream: TcpStream,
    line: Vec<u8>,
    frames: Option<Frames>,
}

/// A client that is sent something at a constant rate, as of a video.
struct Frames {
    period: Duration,
    next: Instant,
    number: u64,
}

impl Client {
    /// Answers the lines that have arrived. An error means the client is gone.
    fn serve(&mut self, writer: &mut Writer) -> io::Result<()> {
        let mut bytes = [0; 256];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.line.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.line.len() > LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&self.line[..end]).into_owned();
            self.line.drain(..=end);
            if let Some(rate) = line.trim().strip_prefix("stream ") {
                let rate = rate.parse().unwrap_or(1).clamp(1, FRAMES_MAX);
                self.frames = Some(Frames {
                    period: Duration::from_secs(1) / rate,
                    next: Instant::now(),
                    number: 0,
                });
                continue;
            }
            let mut answer = writer.answer(line.trim());
            answer.push('\n');
            // Answers are far shorter than a socket's buffer.
            self.stream.write_all(answer.as_bytes())?;
        }
        Ok(())
    }
}

impl Client {
    /// Sends the frame that is due. What was due while it did not run is not made up for. An error
    /// means that the client is gone, or takes nothing any more.
    fn send_frames(&mut self, now: Instant) -> io::Result<()> {
        let Some(frames) = &mut self.frames else {
            return Ok(());
        };
        if now < frames.next {
            return Ok(());
        }
        frames.next = (frames.next + frames.period).max(now);
        frames.number += 1;
        let mut frame = format!("frame {} ", frames.number);
        frame.extend(std::iter::repeat_n('.', FRAME_BYTES - 1 - frame.len()));
        frame.push('\n');
        self.stream.write_all(frame.as_bytes())
    }
}

struct Writer {
    region: Checked,
    case: Box<dyn Case>,
    hot_pages: usize,
    pattern: Pattern,
    /// Pages per second.
    rate: u32,
    checks_per_tick: usize,
    generator: Generator,
    /// Pages due but not written yet, a fraction.
    debt: f64,
    next_sequential: usize,
    next_check: usize,
    ticks: u64,
    dirtied: u64,
    verified: u64,
    mismatch: Option<String>,
}

impl Writer {
    fn tick(&mut self) {
        if self.mismatch.is_some() {
            return;
        }
        self.ticks += 1;
        self.debt += f64::from(self.rate) * TICK.as_secs_f64();
        while self.debt >= 1.0 {
            self.debt -= 1.0;
            let page = self.choose();
            self.region.write(page);
            self.dirtied += 1;
        }
        let result = self.check_some().and_then(|()| self.case.step(self.ticks));
        if let Err(error) = result {
            self.note(&error);
        }
    }

    fn choose(&mut self) -> usize {
        let pages = self.hot_pages as u64;
        match self.pattern {
            Pattern::Uniform => self.generator.below(pages) as usize,
            Pattern::Sequential => {
                self.next_sequential = (self.next_sequential + 1) % self.hot_pages;
                self.next_sequential
            }
            Pattern::Zipf => {
                // As 1/rank: halving ranks a random number of times is uniform in their logarithm.
                let halvings = self.generator.below(u64::from(pages.ilog2()) + 1);
                self.generator.below((pages >> halvings).max(1)) as usize
            }
        }
    }

    fn check_some(&mut self) -> Result<()> {
        for _ in 0..self.checks_per_tick {
            self.region.check(self.next_check)?;
            self.next_check = (self.next_check + 1) % self.region.pages();
            self.verified += 1;
        }
        Ok(())
    }

    fn answer(&mut self, line: &str) -> String {
        if let Some(mismatch) = &self.mismatch {
            return format!("mismatch {mismatch}");
        }
        match line.split_once(' ').unwrap_or((line, "")) {
            ("ping", _) => "pong".to_owned(),
            ("status", _) => format!(
                "ok ticks={} dirtied={} verified={} memory={} case={}",
                self.ticks,
                self.dirtied,
                self.verified,
                self.region.pages() * PAGE,
                self.case.progress()
            ),
            ("verify", _) => match self.verify() {
                Ok(pages) => format!("ok verified={pages}"),
                Err(error) => {
                    self.note(&error);
                    format!("mismatch {}", self.mismatch.as_deref().unwrap_or_default())
                }
            },
            ("rate", rate) => match rate.parse() {
                Ok(rate) => {
                    self.rate = rate;
                    "ok".to_owned()
                }
                Err(_) => "error not a rate".to_owned(),
            },
            _ => "error no such command".to_owned(),
        }
    }

    fn verify(&mut self) -> Result<usize> {
        Ok(self.region.check_all()? + self.case.verify()?)
    }

    fn note(&mut self, error: &anyhow::Error) {
        let text = format!("{error:#}").replace('\n', " ");
        eprintln!("lab-writer: mismatch: {text}");
        self.mismatch = Some(text);
    }
}

/// Where the protocol is spoken.
pub const PORT: u16 = 7000;
const TICK: Duration = Duration::from_millis(1);
const CLIENTS_MAX: usize = 16;
/// As a client of a game or of a call has them.
pub const FRAME_BYTES: usize = 512;
const FRAMES_MAX: u32 = 1000;
const LINE_MAX: usize = 1024;
