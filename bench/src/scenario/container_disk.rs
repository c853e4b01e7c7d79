//! `containers --only RUNTIME-disk`: what a container has written to its root file system, and the
//! disk of the target: a sparse file costs what it holds, and a disk that is too small, or fills
//! meanwhile, ends the move cleanly, with the container running on.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};

use super::container_files::{make_disk, root_at, start};
use super::faults::wait_for_phase;
use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::lab::Lab;
use crate::lab::network::Link;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::workload::container::{BUNDLES, Plan};
use crate::workload::whose::Whose;

/// Both, of containers whose bundles travel.
pub fn run(settings: &Settings, whose: Whose, report: &mut Report) -> Result<()> {
    let link = settings
        .link
        .clone()
        .unwrap_or(Link::Shaped(LINK.to_owned()));
    let settings = Settings {
        link: Some(link),
        ..settings.clone()
    };
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    make_disk(lab.node("a")?)?;
    for (name, disk, case) in CASES {
        put_disk(lab.node("b")?, disk)?;
        let came = start(&mut lab, whose).and_then(|(session, plan)| {
            let said = case(&lab, session, (whose.name(), &plan), report)?;
            println!("{} {name}: {said}", whose.name());
            Ok(())
        });
        if let Err(error) = came.with_context(|| format!("{} {name}", whose.name())) {
            report.fail(format!("{error:#}"));
            // Its workload may be left.
            return Ok(());
        }
        take_disk(lab.node("b")?)?;
        sh(
            lab.node("a")?,
            &format!("rm -rf {BUNDLES}/* {BUNDLES}/.pageferry-files"),
        )?;
    }
    Ok(())
}

type Case = fn(&Lab, WriterSession, (&str, &Plan), &mut Report) -> Result<String>;

const CASES: [(&str, Disk, Case); 3] = [
    ("sparse", Disk::Own, sparse),
    ("small", Disk::Small("size=64m"), small),
    ("filled", Disk::Small("size=1g"), filled),
];

/// What node b has for bundles.
#[derive(Clone, Copy, Debug)]
enum Disk {
    /// Of the machine.
    Own,
    /// A tmpfs with these options.
    Small(&'static str),
}

fn put_disk(node: &Node, disk: Disk) -> Result<()> {
    match disk {
        Disk::Own => make_disk(node),
        Disk::Small(options) => {
            let mount = format!("mount -t tmpfs -o {options} bundles {BUNDLES}");
            sh(node, &format!("mkdir -p {BUNDLES}; {mount}"))
        }
    }
}

fn take_disk(node: &Node) -> Result<()> {
    let clean = format!("rm -rf {BUNDLES}/* {BUNDLES}/.pageferry-files");
    sh(node, &format!("{clean}; umount {BUNDLES}"))
}

/// 50 GiB that hold some KiB, there and back.
fn sparse(
    lab: &Lab,
    mut session: WriterSession,
    (name, plan): (&str, &Plan),
    report: &mut Report,
) -> Result<String> {
    let path = root_at(lab.node("a")?, &session.workload)?.join("sparse");
    let make = "truncate -s 50G $0; for at in 0 1000 800000 13000000; do \
                echo $at | dd of=$0 bs=4096 seek=$at conv=notrunc status=none; done; \
                truncate -s 50G $0; touch -d @5.5 $0";
    in_host(make, &path)?;
    let before = describe(&path)?;
    let mut said = Vec::new();
    for number in 1..=2 {
        let what = format!("move {number}");
        if !session.move_and_note(lab, &MoveOptions::default(), &what, report) {
            bail!("{what} failed");
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let node = lab.node(&session.at)?;
        session.workload.is_here_as(node, plan)?;
        let path = root_at(node, &session.workload)?.join("sparse");
        let after = describe(&path)?;
        ensure!(before == after, "{before:?} became {after:?}");
        let blocks = fs::metadata(&path)?.blocks();
        ensure!(blocks < BLOCKS_MAX, "it takes {blocks} blocks");
        let wire = report.moves.last().context("a move")?.wire_bytes;
        ensure!(wire < WIRE_MAX, "{wire} bytes on the wire");
        said.push(format!("{blocks} blocks, {} MiB on the wire", wire >> 20));
        report.figure(
            &format!("{name}, 50 GiB sparse, blocks at {}", session.at),
            blocks,
        );
    }
    session.finish(lab, report)?;
    Ok(said.join("; and back "))
}

/// Size, owner, mode, time, and what is where something is.
fn describe(path: &std::path::Path) -> Result<String> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    let read = "for at in 0 1 1000 800000 13000000 13107199; do \
                dd if=$0 bs=4096 skip=$at count=1 status=none | md5sum; done";
    let (sums, size) = (in_host(read, path)?, metadata.len());
    let (mode, seconds, nanos) = (metadata.mode(), metadata.mtime(), metadata.mtime_nsec());
    Ok(format!("{size} {mode:o} {seconds}.{nanos:09} {sums}"))
}

/// Has a shell of the host do something to a file of a node.
fn in_host(script: &str, path: &std::path::Path) -> Result<String> {
    let mut shell = std::process::Command::new("sh");
    let output = shell
        .args(["-ec", script])
        .arg(path)
        .output()
        .context("starting sh")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A disk that has no room from the beginning.
fn small(
    lab: &Lab,
    mut session: WriterSession,
    (_, plan): (&str, &Plan),
    report: &mut Report,
) -> Result<String> {
    weigh(lab, &session)?;
    let moved = session.move_to(lab, "b", &MoveOptions::default())?;
    let said = stayed(lab, &session, plan, moved.map(drop))?;
    session.finish(lab, report)?;
    Ok(said)
}

/// A disk that somebody else fills while the container is on its way.
fn filled(
    lab: &Lab,
    mut session: WriterSession,
    (_, plan): (&str, &Plan),
    report: &mut Report,
) -> Result<String> {
    weigh(lab, &session)?;
    let (source, target) = (lab.node("a")?, lab.node("b")?);
    let name = session.workload.name();
    let migration = Migration::start(source, &name, "b", &MoveOptions::default())?;
    ensure!(
        wait_for_phase(lab, &name, ("b", "receiving"))?.is_some(),
        "nothing was received"
    );
    // All that there is, until nothing is left even of what came meanwhile.
    let fill = format!(
        "for n in 1 2 3; do dd if=/dev/zero of={BUNDLES}/filler$n bs=64k 2>/dev/null || true; done"
    );
    sh(target, &fill)?;
    let outcome = migration.finish()?;
    wait_settled(lab, SETTLE_TIME_MAX)?;
    let moved = outcome.error.map_or(Ok(()), Err);
    session.client.verify()?;
    sh(target, &format!("rm {BUNDLES}/filler*"))?;
    let said = stayed(lab, &session, plan, moved)?;
    // And moves when there is room again.
    if !session.move_and_note(lab, &MoveOptions::default(), "with room", report) {
        bail!("it does not move with room");
    }
    wait_settled(lab, SETTLE_TIME_MAX)?;
    session.workload.is_here_as(target, plan)?;
    session.workload.is_gone(source)?;
    session.finish(lab, report)?;
    Ok(said)
}

/// Gives its root file system something to carry.
fn weigh(lab: &Lab, session: &WriterSession) -> Result<()> {
    let path = root_at(lab.node("a")?, &session.workload)?.join("ballast");
    in_host("head -c 300M /dev/urandom >$0", &path).map(drop)
}

/// Whether it is where it was, as ever, and nothing of it where it was to go.
fn stayed(
    lab: &Lab,
    session: &WriterSession,
    plan: &Plan,
    moved: Result<(), (String, String)>,
) -> Result<String> {
    let Err((code, text)) = moved else {
        bail!("it has moved");
    };
    ensure!(code == "disk-short", "{code}, and not disk-short: {text}");
    wait_settled(lab, SETTLE_TIME_MAX)?;
    let (here, there) = (lab.node("a")?, lab.node("b")?);
    session.workload.is_here_as(here, plan)?;
    session.workload.is_gone(there)?;
    let left = fs::read_dir(there.path(BUNDLES)).context("looking at the target's bundles")?;
    let left: Vec<_> = left.flatten().map(|entry| entry.path()).collect();
    ensure!(left.is_empty(), "the target has {left:?}");
    Ok(format!("{code}: {text}"))
}

fn sh(node: &Node, script: &str) -> Result<()> {
    node.command("sh")?.args(["-ec", script]).run().map(drop)
}

/// Of the links: what travels takes seconds, so that something can happen meanwhile.
const LINK: &str = "1gbit";
const BLOCKS_MAX: u64 = 1000;
/// Programs and libraries travel, too.
const WIRE_MAX: u64 = 400 << 20; // 400 MiB
