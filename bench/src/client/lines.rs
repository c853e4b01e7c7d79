//! A conversation in lines: over a connection, or with a program that speaks for us.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::resp::ANSWER_TIME_MAX;
use crate::lab::inside::{Inside, in_network};

/// One conversation, never begun anew.
#[derive(Debug)]
pub struct Lines<R: Read, W> {
    reader: BufReader<R>,
    writer: W,
    /// The program, which ends with the conversation.
    program: Option<Child>,
}

/// Over a connection.
pub type Wire = Lines<TcpStream, TcpStream>;
/// With a program.
pub type Program = Lines<ChildStdout, ChildStdin>;

impl Wire {
    /// Connects from inside a network namespace.
    pub fn open(net: impl AsFd, target: SocketAddr) -> Result<Self> {
        in_network(net, || Self::open_here(target, ANSWER_TIME_MAX))?
    }

    /// Connects from the network of this thread.
    pub fn open_here(target: SocketAddr, time_max: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, time_max)
            .with_context(|| format!("connecting to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        Ok(Self {
            reader: BufReader::new(stream.try_clone()?),
            writer: stream,
            program: None,
        })
    }
}

impl Program {
    /// Starts a program that answers on its standard output what it hears on its input.
    pub fn start(command: Inside) -> Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = command.stderr(Stdio::null()).spawn()?;
        let asked = "was just asked to be a pipe";
        Ok(Self {
            reader: BufReader::new(program.stdout.take().expect(asked)),
            writer: program.stdin.take().expect(asked),
            program: Some(program),
        })
    }
}

impl<R: Read + AsFd, W: Write> Lines<R, W> {
    /// Says `text` and returns the next line, without its end.
    pub fn ask(&mut self, text: &[u8]) -> Result<String> {
        self.writer.write_all(text).context("asking")?;
        self.writer.flush().context("asking")?;
        self.line()
    }

    /// The next line, without its end.
    pub fn line(&mut self) -> Result<String> {
        self.wait()?;
        let mut line = String::new();
        let bytes = self.reader.read_line(&mut line).context("hearing")?;
        ensure!(bytes > 0, "the conversation has ended");
        line.truncate(line.trim_end().len());
        Ok(line)
    }

    /// The next bytes.
    pub fn bytes(&mut self, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes).context("hearing")?;
        Ok(bytes)
    }

    /// Until there is something to read: programs and connections may stay silent for ever.
    fn wait(&mut self) -> Result<()> {
        if !self.reader.buffer().is_empty() {
            return Ok(());
        }
        let mut wanted = [PollFd::new(
            self.reader.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        let millis = u16::try_from(ANSWER_TIME_MAX.as_millis()).unwrap_or(u16::MAX);
        let ready = poll(&mut wanted, PollTimeout::from(millis)).context("waiting")?;
        ensure!(ready > 0, "no answer within {ANSWER_TIME_MAX:?}");
        Ok(())
    }
}

impl<R: Read, W> Drop for Lines<R, W> {
    fn drop(&mut self) {
        if let Some(program) = &mut self.program {
            // It would end by itself when it hears no more; nobody waits for its last words.
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}
