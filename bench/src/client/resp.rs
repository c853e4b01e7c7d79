//! A Redis connection that is never repaired: any fault on it is somebody's finding.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::inside::in_network;
use crate::workload::redis;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
    /// Commands not flushed yet.
    pending: Vec<u8>,
}

/// What Redis answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
}

impl Connection {
    /// Connects from inside a network namespace.
    pub fn open(net: impl AsFd, address: Ipv4Addr) -> Result<Self> {
        in_network(net, || Self::open_here(address, ANSWER_TIME_MAX))?
    }

    /// Connects from the network of this thread.
    pub fn open_here(address: Ipv4Addr, time_max: Duration) -> Result<Self> {
        let target = SocketAddr::from((address, redis::PORT));
        let stream = TcpStream::connect_timeout(&target, time_max)
            .with_context(|| format!("connecting to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        let reader = BufReader::with_capacity(BUFFER, stream.try_clone()?);
        Ok(Self {
            reader,
            writer: stream,
            pending: Vec::with_capacity(BUFFER),
        })
    }

    /// Queues a command.
    pub fn queue(&mut self, words: &[&[u8]]) {
        let pending = &mut self.pending;
        // Writing to a vector cannot fail.
        let _ = write!(pending, "*{}\r\n", words.len());
        for word in words {
            let _ = write!(pending, "${}\r\n", word.len());
            pending.extend_from_slice(word);
            pending.extend_from_slice(b"\r\n");
        }
    }

    /// Sends what is queued.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// How many bytes are queued.
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// The next answer.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "connection closed",
            ));
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or_else(|| bad_reply(line))?;
        match kind {
            "+" => Ok(Reply::Simple(rest.to_owned())),
            "-" => Ok(Reply::Error(rest.to_owned())),
            ":" => rest
                .parse()
                .map(Reply::Integer)
                .map_err(|_| bad_reply(line)),
            "$" if rest == "-1" => Ok(Reply::Nil),
            "$" => {
                let length: usize = rest.parse().map_err(|_| bad_reply(line))?;
                if length > BULK_MAX {
                    return Err(bad_reply(line));
                }
                let mut bulk = vec![0; length + 2];
                self.reader.read_exact(&mut bulk)?;
                bulk.truncate(length);
                Ok(Reply::Bulk(bulk))
            }
            _ => Err(bad_reply(line)),
        }
    }

    /// One command and its answer.
    pub fn call(&mut self, words: &[&[u8]]) -> io::Result<Reply> {
        self.queue(words);
        self.flush()?;
        self.receive()
    }
}

fn bad_reply(line: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("not a Redis reply: {line:?}"),
    )
}

/// Far above any outage that a move may cause: silence for longer is a broken connection.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
const BUFFER: usize = 256 << 10; // 256 KiB
/// No value of the lab is near it; a longer one is a reply misread.
const BULK_MAX: usize = 1 << 20; // 1 MiB
