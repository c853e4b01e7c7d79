//! YCSB's workload A on Redis: half of the requests read a record, half update one, and which is
//! Zipf's distribution (0.99), scattered over the keys.
//!
//! A record is one value of 1,000 bytes, as with `fieldcount=1 fieldlength=1000`. As in [`Load`]
//! every key is updated by one client only, so that what was acknowledged last is known exactly: a
//! client that is given another's key updates the nearest of its own.
//!
//! [`Load`]: crate::client::load::Load

use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};

use super::crowd::{CONNECT_TIME_MAX, Client};
use crate::client::load::Dataset;
use crate::client::resp::{Connection, Reply};
use crate::content::{Generator, seed_of};

/// One client.
#[derive(Debug)]
pub struct Ycsb {
    address: Ipv4Addr,
    dataset: Dataset,
    index: u32,
    clients: u32,
    connection: Option<Connection>,
    generator: Generator,
    zipf: Zipf,
    /// Of its own keys.
    sent: Vec<u32>,
    acknowledged: Vec<u32>,
    /// What was answered and cannot be right.
    wrong: Vec<String>,
    value: Vec<u8>,
}

impl Ycsb {
    /// Client `index` of so many, of a Redis that has been filled.
    pub fn new(address: Ipv4Addr, dataset: Dataset, (index, clients): (u32, u32)) -> Self {
        let own = (dataset.keys + clients - 1 - index) / clients;
        Self {
            address,
            dataset,
            index,
            clients,
            connection: None,
            generator: Generator(u64::from(index) + 1),
            zipf: Zipf::new(dataset.keys.into()),
            sent: vec![0; own as usize],
            acknowledged: vec![0; own as usize],
            wrong: Vec::new(),
            value: Vec::new(),
        }
    }

    fn read(&mut self, key: u32) -> Result<()> {
        let reply = self.call(&[b"GET", &self.dataset.key(key)])?;
        let own = (key % self.clients == self.index).then(|| (key / self.clients) as usize);
        let Reply::Bulk(value) = reply else {
            self.note(format!("key {key} was answered {reply:?}"));
            return Ok(());
        };
        let version = Dataset::version_in(&value);
        if value.get(..4) != Some(&key.to_le_bytes()) {
            self.note(format!("key {key} has another's value"));
        } else if own.is_some_and(|own| version != Some(self.acknowledged[own])) {
            // A connection that broke leaves it open whether an update was taken.
            let own = own.unwrap_or_default();
            if self.sent[own] == self.acknowledged[own] {
                let right = self.acknowledged[own];
                self.note(format!("key {key} has version {version:?}, not {right}"));
            }
        }
        Ok(())
    }

    fn update(&mut self, key: u32) -> Result<()> {
        let own = (key / self.clients) as usize;
        let own = own.min(self.sent.len() - 1);
        let key = own as u32 * self.clients + self.index;
        let version = self.sent[own] + 1;
        self.sent[own] = version;
        let mut value = std::mem::take(&mut self.value);
        self.dataset.value(key, version, &mut value);
        let reply = self.call(&[b"SET", &self.dataset.key(key), &value]);
        self.value = value;
        match reply? {
            Reply::Simple(text) if text == "OK" => self.acknowledged[own] = version,
            // A replica that is not promoted yet refuses to write.
            reply => bail!("SET was answered {reply:?}"),
        }
        Ok(())
    }

    fn call(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let connection = self.connection.as_mut().context("not connected")?;
        match connection.call(words)? {
            Reply::Error(error) => bail!("Redis says {error}"),
            reply => Ok(reply),
        }
    }

    fn note(&mut self, what: String) {
        if self.wrong.len() < WRONG_MAX {
            self.wrong.push(what);
        }
    }

    /// What is wrong with a value of its own that was read back.
    fn judge_value(&self, own: usize, reply: &Reply, fill: &mut Vec<u8>) -> Option<String> {
        let key = own as u32 * self.clients + self.index;
        let Reply::Bulk(value) = reply else {
            return Some(format!("key {key} is gone: {reply:?}"));
        };
        let version = Dataset::version_in(value).unwrap_or(u32::MAX);
        let (acknowledged, sent) = (self.acknowledged[own], self.sent[own]);
        if version < acknowledged || sent < version {
            return Some(format!(
                "key {key} has version {version}, {acknowledged} was acknowledged"
            ));
        }
        self.dataset.value(key, version, fill);
        (fill != value).then(|| format!("key {key} has a value that was never sent"))
    }
}

impl Client for Ycsb {
    fn connect(&mut self) -> Result<()> {
        self.connection = None;
        let mut connection = Connection::open_here(self.address, CONNECT_TIME_MAX)?;
        // One that is still loading says so to everything.
        let reply = connection.call(&[b"PING"])?;
        let is_ready = reply == Reply::Simple("PONG".to_owned());
        ensure!(is_ready, "Redis is not ready: {reply:?}");
        self.connection = Some(connection);
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let key = u32::try_from(self.zipf.next(&mut self.generator)).unwrap_or_default();
        if self.generator.below(2) == 0 {
            self.read(key)
        } else {
            self.update(key)
        }
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        let mut fill = Vec::new();
        let mut connection = self.connection.take().context("not connected")?;
        let mut own = 0;
        while own < self.sent.len() {
            let last = self.sent.len().min(own + BATCH);
            for own in own..last {
                let key = own as u32 * self.clients + self.index;
                connection.queue(&[b"GET", &self.dataset.key(key)]);
            }
            connection.flush()?;
            for own in own..last {
                let reply = connection.receive()?;
                if let Some(wrong) = self.judge_value(own, &reply, &mut fill) {
                    self.note(wrong);
                }
            }
            own = last;
        }
        Ok(std::mem::take(&mut self.wrong))
    }
}

/// YCSB's scrambled Zipf: ranks by the method of Gray et al. ("Quickly generating billion-record
/// synthetic databases", 1994), and each rank scattered by a hash.
#[derive(Clone, Debug)]
pub struct Zipf {
    items: u64,
    zeta: f64,
    alpha: f64,
    eta: f64,
}

impl Zipf {
    pub fn new(items: u64) -> Self {
        let zeta = |count: u64| -> f64 { (1..=count).map(|rank| (rank as f64).powf(-THETA)).sum() };
        let (all, two) = (zeta(items), zeta(2));
        Self {
            items,
            zeta: all,
            alpha: 1.0 / (1.0 - THETA),
            eta: (1.0 - (2.0 / items as f64).powf(1.0 - THETA)) / (1.0 - two / all),
        }
    }

    /// An item.
    pub fn next(&self, generator: &mut Generator) -> u64 {
        seed_of(self.rank(generator), 0) % self.items
    }

    fn rank(&self, generator: &mut Generator) -> u64 {
        let uniform = generator.next_number() as f64 / u64::MAX as f64;
        let scaled = uniform * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(THETA) {
            return 1;
        }
        let spread = (self.eta * uniform - self.eta + 1.0).powf(self.alpha);
        let rank = (self.items as f64 * spread).max(0.0);
        // Not negative, so that nothing is lost but the fraction.
        #[expect(clippy::cast_sign_loss)]
        let rank = rank as u64;
        rank.min(self.items - 1)
    }
}

/// YCSB's.
const THETA: f64 = 0.99;
/// Answers of one batch fit the connection's and the kernel's buffers.
const BATCH: usize = 64;
const WRONG_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_items_are_asked_for_most_often() {
        let zipf = Zipf::new(10_000);
        let mut generator = Generator(1);
        let mut counts = vec![0_u32; 10_000];
        for _ in 0..100_000 {
            counts[zipf.rank(&mut generator) as usize] += 1;
        }
        // 1 / zeta(10,000) is 9.8 %.
        assert!((9_000..11_000).contains(&counts[0]), "{}", counts[0]);
        let top: u32 = counts[..1000].iter().sum();
        assert!((70_000..85_000).contains(&top), "{top}");
    }
}
