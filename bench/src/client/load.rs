//! The write load, and the account of what was acknowledged.
//!
//! Each connection has keys of its own (those with number ≡ its index), so that the order of the
//! writes to a key is the order on one connection, and "the last acknowledged value or a later sent
//! one" can be decided for every key.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::resp::{Connection, Reply};
use crate::content::{Content, Generator, seed_of};

/// The keys and values in a Redis of the lab.
#[derive(Clone, Copy, Debug)]
pub struct Dataset {
    pub keys: u32,
    /// The first so many keys are written by the load, the others never.
    pub hot_keys: u32,
    pub value_bytes: usize,
    pub content: Content,
}

/// How the load writes.
#[derive(Clone, Copy, Debug)]
pub struct LoadPlan {
    pub connections: u32,
    /// Values per second over all connections; unlimited when absent.
    pub values_per_second: Option<u32>,
    /// Commands sent before the first answer is read.
    pub pipeline: usize,
}

impl Dataset {
    /// First row: values of 4 KiB, hot set 64 MiB, `bytes` in all.
    pub fn first_row(bytes: u64) -> Self {
        let value_bytes = 4096;
        let keys = u32::try_from(bytes / 4096).expect("a lab's data set fits its memory");
        Self {
            keys,
            hot_keys: keys.min(16_384),
            value_bytes,
            content: Content::Random,
        }
    }

    /// Second row: values of 1 KB, all of them written.
    pub fn second_row(bytes: u64) -> Self {
        let keys = u32::try_from(bytes / 1000).expect("a lab's data set fits its memory");
        Self {
            keys,
            hot_keys: keys,
            value_bytes: 1000,
            content: Content::Random,
        }
    }

    pub fn key(&self, number: u32) -> [u8; 10] {
        let mut key = *b"k:00000000";
        let mut rest = number;
        for digit in key[2..].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        key
    }

    /// The value of a key after `version` writes by the load (0 = as populated).
    pub fn value(&self, number: u32, version: u32, out: &mut Vec<u8>) {
        out.resize(self.value_bytes, 0);
        out[..4].copy_from_slice(&number.to_le_bytes());
        out[4..8].copy_from_slice(&version.to_le_bytes());
        self.content
            .fill(seed_of(number.into(), version.into()), &mut out[8..]);
    }

    /// The version a value claims to be; whether it is that is for a comparison to say.
    pub fn version_in(value: &[u8]) -> Option<u32> {
        Some(u32::from_le_bytes(value.get(4..8)?.try_into().ok()?))
    }

    /// Writes every key once.
    pub fn populate(&self, connection: &mut Connection) -> Result<()> {
        let mut value = Vec::new();
        let mut number = 0;
        while number < self.keys {
            let mut queued = 0;
            while number < self.keys && connection.pending_bytes() < POPULATE_BATCH {
                self.value(number, 0, &mut value);
                connection.queue(&[b"SET", &self.key(number), &value]);
                number += 1;
                queued += 1;
            }
            connection.flush().context("populating")?;
            for _ in 0..queued {
                let reply = connection.receive().context("populating")?;
                if reply != Reply::Simple("OK".to_owned()) {
                    bail!("populating: {reply:?}");
                }
            }
        }
        Ok(())
    }
}

impl LoadPlan {
    /// First row: 4 connections, 50 MB/s of 4 KiB values, each waiting for its answer.
    pub fn first_row() -> Self {
        Self {
            connections: 4,
            values_per_second: Some(50_000_000 / 4096),
            pipeline: 1,
        }
    }

    /// Second row: as much as Redis takes.
    pub fn second_row() -> Self {
        Self {
            connections: 4,
            values_per_second: None,
            pipeline: 8,
        }
    }
}

/// What a connection wrote: per key of its own, versions sent and acknowledged.
#[derive(Debug)]
pub struct Account {
    pub sent: Vec<u32>,
    pub acknowledged: Vec<u32>,
    /// Why the connection ended early.
    pub broken: Option<String>,
}

/// A load that is running.
#[derive(Debug)]
pub struct Load {
    dataset: Dataset,
    plan: LoadPlan,
    started: Instant,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    /// The longest time that a connection waited for answers since the mark, in microseconds.
    waited: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Account>>,
    log_folder: PathBuf,
}

/// What a load did, after it ended.
#[derive(Debug)]
pub struct LoadReport {
    pub dataset: Dataset,
    pub plan: LoadPlan,
    pub accounts: Vec<Account>,
    pub writes: u64,
    pub duration: Duration,
}

impl Load {
    /// Starts the load; `log_folder` gets one file per connection with every acknowledged write.
    pub fn start(
        net: &OwnedFd,
        address: Ipv4Addr,
        dataset: Dataset,
        plan: LoadPlan,
        log_folder: &Path,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let waited = Arc::new(AtomicU64::new(0));
        let started = Instant::now();
        let mut threads = Vec::new();
        for index in 0..plan.connections {
            let path = log_folder.join(format!("acknowledged-{index}.bin"));
            let log =
                File::create(&path).with_context(|| format!("creating {}", path.display()))?;
            let writer = Writer {
                connection: Connection::open(net, address)?,
                dataset,
                plan,
                index,
                generator: Generator(u64::from(index) + 1),
                account: Account::new(dataset.hot_keys, plan.connections, index),
                log: BufWriter::new(log),
                started,
                stop: Arc::clone(&stop),
                acknowledged: Arc::clone(&acknowledged),
                waited: Arc::clone(&waited),
            };
            let thread = std::thread::Builder::new().name(format!("load-{index}"));
            threads.push(
                thread
                    .spawn(move || writer.run())
                    .context("starting a thread")?,
            );
        }
        let log_folder = log_folder.to_owned();
        Ok(Self {
            dataset,
            plan,
            started,
            stop,
            acknowledged,
            waited,
            threads,
            log_folder,
        })
    }

    /// Values acknowledged so far.
    pub fn writes(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Forgets how long connections waited so far.
    pub fn mark(&self) {
        self.waited.store(0, Ordering::Relaxed);
    }

    /// The longest time that a connection waited for answers since the mark.
    pub fn longest_wait(&self) -> Duration {
        Duration::from_micros(self.waited.load(Ordering::Relaxed))
    }

    /// Ends the load after the answers that are outstanding.
    pub fn finish(mut self) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        let accounts = self.threads.drain(..).map(|thread| thread.join());
        let accounts = accounts
            .map(|joined| joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        LoadReport {
            dataset: self.dataset,
            plan: self.plan,
            accounts,
            writes: self.writes(),
            duration: self.started.elapsed(),
        }
    }

    /// Where the acknowledged writes are logged.
    pub fn log_folder(&self) -> &Path {
        &self.log_folder
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl LoadReport {
    /// Client data acknowledged, in units of 1e6 bytes per second.
    pub fn megabytes_per_second(&self) -> f64 {
        let bytes = self.writes as f64 * self.dataset.value_bytes as f64;
        bytes / 1e6 / self.duration.as_secs_f64()
    }

    pub fn broken(&self) -> impl Iterator<Item = &str> {
        self.accounts
            .iter()
            .filter_map(|account| account.broken.as_deref())
    }

    /// Versions (acknowledged, sent) of a key that the load may write.
    pub fn versions(&self, number: u32) -> (u32, u32) {
        let account = &self.accounts[(number % self.plan.connections) as usize];
        let at = (number / self.plan.connections) as usize;
        (account.acknowledged[at], account.sent[at])
    }
}

impl Account {
    fn new(hot_keys: u32, connections: u32, index: u32) -> Self {
        let own = (hot_keys + connections - 1 - index) / connections;
        let zeros = vec![0; own as usize];
        Self {
            sent: zeros.clone(),
            acknowledged: zeros,
            broken: None,
        }
    }
}

/// One connection's thread.
struct Writer {
    connection: Connection,
    dataset: Dataset,
    plan: LoadPlan,
    index: u32,
    generator: Generator,
    account: Account,
    log: BufWriter<File>,
    started: Instant,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    waited: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self) -> Account {
        if let Err(error) = self.write_until_stopped() {
            let at = self.started.elapsed().as_secs_f64();
            let index = self.index;
            self.account.broken = Some(format!("connection {index} at {at:.3} s: {error}"));
        }
        self.account
    }

    fn write_until_stopped(&mut self) -> io::Result<()> {
        let mut pace = Pace::new(self.plan);
        let mut value = Vec::new();
        let mut batch = Vec::with_capacity(self.plan.pipeline);
        while !self.stop.load(Ordering::Relaxed) {
            pace.wait();
            batch.clear();
            for _ in 0..self.plan.pipeline {
                let own = self.generator.below(self.account.sent.len() as u64) as u32;
                let number = own * self.plan.connections + self.index;
                let version = self.account.sent[own as usize] + 1;
                self.account.sent[own as usize] = version;
                self.dataset.value(number, version, &mut value);
                self.connection
                    .queue(&[b"SET", &self.dataset.key(number), &value]);
                batch.push((own, number, version));
            }
            let asked = Instant::now();
            self.connection.flush()?;
            for (own, number, version) in &batch {
                let reply = self.connection.receive()?;
                if reply != Reply::Simple("OK".to_owned()) {
                    return Err(io::Error::other(format!("SET was answered {reply:?}")));
                }
                self.account.acknowledged[*own as usize] = *version;
                self.log_acknowledged(*number, *version)?;
            }
            let waited = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.waited.fetch_max(waited, Ordering::Relaxed);
            self.acknowledged
                .fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
        self.log.flush()
    }

    /// 16 bytes: key, version, nanoseconds since the start.
    fn log_acknowledged(&mut self, number: u32, version: u32) -> io::Result<()> {
        let time = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.log.write_all(&number.to_le_bytes())?;
        self.log.write_all(&version.to_le_bytes())?;
        self.log.write_all(&time.to_le_bytes())
    }
}

/// An even rate that does not catch up after an outage: that would be another load than asked for.
struct Pace {
    period: Option<Duration>,
    next: Instant,
}

impl Pace {
    fn new(plan: LoadPlan) -> Self {
        let per_batch = plan.pipeline as f64 * f64::from(plan.connections);
        let period = plan
            .values_per_second
            .map(|rate| Duration::from_secs_f64(per_batch / f64::from(rate)));
        Self {
            period,
            next: Instant::now(),
        }
    }

    fn wait(&mut self) {
        let Some(period) = self.period else { return };
        let now = Instant::now();
        if now < self.next {
            std::thread::sleep(self.next - now);
        } else if now - self.next > CATCH_UP_MAX {
            self.next = now;
        }
        self.next += period;
    }
}

const POPULATE_BATCH: usize = 128 << 10; // 128 KiB, half of what a connection buffers
/// Sleeping is inexact; what it costs within this is made up for.
const CATCH_UP_MAX: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hot_key_belongs_to_one_connection() {
        for (hot, connections) in [(16_384, 4), (7, 4), (3, 4), (1, 1)] {
            let own: usize = (0..connections)
                .map(|i| Account::new(hot, connections, i).sent.len())
                .sum();
            assert_eq!(own, hot as usize);
        }
    }

    #[test]
    fn a_value_tells_its_version() {
        let dataset = Dataset::first_row(64 << 20);
        let mut value = Vec::new();
        dataset.value(17, 3, &mut value);
        assert_eq!(value.len(), 4096);
        assert_eq!(Dataset::version_in(&value), Some(3));
        assert_eq!(&dataset.key(17), b"k:00000017");
    }
}
