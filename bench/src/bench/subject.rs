//! What is moved in a cell, with the clients that use it all the time.
//!
//! Memory is always filled, with contents of which the compressibility is printed: zero pages that
//! nobody has touched would make any mover look fast.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::crowd::{CONNECT_TIME_MAX, Client, Crowd, Pace, Seen};
use super::ycsb::Ycsb;
use crate::client::lines::Wire;
use crate::client::load::Dataset;
use crate::client::resp::Connection;
use crate::client::writer;
use crate::content::Content;
use crate::lab::Lab;
use crate::workload::contained::Plan;
use crate::workload::whose::Whose;
use crate::workload::{Workload, WorkloadPlan, redis};
use crate::writer::PORT as WRITER_PORT;
use crate::writer::options::{Options, Pattern};

/// How a workload is packed, which decides who can move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// A tree of processes.
    Bare,
    /// A container of somebody's.
    Container(Whose),
}

/// One of the benchmark's workloads.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    pub summary: &'static str,
    /// How its memory's contents compress.
    pub content: Content,
    pub(super) what: What,
}

/// What runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    Redis {
        /// Of values.
        bytes: u64,
        value_bytes: usize,
        clients: u32,
        per_second: Option<u32>,
    },
    Writer {
        memory: usize,
        hot: usize,
        /// Pages per second.
        rate: u32,
        pattern: Pattern,
    },
}

/// A workload that runs, and its clients.
#[derive(Debug)]
pub struct Subject {
    pub workload: Workload,
    pub crowd: Crowd,
}

impl Kind {
    /// Whether it is Redis, whose own ways of moving then compete too.
    pub fn is_redis(&self) -> bool {
        matches!(self.what, What::Redis { .. })
    }

    /// Whether the nodes need more than their image for it.
    pub fn needs_layer(&self) -> bool {
        false
    }

    /// Whether it can be had packed like this.
    pub fn packs(&self, _: Packing) -> bool {
        true
    }

    /// Starts it at a node, fills it, and starts its clients, which are answered when this returns.
    pub fn start(&self, lab: &mut Lab, at: &str, packing: Packing) -> Result<Subject> {
        match self.what {
            What::Redis { .. } => self.start_redis(lab, at, (packing, &redis::plan())),
            What::Writer { .. } => self.start_writer(lab, at, packing),
        }
    }

    /// Redis, with these arguments if it is a bare tree.
    pub fn start_redis(
        &self,
        lab: &mut Lab,
        at: &str,
        (packing, plan): (Packing, &WorkloadPlan),
    ) -> Result<Subject> {
        let What::Redis {
            bytes,
            value_bytes,
            clients,
            per_second,
        } = self.what
        else {
            bail!("{} is not Redis", self.name)
        };
        let workload = match packing {
            Packing::Bare => redis::start(lab, at, plan)?,
            Packing::Container(whose) => whose.start_redis(lab, at)?,
        };
        let keys = u32::try_from(bytes / value_bytes as u64).context("too many keys")?;
        let dataset = Dataset {
            keys,
            hot_keys: keys,
            value_bytes,
            content: self.content,
        };
        let address = workload.link.address;
        dataset.populate(&mut Connection::open(&lab.client.net, address)?)?;
        let one = |index| -> Box<dyn Client> {
            Box::new(Ycsb::new(address, dataset, (index, clients)))
        };
        let all = (0..clients).map(one).collect();
        let crowd = Crowd::start(&lab.client.net, all, Pace { per_second })?;
        Ok(Subject { workload, crowd })
    }

    fn start_writer(&self, lab: &mut Lab, at: &str, packing: Packing) -> Result<Subject> {
        let options = self.writer_options()?;
        let workload = match packing {
            Packing::Bare => {
                let plan = crate::workload::writer::plan(&options);
                Workload::start(lab, at, &plan)?
            }
            Packing::Container(whose) => whose.start(lab, at, &Plan::writer(&options))?,
        };
        drop(writer::connect(lab, &workload, &options)?);
        let target = SocketAddr::from((workload.link.address, WRITER_PORT));
        let one = |index| -> Box<dyn Client> { Box::new(Pinger::new(target, index == 0)) };
        let all = (0..PINGERS).map(one).collect();
        let pace = Pace {
            per_second: Some(PINGS_PER_SECOND),
        };
        let crowd = Crowd::start(&lab.client.net, all, pace)?;
        Ok(Subject { workload, crowd })
    }

    fn writer_options(&self) -> Result<Options> {
        let What::Writer {
            memory,
            hot,
            rate,
            pattern,
        } = self.what
        else {
            bail!("{} is no writer", self.name)
        };
        let mut options = Options::new(memory);
        (options.hot, options.rate, options.pattern) = (hot, rate, pattern);
        options.content = self.content;
        Ok(options)
    }

    /// Bytes that it holds, before what its program needs besides.
    pub fn bytes(&self) -> u64 {
        match self.what {
            What::Redis { bytes, .. } => bytes,
            What::Writer { memory, .. } => memory as u64,
        }
    }

    /// How many times smaller LZ4 makes its contents.
    pub fn compression(&self) -> f64 {
        let mut sample = vec![0; SAMPLE_BYTES];
        for (number, page) in sample.chunks_mut(SAMPLE_PAGE).enumerate() {
            self.content.fill(number as u64 + 1, page);
        }
        let packed = lz4_flex::block::compress(&sample);
        SAMPLE_BYTES as f64 / packed.len() as f64
    }
}

impl Subject {
    /// Ends it, wherever it is: what clients saw.
    pub fn finish(self, lab: &Lab) -> Result<Seen> {
        let seen = self.crowd.finish();
        self.workload.kill(lab)?;
        seen
    }
}

/// A client of the self-checking writer: the first of them has all memory checked in the end.
#[derive(Debug)]
struct Pinger {
    target: SocketAddr,
    judges: bool,
    wire: Option<Wire>,
}

impl Pinger {
    fn new(target: SocketAddr, judges: bool) -> Self {
        Self {
            target,
            judges,
            wire: None,
        }
    }
}

impl Client for Pinger {
    fn connect(&mut self) -> Result<()> {
        self.wire = None;
        self.wire = Some(Wire::open_here(self.target, CONNECT_TIME_MAX)?);
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let wire = self.wire.as_mut().context("not connected")?;
        let answer = wire.ask(b"ping\n")?;
        // After a mismatch it says nothing else; the judge quotes it.
        ensure!(answer == "pong" || answer.starts_with("mismatch"), "{answer:?} for a ping");
        Ok(())
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        if !self.judges {
            return Ok(Vec::new());
        }
        let wire = self.wire.as_mut().context("not connected")?;
        let answer = wire.ask(b"verify\n")?;
        let right = answer.starts_with("ok verified=");
        Ok(if right { Vec::new() } else { vec![answer] })
    }
}

/// Each asks once in 2 ms.
const PINGERS: u32 = 4;
const PINGS_PER_SECOND: u32 = 2_000;
const SAMPLE_BYTES: usize = 1 << 20;
const SAMPLE_PAGE: usize = 4096;
/// How long fills of what has moved may take.
pub const SETTLE_TIME_MAX: Duration = Duration::from_secs(600);
