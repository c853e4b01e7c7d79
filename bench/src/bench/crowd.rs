//! Clients that ask all the time, each on a thread of its own, and connect anew when they must.
//!
//! Every answer is noted with its time on one clock, by the client itself: what is between two
//! answers of any clients is what a user of the workload saw. A client whose connection breaks says
//! so, and tries to connect until it can.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::journal::{Answer, Journal};
use crate::lab::inside::in_network;

/// One client of a workload, with the account of what was acknowledged.
pub trait Client: Send + 'static {
    /// Connects, or connects anew.
    ///
    /// # Errors
    /// Nobody answers: it is tried again.
    fn connect(&mut self) -> Result<()>;

    /// Asks once, and takes the answer.
    ///
    /// # Errors
    /// The connection is of no use any more.
    fn ask(&mut self) -> Result<()>;

    /// After the load: compares what was acknowledged with what is there, and with what was
    /// answered meanwhile. What is wrong.
    ///
    /// # Errors
    /// It cannot be compared.
    fn judge(&mut self) -> Result<Vec<String>>;
}

/// How clients ask.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Asks per second of all clients together; none: each asks as soon as it is answered.
    pub per_second: Option<u32>,
}

/// Clients that are running.
pub struct Crowd {
    begun: Instant,
    stop: Arc<AtomicBool>,
    /// How many answers each has had.
    counts: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Result<Done>>>,
    net: OwnedFd,
}

/// What clients saw, after they ended.
#[derive(Debug)]
pub struct Seen {
    pub journal: Journal,
    /// How often a connection broke.
    pub reconnects: u32,
    /// Why, the first few times.
    pub breaks: Vec<String>,
    /// What is wrong with what they were answered, or with what the workload holds.
    pub wrong: Vec<String>,
}

struct Done {
    client: Box<dyn Client>,
    answers: Vec<Answer>,
    reconnects: u32,
    breaks: Vec<String>,
}

impl Crowd {
    /// Starts them in the network `net`; each is connected and was answered when this returns.
    pub fn start(net: &OwnedFd, clients: Vec<Box<dyn Client>>, pace: Pace) -> Result<Self> {
        let period = pace.per_second.map(|rate| {
            let each = f64::from(rate) / clients.len() as f64;
            Duration::from_secs_f64(1.0 / each)
        });
        let begun = Instant::now();
        let mut crowd = Self {
            begun,
            stop: Arc::new(AtomicBool::new(false)),
            counts: Vec::new(),
            threads: Vec::new(),
            net: net.try_clone().context("duplicating a descriptor")?,
        };
        for (index, client) in clients.into_iter().enumerate() {
            let count = Arc::new(AtomicU64::new(0));
            let mut one = One {
                begun,
                stop: Arc::clone(&crowd.stop),
                count: Arc::clone(&count),
                period,
                done: Done {
                    client,
                    answers: Vec::new(),
                    reconnects: 0,
                    breaks: Vec::new(),
                },
            };
            let net = net.try_clone().context("duplicating a descriptor")?;
            let thread = std::thread::Builder::new().name(format!("client-{index}"));
            let thread = thread.spawn(move || in_network(&net, || one.run().map(|()| one.done))?);
            crowd.counts.push(count);
            crowd.threads.push(thread.context("starting a client")?);
        }
        crowd.wait_for_answers(1)?;
        Ok(crowd)
    }

    /// The present moment on the clients' clock.
    pub fn now(&self) -> u64 {
        nanos(self.begun.elapsed())
    }

    /// Waits until each client has had so many more answers.
    ///
    /// # Errors
    /// One does not get them.
    pub fn wait_for_answers(&self, answers: u64) -> Result<()> {
        let had = |count: &Arc<AtomicU64>| count.load(Ordering::Relaxed);
        let wanted: Vec<u64> = self
            .counts
            .iter()
            .map(|count| had(count) + answers)
            .collect();
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        loop {
            let mut all = self.counts.iter().zip(&wanted);
            if all.all(|(count, wanted)| *wanted <= had(count)) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "a client has no answer within {ANSWER_TIME_MAX:?}"
            );
            std::thread::sleep(POLL);
        }
    }

    /// Ends the load after the answers that are outstanding, and has what was acknowledged compared
    /// with what is there.
    ///
    /// # Errors
    /// It cannot be compared.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for thread in self.threads.drain(..) {
            let done = thread.join();
            all.push(done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        let mut seen = Seen {
            journal: Journal::default(),
            reconnects: 0,
            breaks: Vec::new(),
            wrong: Vec::new(),
        };
        let mut answers = Vec::new();
        for mut done in all {
            seen.reconnects += done.reconnects;
            seen.breaks.append(&mut done.breaks);
            answers.push(done.answers);
            let wrong = in_network(&self.net, || done.client.judge())?;
            seen.wrong.extend(wrong.context("reading back")?);
        }
        seen.breaks.truncate(NOTES_MAX);
        seen.wrong.truncate(NOTES_MAX);
        seen.journal = Journal::of_clients(answers);
        Ok(seen)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl fmt::Debug for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crowd")
            .field("clients", &self.counts.len())
            .finish_non_exhaustive()
    }
}

/// One client's thread.
struct One {
    begun: Instant,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    period: Option<Duration>,
    done: Done,
}

impl One {
    fn run(&mut self) -> Result<()> {
        self.connect()?;
        let mut next = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(period) = self.period {
                let now = Instant::now();
                std::thread::sleep(next.saturating_duration_since(now));
                // After an outage nothing is made up for: that would be another load.
                next = if next + CATCH_UP_MAX < now { now } else { next } + period;
            }
            let asked = Instant::now();
            match self.done.client.ask() {
                Ok(()) => self.note(asked),
                Err(error) => {
                    self.note_break(&error);
                    self.connect()?;
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, asked: Instant) {
        let now = Instant::now();
        self.count.fetch_add(1, Ordering::Relaxed);
        if self.done.answers.len() < ANSWERS_MAX {
            let took = (now - asked).as_micros();
            self.done.answers.push(Answer {
                at: nanos(now - self.begun),
                took: u32::try_from(took).unwrap_or(u32::MAX),
            });
        }
    }

    fn note_break(&mut self, error: &anyhow::Error) {
        self.done.reconnects += 1;
        if self.done.breaks.len() < NOTES_MAX {
            let at = self.begun.elapsed().as_secs_f64();
            self.done.breaks.push(format!("at {at:.3} s: {error:#}"));
        }
    }

    /// Until it is connected, or the load is over.
    fn connect(&mut self) -> Result<()> {
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        loop {
            let Err(error) = self.done.client.connect() else {
                return Ok(());
            };
            if self.stop.load(Ordering::Relaxed) || deadline < Instant::now() {
                return Err(error).context("a client cannot connect any more");
            }
            std::thread::sleep(RETRY);
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Above any outage that is measured: an archive of all memory over the slowest link.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(600);
/// How long a client tries one connection before it tries another: a packet that nobody took is
/// sent again by the kernel only after a second.
pub const CONNECT_TIME_MAX: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_millis(5);
const POLL: Duration = Duration::from_millis(2);
const CATCH_UP_MAX: Duration = Duration::from_millis(20);
/// 16 MiB of each client's answers; a load beyond is none of the benchmark's.
const ANSWERS_MAX: usize = 1 << 20;
const NOTES_MAX: usize = 8;
