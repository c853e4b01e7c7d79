//! `files`: folders that travel with a workload which writes, maps, renames, links and stamps them;
//! there and back, with every file known by heart; and what ends a move that carries one.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::faults::{Survivor, judge, wait_for_phase};
use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::writer::case::Kind;
use crate::writer::case::files::FOLDER;
use crate::writer::case::{FILES, FILES_MANY};
use crate::writer::options::Options;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("files is about what stock CRIU does not have")?;
    let mut lab = settings.lab(2)?;
    for case in &CASES {
        let only = settings.only.as_deref();
        if only.is_some_and(|only| !only.split(',').any(|only| only == case.name)) {
            continue;
        }
        for node in &lab.nodes {
            make_disk(node, case.disk)?;
        }
        match (case.run)(&mut lab, report).with_context(|| case.name) {
            Ok(said) => println!("{}: {said}", case.name),
            Err(error) => {
                report.fail(format!("{error:#}"));
                // Its workload may be left.
                return Ok(());
            }
        }
        for node in &lab.nodes {
            remove_disk(node)?;
        }
    }
    Ok(())
}

struct Case {
    name: &'static str,
    disk: Disk,
    run: fn(&mut Lab, &mut Report) -> Result<String>,
}

/// What a node has at the folder's parent.
#[derive(Clone, Copy, Debug)]
pub enum Disk {
    /// The machine's own.
    Own,
    /// A tmpfs, and at node b one of so many MiB.
    Small(u32),
}

const CASES: [Case; 6] = [
    Case {
        name: "few",
        disk: Disk::Own,
        run: few,
    },
    Case {
        name: "memory-disk",
        disk: Disk::Small(512),
        run: few,
    },
    Case {
        name: "sparse",
        disk: Disk::Own,
        run: sparse,
    },
    Case {
        name: "full",
        disk: Disk::Small(64),
        run: full,
    },
    Case {
        name: "killed",
        disk: Disk::Own,
        run: killed,
    },
    Case {
        name: "many",
        disk: Disk::Own,
        run: many,
    },
];

/// Gives a node a disk of its own, where the other has another.
pub fn make_disk(node: &Node, disk: Disk) -> Result<()> {
    let run = |words: &[&str]| node.command(words[0])?.args(&words[1..]).run().map(drop);
    run(&["mkdir", "-p", DISK])?;
    match disk {
        Disk::Own => {
            let own = format!("{SHARED}/disk-{}", node.name());
            run(&["mkdir", "-p", &own])?;
            run(&["mount", "--bind", &own, DISK])
        }
        Disk::Small(size) => {
            let size = format!("size={}m", if node.name() == "a" { 1024 } else { size });
            run(&["mount", "-t", "tmpfs", "-o", &size, "disk", DISK])
        }
    }
}

pub fn remove_disk(node: &Node) -> Result<()> {
    let clean = "rm -rf /srv/disk/* /srv/disk/.pageferry-files; umount /srv/disk";
    node.command("sh")?.args(["-c", clean]).run().map(drop)
}

fn flags() -> MoveOptions {
    MoveOptions {
        copied: vec![FOLDER.to_owned()],
        ..MoveOptions::default()
    }
}

fn start(lab: &mut Lab, kind: &Kind) -> Result<WriterSession> {
    let mut options = Options::new(MEMORY);
    kind.name.clone_into(&mut options.case);
    WriterSession::start(lab, &Pageferry, "a", &options, |_| {})
}

/// Moves there and back; the bytes of each move.
fn there_and_back(
    lab: &mut Lab,
    session: &mut WriterSession,
    moves: usize,
    report: &mut Report,
) -> Result<Vec<u64>> {
    let mut bytes = Vec::new();
    for number in 1..=moves {
        let from = session.at.clone();
        if !session.move_and_note(lab, &flags(), &format!("move {number}"), report) {
            bail!("move {number} failed");
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let last = report.moves.last().context("a move")?;
        println!(
            "  {from} -> {}: downtime {:.1} ms, {} rounds, {} KiB on the wire",
            session.at,
            last.downtime_ms,
            last.rounds,
            last.wire_bytes >> 10
        );
        bytes.push(last.wire_bytes);
        // What was left behind is not where anybody looks for it.
        ensure!(
            !lab.node(&from)?.path(FOLDER).exists(),
            "{FOLDER} is still at {from}"
        );
    }
    Ok(bytes)
}

fn few(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let mut session = start(lab, &FILES)?;
    let bytes = there_and_back(lab, &mut session, 4, report)?;
    session.finish(lab, report)?;
    Ok(format!("4 moves, {bytes:?} bytes"))
}

fn many(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let mut session = start(lab, &FILES_MANY)?;
    let bytes = there_and_back(lab, &mut session, 2, report)?;
    session.finish(lab, report)?;
    let [first, second] = bytes[..] else {
        bail!("two moves");
    };
    report.figure("1 GiB in 10,000 files, MiB on the wire", first >> 20);
    report.figure("the same on its way back", second >> 20);
    ensure!(
        second < first / 5,
        "the way back took {second} of {first} bytes"
    );
    Ok(format!(
        "{} MiB, and back {} MiB",
        first >> 20,
        second >> 20
    ))
}

/// 50 GiB that hold some KiB.
fn sparse(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let session = start(lab, &FILES)?;
    let path = format!("{FOLDER}/sparse");
    let node = lab.node("a")?;
    let make = format!(
        "truncate -s 50G {path} && for at in 0 1000 800000 13000000; do \
         echo $at | dd of={path} bs=4096 seek=$at conv=notrunc status=none; done; \
         truncate -s 50G {path}"
    );
    node.command("sh")?.args(["-c", &make]).run()?;
    let before = describe(&node.path(FOLDER), "sparse")?;
    // The writer counts its files, and this one is not its own.
    let outcome = Migration::start(node, &session.workload.name(), "b", &flags())?.finish()?;
    let Some(moved) = outcome.moved else {
        bail!("{:?}", outcome.error);
    };
    let after = describe(&lab.node("b")?.path(FOLDER), "sparse")?;
    ensure!(before == after, "{before:?} became {after:?}");
    let blocks = fs::metadata(lab.node("b")?.path(&path))?.blocks();
    ensure!(blocks < 1000, "it takes {blocks} blocks");
    ensure!(
        moved.wire_bytes < 400 << 20,
        "{} bytes on the wire",
        moved.wire_bytes
    );
    session.workload.kill(lab)?;
    wait_settled(lab, SETTLE_TIME_MAX)?;
    report.figure("50 GiB sparse, blocks at the target", blocks);
    Ok(format!(
        "{blocks} blocks, {} KiB on the wire",
        moved.wire_bytes >> 10
    ))
}

/// A disk at the target that is too small, and one that fills meanwhile.
fn full(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let mut session = start(lab, &FILES)?;
    let refused = |session: &mut WriterSession, what: &str| -> Result<()> {
        match session.move_to(lab, "b", &flags())? {
            Ok(_) => bail!("it moved: {what}"),
            Err((code, text)) => {
                ensure!(code == "disk-short", "{what}: {code}: {text}");
                println!("  {what}: {text}");
                wait_settled(lab, SETTLE_TIME_MAX)?;
                let left = lab.node("b")?.path(format!("{DISK}/.pageferry-files"));
                ensure!(!left.exists(), "{what}: something is left");
                ensure!(!lab.node("b")?.path(FOLDER).exists(), "{what}: it is there");
                Ok(())
            }
        }
    };
    refused(&mut session, "64 MiB are too few")?;
    session.finish(lab, report)?;
    Ok("refused, and the workload goes on".to_owned())
}

/// Daemons that are killed while a folder is on its way.
fn killed(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let mut seen = 0;
    for (node, phase) in [
        ("b", "receiving"),
        ("a", "copying"),
        ("b", "restoring"),
        ("a", "finishing"),
    ] {
        let mut session = start(lab, &FILES)?;
        let name = session.workload.name();
        let migration = Migration::start(lab.node("a")?, &name, "b", &flags())?;
        let hit = wait_for_phase(lab, &name, (node, phase))?.is_some();
        if hit {
            lab.daemon(node)?.kill()?;
            lab.restart_daemon(node)?;
        }
        migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let survivor = judge(lab, &mut session)?;
        let (at, left) = match survivor {
            Survivor::Source => ("a", "b"),
            Survivor::Target => ("b", "a"),
            Survivor::NobodyFrozen => bail!("nobody runs"),
        };
        ensure!(
            lab.node(at)?.path(FOLDER).exists(),
            "its folder is not at {at}"
        );
        ensure!(
            !lab.node(left)?.path(FOLDER).exists(),
            "its folder is at {left} too"
        );
        println!("  killed {node} while {phase}: {survivor:?} runs on (seen: {hit})");
        report.note_contents(true);
        seen += usize::from(hit);
        session.at = at.to_owned();
        session.finish(lab, report)?;
        for node in &lab.nodes {
            let clean = "rm -rf /srv/disk/* /srv/disk/.pageferry-files";
            node.command("sh")?.args(["-c", clean]).run()?;
        }
    }
    ensure!(2 <= seen, "only {seen} states were seen");
    Ok(format!("{seen} of 4 states were hit"))
}

/// What an entry is, but for what is in it.
fn describe(folder: &Path, name: &str) -> Result<BTreeMap<&'static str, i64>> {
    let path: PathBuf = folder.join(name);
    let metadata = fs::metadata(&path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(BTreeMap::from([
        ("size", i64::try_from(metadata.len())?),
        ("mode", metadata.mode().into()),
        ("seconds", metadata.mtime()),
        ("nanoseconds", metadata.mtime_nsec()),
    ]))
}

/// Where the folder is in.
pub const DISK: &str = "/srv/disk";
const MEMORY: usize = 1 << 20; // 1 MiB: little beside the files
