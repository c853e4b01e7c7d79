//! Stock CRIU with its page server: pages go from the dump straight to the target, where
//! `criu page-server` writes them; the other images are copied after it.
//!
//! With `pre_dumps` it is CRIU's own pre-copy: rounds of `criu pre-dump` come before the dump, each
//! on top of the one before. That needs CRIU's memory tracking, which is the kernel's soft-dirty
//! bits.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::child::{start_quiet, wait_for};
use super::criu::{Ends, Passage, finish_criu, has_feature, number_of};
use super::images::{self, FOLDER, Receiver};
use super::outcome::Outcome;
use super::{Mover, Order};
use crate::lab::Lab;

/// Moves by `criu dump --page-server` and `criu restore`.
#[derive(Clone, Copy, Debug)]
pub struct CriuPageServer {
    /// How many rounds come before the dump.
    pub pre_dumps: u32,
}

impl Mover for CriuPageServer {
    fn name(&self) -> &'static str {
        match self.pre_dumps {
            0 => "criu-page-server",
            _ => "criu-pre-copy",
        }
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn unfit(&self, lab: &Lab) -> Result<Option<String>> {
        let node = lab.nodes.first().context("a lab has at least one node")?;
        if self.pre_dumps == 0 || has_feature(node, "mem_dirty_track")? {
            return Ok(None);
        }
        let why = "CRIU's pre-dump needs soft-dirty bits, and this kernel has none \
                   (CONFIG_MEM_SOFT_DIRTY)";
        Ok(Some(why.to_owned()))
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let mut passage = Passage::begin(lab, order)?;
        for round in 0..self.pre_dumps {
            self.pre_dump(&passage, round)?;
        }
        let receiver = Receiver::start(passage.target, FOLDER)?;
        let earlier = format!("../{}", folder_name(self.pre_dumps.saturating_sub(1)));
        let track = ["--track-mem", "--prev-images-dir", &earlier];
        let track = if self.pre_dumps == 0 { &[] } else { &track[..] };
        let (mut server, near) = serve(&passage, FOLDER, track)?;
        passage.close()?;
        if let Err(error) = dump(&passage, &near, track) {
            let _ = server.kill();
            let _ = server.wait();
            return passage.give_up("criu-dump", &error);
        }
        let complete = wait_for(&mut server, "criu page-server", SERVER_TIME_MAX)?;
        finish_criu(lab, passage.target, "page-server", complete)?;
        let dumped = Instant::now();
        let wire_bytes = receiver.take(passage.source, passage.target, FOLDER)?;
        let copied = Instant::now();
        passage.restore(&[])?;
        let ends = Ends {
            dumped,
            copied,
            restored: Instant::now(),
        };
        let mode = if self.pre_dumps == 0 {
            "page-server"
        } else {
            "pre-copy"
        };
        Ok(Outcome::moved(passage.open(mode, wire_bytes, &ends)?))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

impl CriuPageServer {
    /// One round, while the workload runs.
    fn pre_dump(&self, passage: &Passage<'_>, round: u32) -> Result<()> {
        let folder = format!("{}/../{}", FOLDER, folder_name(round));
        for node in [passage.source, passage.target] {
            node.command("sh")?
                .args(["-ec", &format!("rm -rf {folder} && mkdir {folder}")])
                .run()?;
        }
        let earlier = format!("../{}", folder_name(round.saturating_sub(1)));
        let track = match round {
            0 => vec![],
            _ => vec!["--prev-images-dir", &earlier],
        };
        let (mut server, near) = serve(passage, &folder, &track)?;
        let pid = passage.order.workload.pid;
        let mut command = passage.source.command_beside(pid, "criu")?;
        let path = command.inherit(&near)?;
        let command = command
            .args(["pre-dump", "-t", &pid.to_string(), "--images-dir", &folder])
            .args([
                "--track-mem",
                "--page-server",
                "--ps-socket",
                number_of(&path)?,
            ])
            .args(["-o", "pre-dump.log", "-v3", "--tcp-established"])
            .args(&track);
        command.run().context("criu pre-dump")?;
        drop(near);
        let complete = wait_for(&mut server, "criu page-server", SERVER_TIME_MAX)?;
        ensure!(complete, "criu page-server failed in pre-dump {round}");
        Ok(())
    }
}

/// Starts a page server at the target for one dump; the other end of its connection.
fn serve(
    passage: &Passage<'_>,
    folder: &str,
    track: &[&str],
) -> Result<(Child, std::net::TcpStream)> {
    let (near, far) = passage.connect(PORT)?;
    let mut command = passage.target.command("criu")?;
    let path = command.inherit(&far)?;
    let command = command
        .args(["page-server", "--ps-socket", number_of(&path)?])
        .args(["--images-dir", folder, "-o", "page-server.log", "-v3"])
        .args(track);
    Ok((start_quiet(command)?, near))
}

fn dump(passage: &Passage<'_>, near: &std::net::TcpStream, track: &[&str]) -> Result<()> {
    let mut command = passage.dump_command(track)?;
    let path = command.inherit(near)?;
    let command = command.args(["--page-server", "--ps-socket", number_of(&path)?]);
    let success = command.output()?.status.success();
    finish_criu(passage.lab, passage.source, "dump", success)
}

fn folder_name(round: u32) -> String {
    let name = images::FOLDER.rsplit('/').next().unwrap_or_default();
    format!("{name}-{round}")
}

const PORT: u16 = 7442;
/// It ends when the dump has said that all is sent.
const SERVER_TIME_MAX: Duration = Duration::from_secs(60);
