//! Stock CRIU, driven by hand, without the daemons: dump, copy, restore.
//!
//! CRIU runs inside the workload's own network, UTS and IPC namespaces (the prepared ones at the
//! target), so it sees none of them as something to save.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::outcome::{Move, Outcome, Parts, millis};
use super::{Mover, Order};
use crate::lab::Lab;
use crate::lab::init::HoldSpec;
use crate::lab::inside::in_network;
use crate::lab::network::mac_of;
use crate::lab::node::Node;
use crate::sys;
use crate::workload::Workload;

/// Moves by `criu dump` and `criu restore`, from the link being closed to it being open again.
#[derive(Clone, Copy, Debug)]
pub struct StockCriu;

impl Mover for StockCriu {
    fn name(&self) -> &'static str {
        "stock-criu"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let (source, target) = (lab.node(order.from)?, lab.node(order.to)?);
        let workload = order.workload;
        let memory_bytes = workload.memory_bytes(source)?;
        let begun = Instant::now();
        let holder = prepare(source, target, workload)?;
        let closed = Instant::now();
        workload.link.close(source)?;
        if let Err(error) = dump(lab, source, workload) {
            // CRIU lets it go on.
            workload.link.open(source)?;
            target.signal(holder, "KILL")?;
            return Ok(Outcome::refused("criu-dump", format!("{error:#}")));
        }
        let dumped = Instant::now();
        let wire_bytes = copy_images(source, target)?;
        let copied = Instant::now();
        restore(lab, target, holder)?;
        let restored = Instant::now();
        open_link(target, holder, workload)?;
        let opened = Instant::now();
        target.signal(holder, "KILL")?;
        Ok(Outcome::moved(Move {
            workload: workload.name(),
            mode: "stop-and-copy".to_owned(),
            from: order.from.to_owned(),
            to: order.to.to_owned(),
            rounds: 0,
            memory_bytes,
            wire_bytes,
            downtime_ms: millis(opened - closed),
            parts_ms: Parts {
                freeze: millis(dumped - closed),
                final_round: millis(copied - dumped),
                restore: millis(restored - copied),
                commit: 0.0,
                handoff: millis(opened - restored),
            },
            frozen_ms: None,
            restore_ms: None,
            blackout_ms: None,
            pauses: None,
            longest_pause_ms: None,
            total_ms: millis(opened - begun),
        }))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

/// Makes the namespaces and the link at the target, and empty folders for images at both nodes.
/// Returns the process that holds the namespaces.
fn prepare(source: &Node, target: &Node, workload: &Workload) -> Result<i32> {
    let holder = target.hold(HoldSpec {
        net: true,
        uts: true,
        ipc: true,
    })?;
    workload.link.create(target, &target.network_of(holder)?)?;
    set_host_name(target, holder, &host_name(source, workload.pid)?)?;
    for node in [source, target] {
        let images = node.path(IMAGES);
        if images.exists() {
            fs::remove_dir_all(&images).context("removing the images of an earlier move")?;
        }
        fs::create_dir(&images).context("creating the folder of images")?;
    }
    Ok(holder)
}

/// Opens the link at the target, and tells everybody.
fn open_link(target: &Node, holder: i32, workload: &Workload) -> Result<()> {
    workload.link.open(target)?;
    let address = workload.link.address;
    let sender = (mac_of(address), address.octets());
    in_network(&target.network_of(holder)?, || {
        sys::send_arp_request("eth0", sender, address.octets())
    })?
    .context("announcing the workload's address")
}

fn dump(lab: &Lab, node: &Node, workload: &Workload) -> Result<()> {
    let pid = workload.pid.to_string();
    let arguments = [
        "dump",
        "-t",
        &pid,
        "-o",
        "dump.log",
        "--network-lock",
        "skip",
    ];
    let command = node
        .command_beside(workload.pid, "criu")?
        .args(arguments)
        .args(CRIU_COMMON);
    finish_criu(lab, node, "dump", command.output()?.status.success())
}

fn restore(lab: &Lab, node: &Node, holder: i32) -> Result<()> {
    let arguments = ["restore", "--restore-detached", "-o", "restore.log"];
    let command = node
        .command_beside(holder, "criu")?
        .args(arguments)
        .args(CRIU_COMMON);
    // Its output would stay open in the restored tree, so it gets none; the log says it all.
    let null = || File::options().read(true).write(true).open("/dev/null");
    let status = command
        .stdin(null()?)
        .stdout(null()?)
        .stderr(null()?)
        .spawn()?
        .wait()?;
    finish_criu(lab, node, "restore", status.success())
}

/// Keeps CRIU's log with the lab's and quotes it when CRIU failed.
fn finish_criu(lab: &Lab, node: &Node, action: &str, success: bool) -> Result<()> {
    let log = node.path(IMAGES).join(format!("{action}.log"));
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

/// Streams the images over the nodes' link; returns how many bytes went.
fn copy_images(source: &Node, target: &Node) -> Result<u64> {
    let address = SocketAddr::from((target.address(), COPY_PORT));
    let listener = in_network(&target.namespaces.net, || TcpListener::bind(address))?
        .context("listening at the target")?;
    let into = target.path(IMAGES);
    let receiver = thread::spawn(move || -> Result<()> {
        let (stream, _) = listener.accept().context("accepting the images")?;
        receive_files(stream, &into)
    });
    let stream = in_network(&source.namespaces.net, || TcpStream::connect(address))?
        .context("connecting to the target")?;
    let sent = send_files(stream, &source.path(IMAGES))?;
    receiver
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(sent)
}

/// Each file: length of its name, name, its length (u64, little endian), its bytes.
fn send_files(mut stream: TcpStream, folder: &Path) -> Result<u64> {
    let mut sent = 0;
    for entry in fs::read_dir(folder).context("listing the images")? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .context("an image's name")?;
        let mut file = File::open(&path)?;
        let length = file.metadata()?.len();
        stream.write_all(&(name.len() as u64).to_le_bytes())?;
        stream.write_all(name.as_bytes())?;
        stream.write_all(&length.to_le_bytes())?;
        sent += io::copy(&mut file, &mut stream).context("sending an image")?;
    }
    Ok(sent)
}

fn receive_files(mut stream: TcpStream, folder: &Path) -> Result<()> {
    let mut number = [0; 8];
    while let Ok(()) = stream.read_exact(&mut number) {
        let mut name = vec![0; usize::try_from(u64::from_le_bytes(number))?];
        stream.read_exact(&mut name)?;
        stream.read_exact(&mut number)?;
        let length = u64::from_le_bytes(number);
        let mut file = File::create(folder.join(std::str::from_utf8(&name)?))?;
        let copied = io::copy(&mut (&mut stream).take(length), &mut file)?;
        ensure!(copied == length, "the images ended early");
    }
    Ok(())
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

const IMAGES: &str = "/tmp/images";
const COPY_PORT: u16 = 7441;
const CRIU_COMMON: [&str; 5] = [
    "--images-dir",
    IMAGES,
    "--tcp-established",
    "--manage-cgroups=ignore",
    "-v3",
];
