//! memcached under writes: every acknowledged value is read back.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::user::Home;
use super::{App, Proof, Seen};
use crate::client::lines::Wire;
use crate::client::steady::{Asker, Steady};
use crate::content::{Content, Generator, seed_of};
use crate::lab::Lab;
use crate::workload::{Workload, WorkloadPlan};

/// memcached and who writes to it.
#[derive(Debug)]
struct Memcached {
    workload: Workload,
    load: Steady<Writer>,
}

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let user = Home::make(lab, "memcached", "memcache")?;
    let arguments = [
        "/usr/bin/memcached",
        "-l",
        "0.0.0.0",
        "-U",
        "0",
        "-m",
        MEMORY_MIB,
    ];
    let plan = WorkloadPlan {
        name: "memcached".to_owned(),
        arguments: arguments.map(str::to_owned).to_vec(),
        own_pid_mnt: false,
        uid: Some(user.uid),
    };
    let workload = Workload::start(lab, node, &plan)?;
    workload.wait_until_it_listens(lab, PORT)?;
    let target = SocketAddr::from((workload.link.address, PORT));
    let writer = |number| -> Result<Writer> {
        Ok(Writer {
            wire: Wire::open(&lab.client.net, target)?,
            number,
            generator: Generator(number + 1),
            acknowledged: vec![0; KEYS],
        })
    };
    let writers = (0..CLIENTS).map(writer).collect::<Result<Vec<_>>>()?;
    let load = Steady::start(writers, PERIOD)?;
    Ok(Box::new(Memcached { workload, load }))
}

impl App for Memcached {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, _: &Lab) -> Result<()> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        self.load.mark();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        Ok(self.load.window().into())
    }

    fn prove(self: Box<Self>, _: &Lab) -> Result<Proof> {
        let (writers, mut wrong) = self.load.finish();
        let (mut writes, mut read) = (0, 0);
        for mut writer in writers {
            for key in 0..KEYS {
                writes += u64::from(writer.acknowledged[key]);
                if let Some(reason) = writer.judge(key)? {
                    wrong.push(reason);
                }
                read += usize::from(writer.acknowledged[key] > 0);
            }
        }
        wrong.truncate(super::WRONG_MAX);
        Ok(Proof {
            text: format!("{writes} sets acknowledged, the last of each of {read} keys read back"),
            wrong,
        })
    }
}

/// A connection that writes keys of its own.
#[derive(Debug)]
struct Writer {
    wire: Wire,
    number: u64,
    generator: Generator,
    /// By key, how often it was written.
    acknowledged: Vec<u32>,
}

impl Asker for Writer {
    fn ask(&mut self) -> Result<()> {
        let key = self.generator.below(KEYS as u64) as usize;
        let version = self.acknowledged[key] + 1;
        let mut command = format!("set {} 0 0 {VALUE_BYTES}\r\n", self.name(key)).into_bytes();
        command.extend(self.value(key, version));
        command.extend(b"\r\n");
        let answer = self.wire.ask(&command)?;
        ensure!(answer == "STORED", "set was answered {answer:?}");
        self.acknowledged[key] = version;
        Ok(())
    }
}

impl Writer {
    fn name(&self, key: usize) -> String {
        format!("{}-{key}", self.number)
    }

    fn value(&self, key: usize, version: u32) -> Vec<u8> {
        let mut value = vec![0; VALUE_BYTES];
        let key = (self.number * KEYS as u64) + key as u64;
        Content::Random.fill(seed_of(key, version.into()), &mut value);
        value
    }

    /// What is wrong with the value of a key.
    fn judge(&mut self, key: usize) -> Result<Option<String>> {
        let version = self.acknowledged[key];
        let name = self.name(key);
        let head = self.wire.ask(format!("get {name}\r\n").as_bytes())?;
        if head == "END" {
            let lost = version > 0;
            return Ok(lost.then(|| format!("key {name} is gone after {version} writes")));
        }
        let bytes = head
            .rsplit_once(' ')
            .and_then(|(_, bytes)| bytes.parse().ok());
        let bytes: usize = bytes.with_context(|| format!("get was answered {head:?}"))?;
        ensure!(bytes <= 2 * VALUE_BYTES, "key {name} has {bytes} bytes");
        let value = self.wire.bytes(bytes)?;
        self.wire.line()?;
        let end = self.wire.line()?;
        ensure!(end == "END", "get ended with {end:?}");
        let right = version > 0 && value == self.value(key, version);
        Ok((!right).then(|| format!("key {name} has not the value of write {version}")))
    }
}

const PORT: u16 = 11_211;
/// More than the values need: nothing is evicted.
const MEMORY_MIB: &str = "256";
const CLIENTS: u64 = 4;
/// Of each client.
const KEYS: usize = 4096;
const VALUE_BYTES: usize = 4096;
const PERIOD: Duration = Duration::from_millis(1);
/// A quarter of a second.
const ANSWERS_AROUND: u64 = 250;
