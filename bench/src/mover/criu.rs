//! What all movers by stock CRIU have in common: namespaces made ready at the target, CRIU beside
//! the workload, its images, the link.
//!
//! CRIU runs inside the workload's own network, UTS and IPC namespaces (the prepared ones at the
//! target), so it sees none of them as something to save. That is the fastest that stock CRIU can
//! be had: as an external namespace the network costs it 30 to 90 ms more.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::child::start_quiet;
use super::outcome::{Move, Outcome, Parts, millis};
use super::{Order, images};
use crate::lab::Lab;
use crate::lab::init::HoldSpec;
use crate::lab::inside::{Inside, in_network};
use crate::lab::network::{CLIENT_ADDRESS, ip, mac_of, mac_text};
use crate::lab::node::Node;
use crate::sys;
use crate::workload::Workload;

/// A move by stock CRIU that has begun: all is ready at the target, and nothing has changed at the
/// source yet.
#[derive(Debug)]
pub struct Passage<'a> {
    pub lab: &'a Lab,
    pub order: &'a Order<'a>,
    pub source: &'a Node,
    pub target: &'a Node,
    /// The process at the target that holds the workload's new namespaces.
    pub holder: i32,
    memory_bytes: u64,
    begun: Instant,
    closed: Option<Instant>,
}

/// When the parts of a move's downtime ended, but for its last.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub dumped: Instant,
    pub copied: Instant,
    pub restored: Instant,
}

impl<'a> Passage<'a> {
    /// Makes namespaces and the link at the target, and empty folders for images at both nodes.
    pub fn begin(lab: &'a Lab, order: &'a Order<'a>) -> Result<Self> {
        let (source, target) = (lab.node(order.from)?, lab.node(order.to)?);
        let memory_bytes = order.workload.memory_bytes(source)?;
        let begun = Instant::now();
        let holder = prepare(source, target, order.workload)?;
        Ok(Self {
            lab,
            order,
            source,
            target,
            holder,
            memory_bytes,
            begun,
            closed: None,
        })
    }

    /// Cuts the workload off: its downtime begins.
    pub fn close(&mut self) -> Result<()> {
        self.closed = Some(Instant::now());
        self.order.workload.link.close(self.source)
    }

    /// Runs `criu dump` to its end. When it fails, CRIU has let the workload go on.
    pub fn dump(&self, more: &[&str]) -> Result<()> {
        let success = self.dump_command(more)?.output()?.status.success();
        finish_criu(self.lab, self.source, "dump", success)
    }

    /// `criu dump`, with further arguments.
    pub fn dump_command(&self, more: &[&str]) -> Result<Inside> {
        let pid = self.order.workload.pid.to_string();
        let command = self
            .source
            .command_beside(self.order.workload.pid, "criu")?;
        Ok(command
            .args(["dump", "-t", &pid, "-o", "dump.log"])
            .args(["--network-lock", "skip"])
            .args(COMMON)
            .args(more))
    }

    /// Runs `criu restore` to its end: the tree runs then, and its link is not open yet.
    pub fn restore(&self, more: &[&str]) -> Result<()> {
        let arguments = ["restore", "--restore-detached", "-o", "restore.log"];
        let command = self.target.command_beside(self.holder, "criu")?;
        let command = command.args(arguments).args(COMMON).args(more);
        let success = start_quiet(command)?.wait()?.success();
        finish_criu(self.lab, self.target, "restore", success)
    }

    /// Gives the workload back to its source after a dump that failed.
    pub fn give_up(&self, code: &str, error: &anyhow::Error) -> Result<Outcome> {
        self.order.workload.link.open(self.source)?;
        self.target.signal(self.holder, "KILL")?;
        Ok(Outcome::refused(code, format!("{error:#}")))
    }

    /// Opens the link at the target, and tells everybody: the downtime ends. Returns the move.
    pub fn open(&self, mode: &str, wire_bytes: u64, ends: &Ends) -> Result<Move> {
        let closed = self.closed.context("a move opens what it has closed")?;
        let workload = self.order.workload;
        open_link(self.target, self.holder, workload)?;
        let opened = Instant::now();
        self.target.signal(self.holder, "KILL")?;
        Ok(Move {
            workload: workload.name(),
            mode: mode.to_owned(),
            from: self.order.from.to_owned(),
            to: self.order.to.to_owned(),
            rounds: 0,
            memory_bytes: self.memory_bytes,
            wire_bytes,
            downtime_ms: millis(opened - closed),
            parts_ms: Parts {
                freeze: millis(ends.dumped - closed),
                final_round: millis(ends.copied - ends.dumped),
                restore: millis(ends.restored - ends.copied),
                commit: 0.0,
                handoff: millis(opened - ends.restored),
            },
            frozen_ms: None,
            restore_ms: None,
            blackout_ms: None,
            pauses: None,
            longest_pause_ms: None,
            total_ms: millis(opened - self.begun),
        })
    }

    /// Since its beginning.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A connection between the nodes, one end for a program of each: CRIU in the workload's
    /// network could make none, as the workload is cut off.
    pub fn connect(&self, port: u16) -> Result<(TcpStream, TcpStream)> {
        let address = SocketAddr::from((self.target.address(), port));
        let listener = in_network(&self.target.namespaces.net, || TcpListener::bind(address))?
            .context("listening at the target")?;
        let near = in_network(&self.source.namespaces.net, || TcpStream::connect(address))?
            .context("connecting to the target")?;
        let (far, _) = listener.accept().context("accepting a connection")?;
        Ok((near, far))
    }
}

fn prepare(source: &Node, target: &Node, workload: &Workload) -> Result<i32> {
    let holder = target.hold(HoldSpec {
        net: true,
        uts: true,
        ipc: true,
    })?;
    workload.link.create(target, &target.network_of(holder)?)?;
    know_client(target, holder)?;
    set_host_name(target, holder, &host_name(source, workload.pid)?)?;
    for node in [source, target] {
        images::make_folder(node)?;
    }
    Ok(holder)
}

/// Tells a network that is made ready where the client is. Else the first packet of what is
/// restored there, sent while the link is closed, has it ask, and again only after a second.
pub fn know_client(target: &Node, inside: i32) -> Result<()> {
    let mac = mac_text(mac_of(CLIENT_ADDRESS));
    ip(target, &target.network_of(inside)?, &[], |_| {
        format!("neigh replace {CLIENT_ADDRESS} lladdr {mac} dev eth0 nud reachable\n")
    })
}

fn open_link(target: &Node, holder: i32, workload: &Workload) -> Result<()> {
    workload.link.open(target)?;
    announce(target, holder, workload)
}

/// Tells everybody where the address of a workload is now.
pub fn announce(target: &Node, inside: i32, workload: &Workload) -> Result<()> {
    let address = workload.link.address;
    let sender = (mac_of(address), address.octets());
    in_network(&target.network_of(inside)?, || {
        sys::send_arp_request("eth0", sender, address.octets())
    })?
    .context("announcing the workload's address")
}

/// Keeps CRIU's log with the lab's and quotes it when CRIU failed.
pub fn finish_criu(lab: &Lab, node: &Node, action: &str, success: bool) -> Result<()> {
    let log = node.path(images::FOLDER).join(format!("{action}.log"));
    let kept = lab
        .folder
        .logs()
        .join(format!("criu-{action}-{}.log", node.name()));
    fs::copy(&log, &kept).with_context(|| format!("criu {action} left no log"))?;
    if success {
        return Ok(());
    }
    let text = fs::read_to_string(&kept).context("reading CRIU's log")?;
    // Without CAP_SYS_RESOURCE that limit cannot be raised, which is harmless.
    let telling = |line: &&str| line.contains("Error") && !line.contains("RLIMIT_NOFILE");
    let first = text.lines().find(telling);
    let first = first.unwrap_or("no error in its log");
    bail!(
        "criu {action} failed: {first} (whole log: {})",
        kept.display()
    )
}

fn host_name(node: &Node, pid: i32) -> Result<String> {
    let text = node.command_beside(pid, "hostname")?.run()?;
    Ok(text.trim_end().to_owned())
}

fn set_host_name(node: &Node, pid: i32, name: &str) -> Result<()> {
    node.command_beside(pid, "hostname")?
        .arg(name)
        .run()
        .map(drop)
}

/// What `criu check` says of a feature at a node.
pub fn has_feature(node: &Node, feature: &str) -> Result<bool> {
    let check = node.command("criu")?.args(["check", "--feature", feature]);
    Ok(check.output()?.status.success())
}

/// `fs.pipe-max-size` as CRIU's page server needs it where it may not raise that limit itself
/// (without CAP_SYS_RESOURCE): back to what it was when this is dropped. It is the whole machine's.
#[derive(Debug)]
pub struct LargePipes {
    earlier: String,
}

impl LargePipes {
    pub fn allow() -> Result<Self> {
        let earlier = fs::read_to_string(PIPE_MAX).context("reading fs.pipe-max-size")?;
        let size: u64 = earlier.trim().parse().context("reading fs.pipe-max-size")?;
        if size < PIPE_BYTES {
            fs::write(PIPE_MAX, PIPE_BYTES.to_string()).context("raising fs.pipe-max-size")?;
        }
        Ok(Self { earlier })
    }
}

impl Drop for LargePipes {
    fn drop(&mut self) {
        if let Err(error) = fs::write(PIPE_MAX, self.earlier.trim()) {
            eprintln!("lab: fs.pipe-max-size stays at {PIPE_BYTES}: {error}");
        }
    }
}

/// Waits for the byte by which CRIU says, through a pipe, that it is ready; false if it ends first.
pub fn hear_ready(pipe: std::os::fd::OwnedFd) -> Result<bool> {
    use std::io::Read as _;
    let mut byte = [0];
    let read = File::from(pipe).read(&mut byte);
    Ok(read.context("waiting for CRIU")? == 1)
}

/// The number by which a program knows a descriptor that it was handed.
pub fn number_of(path: &str) -> Result<&str> {
    let number = path.rsplit_once('/').map(|(_, number)| number);
    let number = number.context("a descriptor's path")?;
    ensure!(
        number.bytes().all(|byte| byte.is_ascii_digit()),
        "{path} is no descriptor"
    );
    Ok(number)
}

pub const COMMON: [&str; 5] = [
    "--images-dir",
    images::FOLDER,
    "--tcp-established",
    "--manage-cgroups=ignore",
    "-v3",
];
const PIPE_MAX: &str = "/proc/sys/fs/pipe-max-size";
const PIPE_BYTES: u64 = 4 << 20;
