//! A client that sends numbered datagrams at a fixed rate to a server that says them again, and
//! accounts for every one: lost, doubled, out of order.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::inside::in_network;

/// A client that is running.
#[derive(Debug)]
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// What became of the datagrams so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Whether each number has come again.
    came: Vec<bool>,
    pub answers: usize,
    /// Numbers that came again more than once.
    pub doubled: usize,
    /// Those behind a higher one.
    pub disordered: usize,
    /// How often the other side's kernel said that nobody is there.
    pub refused: usize,
    highest: usize,
}

impl Seen {
    /// How many were sent.
    pub fn sent(&self) -> usize {
        self.came.len()
    }

    /// How many of them did not come again.
    pub fn lost(&self) -> usize {
        self.came.iter().filter(|came| !**came).count()
    }

    fn note(&mut self, number: usize) {
        let Some(came) = self.came.get_mut(number) else {
            return;
        };
        if std::mem::replace(came, true) {
            self.doubled += 1;
            return;
        }
        self.answers += 1;
        if number < self.highest {
            self.disordered += 1;
        }
        self.highest = self.highest.max(number);
    }
}

impl Datagrams {
    /// Sends so many per second from the network `net`.
    pub fn start(net: &OwnedFd, target: SocketAddr, per_second: u32) -> Result<Self> {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => ([0; 4], 0).into(),
            SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
        };
        let socket = in_network(net, || {
            let socket = UdpSocket::bind(any)?;
            socket.connect(target)?;
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        })?;
        let socket = socket.with_context(|| format!("a socket for {target}"))?;
        let (stop, seen) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<Mutex<Seen>>::default(),
        );
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::Builder::new().name("datagrams".to_owned());
        let period = Duration::from_secs(1) / per_second;
        let thread = thread.spawn(move || drive(&socket, period, &stopped, &shared));
        let started = Self {
            stop,
            seen,
            thread: Some(thread.context("starting the client")?),
        };
        started.wait_for_answers(1)?;
        Ok(started)
    }

    /// Waits until so many more have come again.
    ///
    /// # Errors
    /// They do not.
    pub fn wait_for_answers(&self, answers: usize) -> Result<()> {
        let wanted = lock(&self.seen).answers + answers;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while lock(&self.seen).answers < wanted {
            ensure!(Instant::now() < deadline, "no datagrams come again");
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Sends no more, waits for what is on its way, and says what was seen in all.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(lock(&self.seen).clone())
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn drive(
    socket: &UdpSocket,
    period: Duration,
    stop: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<()> {
    let mut next = Instant::now();
    let mut ends = None;
    loop {
        take(socket, &mut lock(seen));
        let now = Instant::now();
        if stop.load(Ordering::Relaxed) {
            let ends = *ends.get_or_insert(now + LAST_TIME_MAX);
            if ends <= now || lock(seen).lost() == 0 {
                return Ok(());
            }
        } else {
            while next <= now {
                let mut seen = lock(seen);
                let number = u32::try_from(seen.came.len()).context("enough datagrams")?;
                // An error is one of an earlier one.
                if socket.send(&number.to_le_bytes()).is_err() {
                    seen.refused += 1;
                    let again = socket.send(&number.to_le_bytes());
                    again.context("sending a datagram")?;
                }
                seen.came.push(false);
                next += period;
            }
        }
        std::thread::sleep(STEP);
    }
}

fn take(socket: &UdpSocket, seen: &mut Seen) {
    let mut buffer = [0; 4];
    loop {
        match socket.recv(&mut buffer) {
            Ok(_) => seen.note(u32::from_le_bytes(buffer) as usize),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                seen.refused += 1;
            }
            Err(_) => return,
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().expect("no thread panics while it notes one")
}

const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// How long what is on its way may take.
const LAST_TIME_MAX: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(2);
const STEP: Duration = Duration::from_micros(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_accounted_for() {
        let mut seen = Seen {
            came: vec![false; 6],
            ..Seen::default()
        };
        for number in [0, 1, 3, 2, 3, 5, 99] {
            seen.note(number);
        }
        let counts = (seen.lost(), seen.doubled, seen.disordered, seen.answers);
        assert_eq!((counts, seen.sent()), ((1, 1, 1, 5), 6));
    }
}
