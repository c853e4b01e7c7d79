//! The clients of workloads that are not Redis.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};

use super::crowd::{CONNECT_TIME_MAX, Client};
use crate::app::numpy;
use crate::app::state::numbers;
use crate::client::lines::Wire;
use crate::client::resp::ANSWER_TIME_MAX;
use crate::content::{Content, Generator, seed_of};
use crate::workload::nginx;

/// A client of the self-checking writer: the first of them has all memory checked in the end.
#[derive(Debug)]
pub struct Pinger {
    target: SocketAddr,
    judges: bool,
    wire: Option<Wire>,
}

impl Pinger {
    pub fn new(target: SocketAddr, judges: bool) -> Self {
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
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let answer = wire.ask(b"ping\n")?;
        // After a mismatch it says nothing else; the judge quotes it.
        let is_one = answer == "pong" || answer.starts_with("mismatch");
        ensure!(is_one, "{answer:?} for a ping");
        Ok(())
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        if !self.judges {
            return Ok(Vec::new());
        }
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let answer = wire.ask(b"verify\n")?;
        let right = answer.starts_with("ok verified=");
        Ok(if right { Vec::new() } else { vec![answer] })
    }
}

/// Who is sent frames at a constant rate by the self-checking writer: an answer is a frame.
#[derive(Debug)]
pub struct Viewer {
    target: SocketAddr,
    frames_per_second: u32,
    judges: bool,
    wire: Option<Wire>,
    /// Of the last frame.
    number: u64,
    wrong: Vec<String>,
}

impl Viewer {
    pub fn new(target: SocketAddr, frames_per_second: u32, judges: bool) -> Self {
        Self {
            target,
            frames_per_second,
            judges,
            wire: None,
            number: 0,
            wrong: Vec::new(),
        }
    }
}

impl Client for Viewer {
    fn connect(&mut self) -> Result<()> {
        self.wire = None;
        let mut wire = Wire::open_here(self.target, CONNECT_TIME_MAX)?;
        let rate = self.frames_per_second;
        self.number = frame_number(&wire.ask(format!("stream {rate}\n").as_bytes())?)?;
        self.wire = Some(wire);
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let number = frame_number(&wire.line()?)?;
        let wanted = self.number + 1;
        if number != wanted && self.wrong.len() < WRONG_MAX {
            self.wrong
                .push(format!("frame {number} came, not {wanted}"));
        }
        self.number = number;
        Ok(())
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        self.wire = None;
        let mut wrong = std::mem::take(&mut self.wrong);
        let mut pinger = Pinger::new(self.target, self.judges);
        pinger.connect()?;
        wrong.extend(pinger.judge()?);
        Ok(wrong)
    }
}

fn frame_number(line: &str) -> Result<u64> {
    let number = line
        .strip_prefix("frame ")
        .and_then(|rest| rest.split(' ').next());
    let number = number.and_then(|number| number.parse().ok());
    number.with_context(|| format!("not a frame: {line:?}"))
}

/// A client of the program that changes arrays of numpy: how many steps has it done?
#[derive(Debug)]
pub struct Stepper {
    target: SocketAddr,
    wire: Option<Wire>,
    steps: u64,
    wrong: Vec<String>,
}

impl Stepper {
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            wire: None,
            steps: 0,
            wrong: Vec::new(),
        }
    }
}

impl Client for Stepper {
    fn connect(&mut self) -> Result<()> {
        self.wire = None;
        self.wire = Some(Wire::open_here(self.target, CONNECT_TIME_MAX)?);
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let [steps, _] = numbers(&wire.ask(b"state\n")?)?;
        if steps < self.steps && self.wrong.is_empty() {
            let earlier = self.steps;
            self.wrong.push(format!(
                "it went back in time: {steps} steps after {earlier}"
            ));
        }
        self.steps = steps;
        Ok(())
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let [steps, carried, held] = numbers(&wire.ask(b"verify\n")?)?;
        let right = numpy::replay(steps);
        if (carried, held) != (right, right) {
            let text = format!("checksums {carried:016x}, {held:016x} after {steps} steps");
            self.wrong.push(format!("{text}, not {right:016x}"));
        }
        Ok(std::mem::take(&mut self.wrong))
    }
}

/// A client of memcached that sets keys of its own.
#[derive(Debug)]
pub struct Setter {
    target: SocketAddr,
    number: u64,
    wire: Option<Wire>,
    generator: Generator,
    /// By key, how often it was sent and acknowledged.
    sent: Vec<u32>,
    acknowledged: Vec<u32>,
}

impl Setter {
    /// Client `number`, with so many keys.
    pub fn new(target: SocketAddr, number: u64, keys: usize) -> Self {
        Self {
            target,
            number,
            wire: None,
            generator: Generator(number + 1),
            sent: vec![0; keys],
            acknowledged: vec![0; keys],
        }
    }

    /// Sets every key once.
    pub fn fill(&mut self) -> Result<()> {
        (0..self.sent.len()).try_for_each(|key| self.set(key))
    }

    fn set(&mut self, key: usize) -> Result<()> {
        let version = self.sent[key] + 1;
        self.sent[key] = version;
        let name = self.name(key);
        let mut command = format!("set {name} 0 0 {VALUE_BYTES}\r\n").into_bytes();
        command.extend(self.value(key, version));
        command.extend(b"\r\n");
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let answer = wire.ask(&command)?;
        ensure!(answer == "STORED", "set was answered {answer:?}");
        self.acknowledged[key] = version;
        Ok(())
    }

    fn name(&self, key: usize) -> String {
        format!("{}-{key}", self.number)
    }

    fn value(&self, key: usize, version: u32) -> Vec<u8> {
        let mut value = vec![0; VALUE_BYTES];
        let key = (self.number << 32) + key as u64;
        Content::Random.fill(seed_of(key, version.into()), &mut value);
        value
    }

    fn get(&mut self, key: usize) -> Result<Option<Vec<u8>>> {
        let name = self.name(key);
        let wire = self.wire.as_mut().context(NOT_CONNECTED)?;
        let head = wire.ask(format!("get {name}\r\n").as_bytes())?;
        if head == "END" {
            return Ok(None);
        }
        let bytes = head
            .rsplit_once(' ')
            .and_then(|(_, bytes)| bytes.parse().ok());
        let bytes: usize = bytes.with_context(|| format!("get was answered {head:?}"))?;
        ensure!(bytes <= 2 * VALUE_BYTES, "key {name} has {bytes} bytes");
        let value = wire.bytes(bytes)?;
        wire.line()?;
        let end = wire.line()?;
        ensure!(end == "END", "get ended with {end:?}");
        Ok(Some(value))
    }
}

impl Client for Setter {
    fn connect(&mut self) -> Result<()> {
        self.wire = None;
        self.wire = Some(Wire::open_here(self.target, CONNECT_TIME_MAX)?);
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let key = self.generator.below(self.sent.len() as u64) as usize;
        self.set(key)
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for key in 0..self.sent.len() {
            let found = self.get(key)?;
            // What a connection that broke has left open may be there, or not.
            let mut versions = self.acknowledged[key]..=self.sent[key];
            let right = versions.any(|version| found == Some(self.value(key, version)));
            if !right && wrong.len() < WRONG_MAX {
                let name = self.name(key);
                let version = self.acknowledged[key];
                wrong.push(format!("key {name} has not the value of write {version}"));
            }
        }
        Ok(wrong)
    }
}

/// A client of a web server: a connection for each request, and every byte of the answer compared.
#[derive(Debug)]
pub struct Browser {
    target: SocketAddr,
    number: u64,
    wrong: Vec<String>,
}

impl Browser {
    /// Client `index`; its requests have numbers that no other's have.
    pub fn new(target: SocketAddr, index: u64) -> Self {
        Self {
            target,
            number: index << 32,
            wrong: Vec::new(),
        }
    }
}

impl Client for Browser {
    fn connect(&mut self) -> Result<()> {
        // With each request.
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        self.number += 1;
        let number = self.number;
        // A packet that was lost is sent again by the kernel, as for any browser.
        let mut stream = TcpStream::connect_timeout(&self.target, ANSWER_TIME_MAX)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        write!(stream, "GET /echo/{number} HTTP/1.0\r\nHost: lab\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        let text = String::from_utf8_lossy(&answer);
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body);
        ensure!(
            text.starts_with("HTTP/1.1 200 "),
            "an answer of {} bytes",
            answer.len()
        );
        if body != Some(&nginx::echo(number)) && self.wrong.len() < WRONG_MAX {
            self.wrong.push(format!(
                "request {number} was answered with another's bytes"
            ));
        }
        Ok(())
    }

    fn judge(&mut self) -> Result<Vec<String>> {
        Ok(std::mem::take(&mut self.wrong))
    }
}

const NOT_CONNECTED: &str = "not connected";
pub const VALUE_BYTES: usize = 4096;
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const WRONG_MAX: usize = 8;
