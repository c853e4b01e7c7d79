//! Clients that ask, wait for the answer, and ask again: what most applications have.
//!
//! Two figures are kept apart: how long nobody had an answer, and how long anybody waited for one.
//! They differ when one connection waits for a retransmission and others go on.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::resp::ANSWER_TIME_MAX;

/// One client of an application, with the account of what was acknowledged.
pub trait Asker: Send + 'static {
    /// Asks once and takes the answer.
    ///
    /// # Errors
    /// There is none, or it is wrong. Nothing is asked any more.
    fn ask(&mut self) -> Result<()>;
}

/// Clients that are running.
pub struct Steady<A> {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    threads: Vec<JoinHandle<A>>,
}

/// What clients have seen between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// The longest time without an answer to anybody.
    pub silence: Duration,
    /// The longest time that anybody waited for an answer.
    pub pause: Duration,
}

#[derive(Debug)]
struct Seen {
    /// By client.
    answers: Vec<u64>,
    last_answer: Instant,
    window: Window,
    broken: Vec<String>,
}

impl<A: Asker> Steady<A> {
    /// Each client asks once in `period`, or as often as it is answered.
    pub fn start(askers: Vec<A>, period: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Seen {
            answers: vec![0; askers.len()],
            last_answer: Instant::now(),
            window: Window::default(),
            broken: Vec::new(),
        }));
        let mut threads = Vec::new();
        for (index, mut asker) in askers.into_iter().enumerate() {
            let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
            let thread = std::thread::Builder::new().name(format!("asker-{index}"));
            let thread = thread.spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let answer = asker.ask();
                    let mut seen = lock(&shared);
                    if let Err(error) = answer {
                        seen.broken.push(format!("client {index}: {error:#}"));
                        break;
                    }
                    seen.note(index, asked, Instant::now());
                    drop(seen);
                    std::thread::sleep(period.saturating_sub(asked.elapsed()));
                }
                asker
            });
            threads.push(thread.context("starting a client")?);
        }
        let steady = Self {
            stop,
            seen,
            threads,
        };
        steady.wait_for_answers(1)?;
        Ok(steady)
    }

    /// Forgets what was seen so far.
    pub fn mark(&self) {
        lock(&self.seen).window = Window::default();
    }

    /// What was seen since the mark.
    pub fn window(&self) -> Window {
        lock(&self.seen).window
    }

    /// Waits until each client has had so many more answers.
    ///
    /// # Errors
    /// One does not get them.
    pub fn wait_for_answers(&self, answers: u64) -> Result<()> {
        let wanted: Vec<u64> = lock(&self.seen)
            .answers
            .iter()
            .map(|had| had + answers)
            .collect();
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        loop {
            let seen = lock(&self.seen);
            if seen
                .answers
                .iter()
                .zip(&wanted)
                .all(|(had, wanted)| wanted <= had)
            {
                return Ok(());
            }
            ensure!(seen.broken.is_empty(), "{}", seen.broken.join("; "));
            drop(seen);
            ensure!(
                Instant::now() < deadline,
                "a client has no answer within {ANSWER_TIME_MAX:?}"
            );
            std::thread::sleep(POLL);
        }
    }

    /// Ends the load after the answers that are outstanding: the clients, and what broke.
    pub fn finish(mut self) -> (Vec<A>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let askers = self.threads.drain(..).map(|thread| thread.join());
        let askers = askers
            .map(|joined| joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        let broken = std::mem::take(&mut lock(&self.seen).broken);
        (askers, broken)
    }
}

impl<A> Drop for Steady<A> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl<A> fmt::Debug for Steady<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steady")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl Seen {
    fn note(&mut self, client: usize, asked: Instant, now: Instant) {
        self.answers[client] += 1;
        self.window.pause = self.window.pause.max(now - asked);
        self.window.silence = self.window.silence.max(now - self.last_answer);
        self.last_answer = now;
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock()
        .expect("no thread panics while it notes an answer")
}

const POLL: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_waits_while_another_is_answered() {
        let begun = Instant::now();
        let after = |millis| begun + Duration::from_millis(millis);
        let mut seen = Seen {
            answers: vec![0; 2],
            last_answer: begun,
            window: Window::default(),
            broken: Vec::new(),
        };
        for round in 0..10 {
            seen.note(0, after(100 * round), after(100 * (round + 1)));
        }
        seen.note(1, begun, after(1050));
        assert_eq!(seen.answers, [10, 1]);
        assert_eq!(seen.window.silence, Duration::from_millis(100));
        assert_eq!(seen.window.pause, Duration::from_millis(1050));
    }
}
