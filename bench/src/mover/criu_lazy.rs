//! Stock CRIU's post-copy: `criu dump --lazy-pages` keeps the memory and serves it, `criu
//! lazy-pages` at the target asks for it, page by page and then all of it.
//!
//! The page server in the dump can serve only where `fs.pipe-max-size` is 4 MiB or CRIU may exceed
//! it; the benchmark sees to that for the time of the move.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::child::{start_quiet, wait_for};
use super::criu::{COMMON, Ends, LargePipes, Passage, finish_criu, hear_ready, number_of};
use super::images::{FOLDER, Receiver};
use super::outcome::{Outcome, millis};
use super::{Mover, Order};
use crate::lab::Lab;

/// Moves by `criu dump --lazy-pages`, `criu lazy-pages` and `criu restore --lazy-pages`.
#[derive(Clone, Copy, Debug)]
pub struct CriuLazy;

impl Mover for CriuLazy {
    fn name(&self) -> &'static str {
        "criu-lazy"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let _pipes = LargePipes::allow()?;
        let mut passage = Passage::begin(lab, order)?;
        let receiver = Receiver::start(passage.target, FOLDER)?;
        let (near, far) = passage.connect(PORT)?;
        passage.close()?;
        let (mut dump, is_ready) = start_dump(&passage, near)?;
        if !is_ready {
            let success = wait_for(&mut dump, "criu dump", END_TIME_MAX)?;
            let error = finish_criu(lab, passage.source, "dump", success).err();
            let error = error.unwrap_or_else(|| anyhow::anyhow!("criu dump served no pages"));
            return passage.give_up("criu-dump", &error);
        }
        let dumped = Instant::now();
        let resumed = resume(&passage, receiver, far);
        let (mut daemon, copied, wire_bytes) = match resumed {
            Ok(resumed) => resumed,
            Err(error) => {
                // With its connection gone the dump fails, and the workload goes on.
                let _ = wait_for(&mut dump, "criu dump", END_TIME_MAX);
                return passage.give_up("criu-restore", &error);
            }
        };
        let ends = Ends {
            dumped,
            copied,
            restored: Instant::now(),
        };
        let mut moved = passage.open("post-copy", wire_bytes, &ends)?;
        let filled = wait_for(&mut daemon, "criu lazy-pages", FILL_TIME_MAX)?;
        finish_criu(lab, passage.target, "lazy-pages", filled)?;
        let served = wait_for(&mut dump, "criu dump", END_TIME_MAX)?;
        finish_criu(lab, passage.source, "dump", served)?;
        moved.total_ms = millis(passage.elapsed());
        Ok(Outcome::moved(moved))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // The memory is filled when it returns.
        Ok(())
    }
}

/// Starts the dump; whether it came so far that it serves pages.
fn start_dump(passage: &Passage<'_>, near: std::net::TcpStream) -> Result<(Child, bool)> {
    let (heard, told) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    let mut command = passage.dump_command(&["--lazy-pages"])?;
    let [socket, status] = [command.inherit(&near)?, command.inherit(&told)?];
    let command = command
        .args(["--ps-socket", number_of(&socket)?])
        .args(["--status-fd", number_of(&status)?]);
    let dump = start_quiet(command)?;
    drop((near, told));
    Ok((dump, hear_ready(heard)?))
}

/// Copies the images, and has the tree run at the target: the daemon that fills its memory, when
/// the images were there, and how many bytes they had.
fn resume(
    passage: &Passage<'_>,
    receiver: Receiver,
    far: std::net::TcpStream,
) -> Result<(Child, Instant, u64)> {
    let bytes = receiver.take(passage.source, passage.target, FOLDER)?;
    let copied = Instant::now();
    // That of the source came along.
    let _ = fs::remove_file(passage.target.path(FOLDER).join("dump.log"));
    let (heard, told) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    let mut command = passage.target.command("criu")?;
    let [socket, status] = [command.inherit(&far)?, command.inherit(&told)?];
    let command = command
        .args(["lazy-pages", "--page-server", "-o", "lazy-pages.log"])
        .args(["--ps-socket", number_of(&socket)?])
        .args(["--status-fd", number_of(&status)?])
        .args(COMMON);
    let mut daemon = start_quiet(command)?;
    drop((far, told));
    let restored = hear_ready(heard).and_then(|is_ready| {
        ensure!(is_ready, "criu lazy-pages ended at its start");
        passage.restore(&["--lazy-pages"])
    });
    if let Err(error) = restored {
        let _ = daemon.kill();
        let _ = daemon.wait();
        return Err(error);
    }
    Ok((daemon, copied, bytes))
}

const PORT: u16 = 7443;
/// All memory over the slowest link of the benchmark.
const FILL_TIME_MAX: Duration = Duration::from_secs(600);
const END_TIME_MAX: Duration = Duration::from_secs(30);
