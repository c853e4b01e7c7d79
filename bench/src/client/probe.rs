//! The prober: one request per millisecond on one connection; the longest silence is the blackout.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::resp::ANSWER_TIME_MAX;
use crate::lab::inside::in_network;
use crate::workload::redis;
use crate::writer;

/// A prober that is running.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Seen {
    last_answer: Instant,
    answers: u64,
    /// Silences worth remembering: (the answer before, the answer after).
    silences: Vec<(Instant, Instant)>,
    broken: Option<String>,
}

impl Prober {
    pub fn redis(net: &OwnedFd, address: Ipv4Addr) -> Result<Self> {
        Self::start(net, SocketAddr::from((address, redis::PORT)), b"PING\r\n")
    }

    pub fn writer(net: &OwnedFd, address: Ipv4Addr) -> Result<Self> {
        Self::start(net, SocketAddr::from((address, writer::PORT)), b"ping\n")
    }

    /// Asks `question`, to which the answer is one line.
    pub fn start(net: &OwnedFd, target: SocketAddr, question: &'static [u8]) -> Result<Self> {
        let stream = in_network(net, || TcpStream::connect_timeout(&target, ANSWER_TIME_MAX))?;
        let stream = stream.with_context(|| format!("connecting to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        let mut connection = BufReader::new(stream);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Seen {
            last_answer: Instant::now(),
            answers: 0,
            silences: Vec::new(),
            broken: None,
        }));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::Builder::new().name("prober".to_owned());
        let thread = thread.spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let answer = ask(&mut connection, question);
                let mut seen = shared
                    .lock()
                    .expect("no thread panics while it notes an answer");
                match answer {
                    Ok(()) => seen.note(Instant::now()),
                    Err(error) => {
                        seen.broken = Some(format!("the prober's connection: {error}"));
                        return;
                    }
                }
                drop(seen);
                std::thread::sleep(PERIOD.saturating_sub(asked.elapsed()));
            }
        });
        Ok(Self {
            stop,
            seen,
            thread: Some(thread.context("starting the prober")?),
        })
    }

    /// The longest silence of which some part lies after `from`, with the present one if it is
    /// still going on.
    pub fn longest_silence_since(&self, from: Instant) -> Duration {
        let seen = self
            .seen
            .lock()
            .expect("no thread panics while it notes an answer");
        let over = seen.silences.iter().filter(|(_, end)| *end > from);
        let longest = over
            .map(|(start, end)| *end - *start)
            .max()
            .unwrap_or(PERIOD);
        longest.max(seen.last_answer.elapsed())
    }

    /// Waits until an answer came in after `from`: only then is the silence around it known.
    pub fn wait_for_answer_after(&self, from: Instant, time_max: Duration) -> bool {
        let deadline = Instant::now() + time_max;
        while Instant::now() < deadline {
            let seen = self
                .seen
                .lock()
                .expect("no thread panics while it notes an answer");
            if seen.last_answer > from {
                return true;
            }
            if seen.broken.is_some() {
                return false;
            }
            drop(seen);
            std::thread::sleep(PERIOD);
        }
        false
    }

    /// Why its connection broke, if it did.
    pub fn broken(&self) -> Option<String> {
        let seen = self.seen.lock();
        seen.expect("no thread panics while it notes an answer")
            .broken
            .clone()
    }

    /// Ends the prober; why its connection broke, if it did.
    pub fn finish(mut self) -> Option<String> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The thread panics only if this one did while noting.
            let _ = thread.join();
        }
        self.seen
            .lock()
            .expect("no thread panics while it notes an answer")
            .broken
            .take()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(connection: &mut BufReader<TcpStream>, question: &[u8]) -> io::Result<()> {
    connection.get_mut().write_all(question)?;
    let mut line = String::new();
    match connection.read_line(&mut line)? {
        0 => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "connection closed",
        )),
        _ => Ok(()),
    }
}

impl Seen {
    fn note(&mut self, now: Instant) {
        self.answers += 1;
        if now - self.last_answer > SILENCE_MIN && self.silences.len() < SILENCES_MAX {
            self.silences.push((self.last_answer, now));
        }
        self.last_answer = now;
    }
}

const PERIOD: Duration = Duration::from_millis(1);
/// Shorter gaps are the scheduler's.
const SILENCE_MIN: Duration = Duration::from_millis(5);
/// 1.5 MiB; a run with more silences than this has other problems.
const SILENCES_MAX: usize = 65_536;
