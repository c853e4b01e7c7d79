//! What is moved in a cell, with the clients that use it all the time.
//!
//! Memory is always filled, with contents of which the compressibility is printed: zero pages that
//! nobody has touched would make any mover look fast.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::clients::{Browser, Pinger, Setter, Stepper, VALUE_BYTES, Viewer};
use super::crowd::{Client, Crowd, Pace, Seen};
use super::ycsb::Ycsb;
use crate::app::{numpy, state};
use crate::client::load::Dataset;
use crate::client::resp::Connection;
use crate::client::writer;
use crate::content::Content;
use crate::lab::Lab;
use crate::lab::inside::in_network;
use crate::mover::runc_checkpoint::{hold_network, network_path};
use crate::workload::contained::{Plan, Runtime};
use crate::workload::whose::Whose;
use crate::workload::{Workload, WorkloadPlan, nginx, redis};
use crate::writer::PORT as WRITER_PORT;
use crate::writer::options::{Options, Pattern};

/// How a workload is packed, which decides who can move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// A tree of processes.
    Bare,
    /// Redis as a tree of processes, with an append-only file on storage that both nodes have.
    AppendOnly,
    /// A container of somebody's.
    Container(Whose),
    /// A container of runc in a network namespace that others have made.
    RuncJoined,
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
    /// A writer that sends frames.
    Stream {
        viewers: u32,
        frames_per_second: u32,
    },
    Memcached {
        clients: u64,
        /// Of each client.
        keys: usize,
        per_second: u32,
    },
    Nginx {
        clients: u64,
        per_second: u32,
    },
    Numpy,
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
        matches!(self.what, What::Memcached { .. } | What::Numpy)
    }

    /// Whether it can be had packed like this.
    pub fn packs(&self, packing: Packing) -> bool {
        match packing {
            Packing::Bare => true,
            Packing::AppendOnly => self.is_redis(),
            Packing::Container(_) | Packing::RuncJoined => {
                matches!(self.what, What::Redis { .. } | What::Writer { .. })
            }
        }
    }

    /// Starts it at a node, fills it, and starts its clients, which are answered when this returns.
    pub fn start(&self, lab: &mut Lab, at: &str, packing: Packing) -> Result<Subject> {
        match self.what {
            What::Redis { .. } => self.start_redis(lab, at, packing),
            What::Writer { .. } => self.start_writer(lab, at, packing),
            What::Stream { .. } => self.start_stream(lab, at),
            What::Memcached { .. } => self.start_memcached(lab, at),
            What::Nginx { .. } => self.start_nginx(lab, at),
            What::Numpy => start_numpy(lab, at),
        }
    }

    fn start_redis(&self, lab: &mut Lab, at: &str, packing: Packing) -> Result<Subject> {
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
            Packing::Bare => redis::start(lab, at, &redis::plan())?,
            Packing::AppendOnly => {
                let number = lab.workloads();
                redis::make_aof_folder(lab, number)?;
                redis::start(lab, at, &redis::aof_plan(number))?
            }
            Packing::Container(whose) => whose.start_redis(lab, at)?,
            Packing::RuncJoined => {
                let workload = start_joined(lab, at, Plan::redis())?;
                workload.wait_until_it_listens(lab, redis::PORT)?;
                workload
            }
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
        let one =
            |index| -> Box<dyn Client> { Box::new(Ycsb::new(address, dataset, (index, clients))) };
        let all = (0..clients).map(one).collect();
        let crowd = Crowd::start(&lab.client.net, all, Pace { per_second })?;
        Ok(Subject { workload, crowd })
    }

    fn start_writer(&self, lab: &mut Lab, at: &str, packing: Packing) -> Result<Subject> {
        let options = self.writer_options()?;
        let workload = match packing {
            Packing::Bare | Packing::AppendOnly => {
                let plan = crate::workload::writer::plan(&options);
                Workload::start(lab, at, &plan)?
            }
            Packing::Container(whose) => whose.start(lab, at, &writer_in_container(&options))?,
            Packing::RuncJoined => start_joined(lab, at, writer_in_container(&options))?,
        };
        drop(writer::connect(lab, &workload, &options)?);
        let target = SocketAddr::from((workload.link.address, WRITER_PORT));
        let one = |index| -> Box<dyn Client> { Box::new(Pinger::new(target, index == 0)) };
        crowd(
            lab,
            workload,
            ((0..PINGERS).map(one).collect(), PINGS_PER_SECOND),
        )
    }

    fn start_stream(&self, lab: &mut Lab, at: &str) -> Result<Subject> {
        let What::Stream {
            viewers,
            frames_per_second,
        } = self.what
        else {
            bail!("{} is no stream", self.name)
        };
        let mut options = Options::new(STREAM_BYTES);
        options.content = self.content;
        let (workload, client) = writer::start(lab, at, &options, |_| {})?;
        drop(client);
        let target = SocketAddr::from((workload.link.address, WRITER_PORT));
        let one = |index| -> Box<dyn Client> {
            Box::new(Viewer::new(target, frames_per_second, index == 0))
        };
        // They wait for what comes: the rate is the server's.
        let crowd = Crowd::start(
            &lab.client.net,
            (0..viewers).map(one).collect(),
            Pace { per_second: None },
        )?;
        Ok(Subject { workload, crowd })
    }

    fn start_memcached(&self, lab: &mut Lab, at: &str) -> Result<Subject> {
        let What::Memcached {
            clients,
            keys,
            per_second,
        } = self.what
        else {
            bail!("{} is not memcached", self.name)
        };
        let mebibytes = ((clients * (keys * VALUE_BYTES) as u64) >> 20) * 2 + 64;
        let arguments = [
            "/usr/bin/memcached",
            "-l",
            "0.0.0.0",
            "-U",
            "0",
            "-u",
            "root",
            "-m",
        ];
        let mut arguments = arguments.map(str::to_owned).to_vec();
        arguments.push(mebibytes.to_string());
        let plan = bare("memcached", arguments);
        let workload = Workload::start(lab, at, &plan)?;
        workload.wait_until_it_listens(lab, MEMCACHED_PORT)?;
        let target = SocketAddr::from((workload.link.address, MEMCACHED_PORT));
        let one = |number| -> Result<Box<dyn Client>> {
            let mut setter = Setter::new(target, number, keys);
            in_network(&lab.client.net, || {
                setter.connect()?;
                setter.fill()
            })??;
            Ok(Box::new(setter))
        };
        let all = (0..clients).map(one).collect::<Result<_>>()?;
        crowd(lab, workload, (all, per_second))
    }

    fn start_nginx(&self, lab: &mut Lab, at: &str) -> Result<Subject> {
        let What::Nginx {
            clients,
            per_second,
        } = self.what
        else {
            bail!("{} is not nginx", self.name)
        };
        let workload = nginx::start(lab, at)?;
        let target = SocketAddr::from((workload.link.address, nginx::PORT));
        let one = |index| -> Box<dyn Client> { Box::new(Browser::new(target, index)) };
        crowd(lab, workload, ((0..clients).map(one).collect(), per_second))
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
            What::Memcached { clients, keys, .. } => clients * (keys * VALUE_BYTES) as u64,
            What::Stream { .. } => STREAM_BYTES as u64,
            What::Nginx { .. } => 16 << 20,
            What::Numpy => 64 << 20,
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
        redis::remove_aof_folder(lab, self.workload.number)?;
        seen
    }
}

fn bare(name: &str, arguments: Vec<String>) -> WorkloadPlan {
    WorkloadPlan {
        name: name.to_owned(),
        arguments,
        own_pid_mnt: false,
        uid: None,
    }
}

fn crowd(
    lab: &Lab,
    workload: Workload,
    (clients, per_second): (Vec<Box<dyn Client>>, u32),
) -> Result<Subject> {
    let pace = Pace {
        per_second: Some(per_second),
    };
    let crowd = Crowd::start(&lab.client.net, clients, pace)?;
    Ok(Subject { workload, crowd })
}

fn start_numpy(lab: &mut Lab, at: &str) -> Result<Subject> {
    let workload = Workload::start(lab, at, &numpy::plan())?;
    workload.wait_until_it_listens(lab, state::PORT)?;
    let target = SocketAddr::from((workload.link.address, state::PORT));
    let all: Vec<Box<dyn Client>> = vec![Box::new(Stepper::new(target))];
    crowd(lab, workload, (all, STEP_QUESTIONS_PER_SECOND))
}

/// Everything that it needs is in memory: its root file system can be read-only, and need not move.
fn writer_in_container(options: &Options) -> Plan {
    Plan {
        writes: false,
        ..Plan::writer(options)
    }
}

/// A container of runc whose network namespace is there before it.
fn start_joined(lab: &mut Lab, at: &str, mut plan: Plan) -> Result<Workload> {
    let path = network_path(hold_network(lab.node(at)?)?);
    let own = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let joined = json!({ "type": "network", "path": path });
    let spaces: Vec<_> = own.into_iter().chain([joined]).collect();
    plan.changes.push(("/linux/namespaces", spaces.into()));
    Whose::Runtime(Runtime::Runc).start(lab, at, &plan)
}

const STREAM_BYTES: usize = 64 << 20;
const MEMCACHED_PORT: u16 = 11_211;
const STEP_QUESTIONS_PER_SECOND: u32 = 500;
/// Each asks once in 2 ms.
const PINGERS: u32 = 4;
const PINGS_PER_SECOND: u32 = 2_000;
const SAMPLE_BYTES: usize = 1 << 20;
const SAMPLE_PAGE: usize = 4096;
/// How long fills of what has moved may take.
pub const SETTLE_TIME_MAX: Duration = Duration::from_secs(600);
