//! Two processes that talk TCP to each other over loopback, with something on its way at any time:
//! corked bytes, of some connection every millisecond, which the kernel sends by itself when their
//! time is over; megabytes that wait for a reader; connections that are half closed, also behind
//! such megabytes. Nothing of it may be lost, wrong, or reset.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{Pid, getppid};

use super::Case;
use super::tree::{child, end, wait_until};
use crate::sys::memory::shared_words;

/// The case.
#[derive(Debug)]
pub struct Talking {
    /// There is more than corked bytes.
    waiting: bool,
    /// What the two say to each other besides.
    words: &'static [AtomicU64],
    child: Option<Pid>,
    ends: Vec<End>,
    /// Of each connection with corked bytes: what has come.
    ticks: Vec<(TcpStream, Counted)>,
}

/// One end of a connection, and what is to be done with it.
#[derive(Debug)]
struct End {
    stream: TcpStream,
    number: u64,
    role: Role,
}

#[derive(Clone, Copy, Debug)]
enum Role {
    /// It has written all that it has to say.
    Wrote,
    /// So many bytes wait for it, and behind them the end of what comes, if that is so.
    Reads { bytes: u64, closed: bool },
    /// It has closed its way, and hears the rest.
    Closed,
}

/// Numbers that follow one another, as far as they have come.
#[derive(Debug, Default)]
struct Counted {
    next: u32,
    /// Of a number that has not come as a whole.
    part: Vec<u8>,
}

impl Talking {
    /// With `waiting` there is more than corked bytes.
    pub fn start(waiting: bool) -> Result<Box<dyn Case>> {
        Ok(Box::new(Self {
            waiting,
            words: shared_words(SENT + TICKING).context("shared memory")?,
            child: None,
            ends: Vec::new(),
            ticks: Vec::new(),
        }))
    }

    /// Waits for all numbers that were sent.
    fn count(&mut self) -> Vec<String> {
        let deadline = Instant::now() + ANSWER_MAX;
        let mut wrong = Vec::new();
        for (index, (stream, counted)) in self.ticks.iter_mut().enumerate() {
            let sent = self.words[SENT + index].load(Ordering::Acquire);
            loop {
                if let Err(error) = counted.take(stream) {
                    wrong.push(format!("corked connection {index}: {error:#}"));
                    break;
                }
                if u64::from(counted.next) == sent {
                    break;
                }
                if deadline < Instant::now() {
                    let next = counted.next;
                    wrong.push(format!("corked connection {index}: {next} of {sent} came"));
                    break;
                }
                std::thread::sleep(TICK);
            }
        }
        wrong
    }
}

impl Case for Talking {
    fn arrange(&mut self) -> Result<()> {
        if let Some(child) = self.child.take() {
            end(child);
        }
        let words = self.words;
        words
            .iter()
            .for_each(|word| word.store(0, Ordering::Release));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
        let mut ends: [Vec<End>; 2] = Default::default();
        for number in 0..if self.waiting { 8 } else { 0 } {
            let side = usize::from(number % 2 == 1);
            let pair = pair(&listener)?;
            let [writer, reader] = waiting(pair, number, number < 4, number % 4 < 2)?;
            ends[side].push(writer);
            ends[1 - side].push(reader);
        }
        let (mut theirs, mut ticking) = (Vec::new(), Vec::new());
        self.ticks.clear();
        for _ in 0..TICKING {
            let (here, there) = pair(&listener)?;
            here.set_nonblocking(true).context("a socket")?;
            there.set_nonblocking(true).context("a socket")?;
            self.ticks.push((here, Counted::default()));
            ticking.push(there);
        }
        let [ours, other] = ends;
        theirs.extend(other);
        self.ends = ours;
        let root = nix::unistd::getpid();
        let (ours, ticks) = (&mut self.ends, &mut self.ticks);
        let made = child(|| {
            ours.clear();
            ticks.clear();
            tick(words, root, &ticking);
            let wrong = theirs.iter_mut().filter_map(|end| end.finish().err());
            let wrong = wrong
                .inspect(|error| eprintln!("loopback: {error:#}"))
                .count();
            words[WRONG].store(wrong as u64, Ordering::Release);
            words[DONE].store(1, Ordering::Release);
        });
        self.child = Some(made.context("forking")?);
        // There are corked bytes everywhere by then.
        let all = || words[SENT + TICKING - 1].load(Ordering::Acquire) != 0;
        ensure!(wait_until(all), "the child does not write");
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        // What is wrong is said when it is asked for.
        for (stream, counted) in &mut self.ticks {
            let _ = counted.take(stream);
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        self.words[STOP].store(1, Ordering::Release);
        let mut wrong = Vec::new();
        for end in &mut self.ends {
            if let Err(error) = end.finish() {
                wrong.push(format!(
                    "connection {} of the parent: {error:#}",
                    end.number
                ));
            }
        }
        let is_done = || self.words[DONE].load(Ordering::Acquire) != 0;
        let deadline = Instant::now() + 4 * ANSWER_MAX;
        while !is_done() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        if !is_done() {
            wrong.push("the child does not come to its end".to_owned());
        }
        match self.words[WRONG].load(Ordering::Acquire) {
            0 => {}
            count => wrong.push(format!("{count} connections of the child are wrong")),
        }
        wrong.extend(self.count());
        Ok(wrong)
    }
}

/// The child: writes corked numbers, now here, now there, until it is told to stop.
fn tick(words: &[AtomicU64], parent: Pid, streams: &[TcpStream]) {
    for index in (0..TICKING).cycle() {
        if words[STOP].load(Ordering::Acquire) != 0 || getppid() != parent {
            return;
        }
        let sent = &words[SENT + index];
        let number = u32::try_from(sent.load(Ordering::Acquire)).unwrap_or_default();
        let more = MsgFlags::from_bits_retain(libc::MSG_MORE);
        if send(streams[index].as_raw_fd(), &number.to_ne_bytes(), more) == Ok(4) {
            sent.store(u64::from(number) + 1, Ordering::Release);
        }
        std::thread::sleep(TICK);
    }
}

/// A connection of which one end has written `MANY` bytes, or a few, and closed its way behind
/// them, or not: that end, and the other.
fn waiting(
    (writer, reader): (TcpStream, TcpStream),
    number: u64,
    many: bool,
    closed: bool,
) -> Result<[End; 2]> {
    let wanted = if many { MANY } else { FEW };
    writer.set_nonblocking(true).context("a socket")?;
    let mut bytes = 0;
    while bytes < wanted {
        let chunk = contents(number, bytes, CHUNK.min(wanted - bytes));
        match (&writer).write(&chunk) {
            Ok(count) => bytes += count as u64,
            // As much as fits: it is more than its reader has taken.
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("writing"),
        }
    }
    if closed {
        writer
            .shutdown(Shutdown::Write)
            .context("closing one way")?;
    }
    for stream in [&writer, &reader] {
        stream.set_nonblocking(false).context("a socket")?;
        stream
            .set_read_timeout(Some(ANSWER_MAX))
            .context("a socket")?;
        stream
            .set_write_timeout(Some(ANSWER_MAX))
            .context("a socket")?;
    }
    let role = if closed { Role::Closed } else { Role::Wrote };
    let end = |stream, role| End {
        stream,
        number,
        role,
    };
    let reads = Role::Reads { bytes, closed };
    Ok([end(writer, role), end(reader, reads)])
}

impl End {
    /// Does the rest of what its connection was made for.
    fn finish(&mut self) -> Result<()> {
        let mut stream = &self.stream;
        match self.role {
            Role::Wrote => return Ok(()),
            Role::Closed => {
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).context("hearing the rest")?;
                ensure!(heard == TAIL, "the rest is {heard:?}");
                return Ok(());
            }
            Role::Reads { bytes, closed } => {
                let mut at = 0;
                while at < bytes {
                    let mut chunk = vec![0; CHUNK.min(bytes - at) as usize];
                    let read = stream.read_exact(&mut chunk);
                    read.with_context(|| format!("reading at {at} of {bytes}"))?;
                    let right = contents(self.number, at, chunk.len() as u64);
                    ensure!(chunk == right, "wrong bytes within {CHUNK} of {at}");
                    at += chunk.len() as u64;
                }
                if closed {
                    let ended = stream.read(&mut [0]).context("reading the end")?;
                    ensure!(ended == 0, "there is more than was written");
                    stream.write_all(TAIL).context("writing the rest")?;
                    stream.shutdown(Shutdown::Both).context("closing")?;
                }
            }
        }
        Ok(())
    }
}

impl Counted {
    /// Takes what has come.
    fn take(&mut self, mut stream: &TcpStream) -> Result<()> {
        let mut buffer = [0; 1024];
        loop {
            match stream.read(&mut buffer) {
                // The child has come to its end; whether all has come is seen by the count.
                Ok(0) => return Ok(()),
                Ok(count) => self.part.extend(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("reading"),
            }
            while let Some((number, rest)) = self.part.split_first_chunk::<4>() {
                let (number, rest) = (u32::from_ne_bytes(*number), rest.to_vec());
                ensure!(number == self.next, "{number} came, not {}", self.next);
                self.next += 1;
                self.part = rest;
            }
        }
    }
}

fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let address = listener.local_addr().context("an address")?;
    let here = TcpStream::connect(address).context("connecting")?;
    Ok((here, listener.accept().context("accepting")?.0))
}

/// What the connection of that number carries from the byte `at` on.
fn contents(number: u64, at: u64, length: u64) -> Vec<u8> {
    let byte = |offset: u64| {
        let word = (offset ^ number << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.to_be_bytes()[0]
    };
    (at..at + length).map(byte).collect()
}

// Words.
const STOP: usize = 0;
const DONE: usize = 1;
const WRONG: usize = 2;
/// How many numbers the child has sent, for each connection.
const SENT: usize = 3;

/// Connections with corked bytes: each is written to every 100 ms or so, and a cork holds 200 ms.
const TICKING: usize = 100;
const TICK: Duration = Duration::from_millis(1);
const MANY: u64 = 2 << 20; // 2 MiB
const FEW: u64 = 4;
const CHUNK: u64 = 64 << 10; // 64 KiB
const TAIL: &[u8] = b"tail";
/// One that is half closed at its restore may say nothing for 3 s: CRIU may leave it a window of 0,
/// and the kernel asks for a new one after its first timeout.
const ANSWER_MAX: Duration = Duration::from_secs(10);
