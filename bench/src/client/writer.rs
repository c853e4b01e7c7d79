//! The client of the self-checking writer: asks how it is, and never connects again.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::lab::Lab;
use crate::lab::inside::in_network;
use crate::workload::{Workload, WorkloadPlan, writer};
use crate::writer::PORT;
use crate::writer::options::Options;

/// Starts a writer at a node and waits until it has its memory and answers.
pub fn start(
    lab: &mut Lab,
    node: &str,
    options: &Options,
    change: impl FnOnce(&mut WorkloadPlan),
) -> Result<(Workload, WriterClient)> {
    let mut plan = writer::plan(options);
    change(&mut plan);
    let workload = Workload::start(lab, node, &plan)?;
    let client = connect(lab, &workload, options)?;
    Ok((workload, client))
}

/// Waits until a writer that was started has its memory and answers.
pub fn connect(lab: &Lab, workload: &Workload, options: &Options) -> Result<WriterClient> {
    let gib = options.memory >> 30;
    let time_max = START_TIME_MAX + START_TIME_PER_GIB * u32::try_from(gib).unwrap_or(u32::MAX);
    WriterClient::connect(&lab.client.net, workload, time_max)
}

/// One connection to a writer.
#[derive(Debug)]
pub struct WriterClient {
    reader: BufReader<TcpStream>,
    /// Counters seen last: they never go back, unless the workload did.
    ticks: u64,
    dirtied: u64,
}

impl WriterClient {
    /// Connects from inside a network namespace, waiting until the writer is ready.
    pub fn connect(net: impl AsFd, workload: &Workload, time_max: Duration) -> Result<Self> {
        Self::connect_to(net, workload.link.address, time_max)
    }

    /// The same of one at an address.
    pub fn connect_to(net: impl AsFd, address: Ipv4Addr, time_max: Duration) -> Result<Self> {
        let target = SocketAddr::from((address, PORT));
        let deadline = Instant::now() + time_max;
        let stream = loop {
            match in_network(&net, || {
                TcpStream::connect_timeout(&target, CONNECT_TIME_MAX)
            })? {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("the writer does not come up");
                }
                Err(_) => std::thread::sleep(CONNECT_POLL),
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(time_max.max(super::resp::ANSWER_TIME_MAX)))?;
        Ok(Self {
            reader: BufReader::new(stream),
            ticks: 0,
            dirtied: 0,
        })
    }

    /// One question and its answer.
    pub fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.reader.get_mut(), "{question}").context("asking the writer")?;
        let mut line = String::new();
        let count = self
            .reader
            .read_line(&mut line)
            .context("hearing the writer")?;
        ensure!(count > 0, "the writer closed the connection");
        let line = line.trim_end();
        if let Some(mismatch) = line.strip_prefix("mismatch ") {
            bail!("the writer found its memory wrong: {mismatch}");
        }
        Ok(line.to_owned())
    }

    /// Has everything checked, and checks itself that no time was lost.
    pub fn verify(&mut self) -> Result<u64> {
        let status = self.status()?;
        let count = |name: &str| status.get(name).and_then(|n| n.parse::<u64>().ok());
        let (ticks, dirtied) = (count("ticks").unwrap_or(0), count("dirtied").unwrap_or(0));
        ensure!(
            ticks >= self.ticks && dirtied >= self.dirtied,
            "the writer went back in time: {} ticks after {}",
            ticks,
            self.ticks
        );
        (self.ticks, self.dirtied) = (ticks, dirtied);
        let answer = self.ask("verify")?;
        let pages = answer
            .strip_prefix("ok verified=")
            .and_then(|pages| pages.parse().ok());
        pages.with_context(|| format!("the writer answered {answer:?} to verify"))
    }

    /// Its counters by name.
    pub fn status(&mut self) -> Result<HashMap<String, String>> {
        let answer = self.ask("status")?;
        let words = answer.split(' ').filter_map(|word| word.split_once('='));
        Ok(words
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect())
    }

    pub fn set_rate(&mut self, pages_per_second: u32) -> Result<()> {
        let answer = self.ask(&format!("rate {pages_per_second}"))?;
        ensure!(answer == "ok", "the writer answered {answer:?} to rate");
        Ok(())
    }
}

const START_TIME_MAX: Duration = Duration::from_secs(20);
/// A virtual machine touches memory for the first time at some 0.4 GB/s.
const START_TIME_PER_GIB: Duration = Duration::from_secs(10);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(1);
const CONNECT_POLL: Duration = Duration::from_millis(20);
