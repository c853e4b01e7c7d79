//! Volumes of containers: written all the time while they travel, there and back; taken back where
//! a move fails; and those that podman has by a name.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::faults::wait_for_phase;
use super::files::{DISK, Disk, make_disk};
use super::report::Report;
use super::writing::WriterSession;
use crate::client::resp::ANSWER_TIME_MAX;
use crate::client::writer::WriterClient;
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::workload::container::{self, Container, Plan, Runtime};
use crate::workload::containerd;
use crate::workload::podman;
use crate::writer::case::files::FOLDER;
use crate::writer::case::{FILES, FILES_MANY, Kind};
use crate::writer::options::Options;

/// 1 GiB in 10,000 files, there and back.
pub fn many(lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<String> {
    let mut session = start(lab, runtime, &FILES_MANY)?;
    let said = there_and_back(lab, &mut session, (&flags(), SOURCE), report)?;
    session.finish(lab, report)?;
    let (first, back) = (said[0].0, said[1].0);
    report.figure("volume of 1 GiB in 10,000 files, MiB on the wire", first);
    report.figure("the same on its way back", back);
    ensure!(back < first / 5, "the way back took {back} of {first} MiB");
    Ok(format!("MiB on the wire and ms of downtime: {said:?}"))
}

/// Daemons that are killed while a volume is on its way.
pub fn killed(lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<String> {
    let mut seen = 0;
    for (node, phase) in KILLS {
        let mut session = start(lab, runtime, &FILES)?;
        let name = session.workload.name();
        let migration = Migration::start(lab.node("a")?, &name, "b", &flags())?;
        let is_hit = wait_for_phase(lab, &name, (node, phase))?.is_some();
        if is_hit {
            lab.daemon(node)?.kill()?;
            lab.restart_daemon(node)?;
        }
        migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        judge(lab, &mut session).with_context(|| format!("{node} killed while {phase}"))?;
        println!(
            "  killed {node} while {phase}: runs at {} (seen: {is_hit})",
            session.at
        );
        report.note_contents(true);
        seen += usize::from(is_hit);
        session.finish(lab, report)?;
        for node in &lab.nodes {
            let clean = format!("rm -rf {DISK}/* {DISK}/.pageferry-files");
            node.command("sh")?.args(["-c", &clean]).run()?;
        }
    }
    ensure!(2 <= seen, "only {seen} states were seen");
    Ok(format!("{seen} of {} states were hit", KILLS.len()))
}

/// A named volume of podman, there and back.
pub fn of_podman(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let number = lab.next_workload()?;
    let (id, volume) = (format!("writer-{number}"), format!("data-{number}"));
    // It writes over its image, too.
    let plan = plan(&FILES);
    podman::prepare(lab, &plan, "a")?;
    let label = ["--label", "of=lab"];
    let make = ["volume", "create"]
        .into_iter()
        .chain(label)
        .chain([&*volume]);
    podman::podman(lab.node("a")?)?.args(make).run()?;
    let before = inspect(lab.node("a")?, &volume)?;
    let path = before["Mountpoint"].as_str().context("a path")?.to_owned();
    let mounted = format!("{volume}:{FOLDER}");
    let options = ["--volume", &*mounted];
    let (container, pid) = podman::run(lab, &plan, (&id, "a"), &options)?;
    let held = container::linked(lab, number, (container, pid), "a")?;
    let client = WriterClient::connect(&lab.client.net, &held, FILL_MAX)?;
    let mut session = WriterSession::watch(lab, &Pageferry, "a", (held, client))?;
    let plain = MoveOptions::default();
    // A volume of that name is somebody else's.
    let other = podman::podman(lab.node("b")?)?;
    other.args(["volume", "create", &volume]).run()?;
    match session.move_to(lab, "b", &plain)? {
        Err((code, _)) if code == "name-taken" => {}
        moved => bail!("with a volume of its name there: {moved:?}"),
    }
    let listed = podman::podman(lab.node("b")?)?.args(["volume", "rm", &volume]);
    listed.run().context("the volume of somebody else")?;
    let said = there_and_back(lab, &mut session, (&plain, &path), report)?;
    let after = inspect(lab.node("a")?, &volume)?;
    for what in ["Driver", "Mountpoint", "Labels", "Options"] {
        ensure!(
            before[what] == after[what],
            "{what}: {before} became {after}"
        );
    }
    let listed = podman::podman(lab.node("b")?)?
        .args(["volume", "ls", "--quiet"])
        .run()?;
    ensure!(
        listed.trim().is_empty(),
        "node b still has the volumes {listed}"
    );
    session.finish(lab, report)?;
    podman::podman(lab.node("a")?)?
        .args(["volume", "rm", &volume])
        .run()?;
    Ok(format!("MiB on the wire and ms of downtime: {said:?}"))
}

/// A folder of the node in a container of containerd, there and back.
pub fn of_containerd(lab: &mut Lab, report: &mut Report) -> Result<String> {
    let _engines = containerd::start_engines(lab)?;
    let plan = plan(&FILES);
    containerd::bring_image(lab, &plan)?;
    for node in &lab.nodes {
        make_disk(node, Disk::Own)?;
    }
    lab.node("a")?
        .command("mkdir")?
        .args(["-p", SOURCE])
        .run()?;
    let mount = format!("type=bind,src={SOURCE},dst={FOLDER},options=rbind:rw");
    let held = containerd::start_with(lab, "a", &["--mount", &mount], &plan)?;
    let client = WriterClient::connect(&lab.client.net, &held, FILL_MAX)?;
    let mut session = WriterSession::watch(lab, &Pageferry, "a", (held, client))?;
    let said = there_and_back(lab, &mut session, (&flags(), SOURCE), report)?;
    session.finish(lab, report)?;
    Ok(format!("MiB on the wire and ms of downtime: {said:?}"))
}

/// What podman of a node says of a volume.
fn inspect(node: &Node, volume: &str) -> Result<Value> {
    let printed = podman::podman(node)?
        .args(["volume", "inspect", volume])
        .run()?;
    let mut all: Value = serde_json::from_str(&printed).context("what podman has of a volume")?;
    Ok(all[0].take())
}

fn plan(kind: &Kind) -> Plan {
    let mut options = Options::new(MEMORY);
    kind.name.clone_into(&mut options.case);
    Plan::writer(&options)
}

fn flags() -> MoveOptions {
    MoveOptions {
        copied: vec![SOURCE.to_owned()],
        ..MoveOptions::default()
    }
}

/// A writer in a container, at node a, with its files in a volume.
fn start(lab: &mut Lab, runtime: Runtime, kind: &Kind) -> Result<WriterSession> {
    lab.node("a")?
        .command("mkdir")?
        .args(["-p", SOURCE])
        .run()?;
    let plan = Plan {
        name: "volume",
        writes: false,
        mounts: vec![container::bind(SOURCE, FOLDER)],
        ..plan(kind)
    };
    let held = container::start_with(lab, runtime, "a", &plan)?;
    let client = WriterClient::connect(&lab.client.net, &held, FILL_MAX)?;
    WriterSession::watch(lab, &Pageferry, "a", (held, client))
}

/// Moves there and back; MiB on the wire and downtime of each move.
fn there_and_back(
    lab: &Lab,
    session: &mut WriterSession,
    (flags, path): (&MoveOptions, &str),
    report: &mut Report,
) -> Result<Vec<(u64, f64)>> {
    let mut said = Vec::new();
    for number in 1..=MOVES {
        let from = session.at.clone();
        let what = format!("move {number}");
        ensure!(
            session.move_and_note(lab, flags, &what, report),
            "{what} failed"
        );
        wait_settled(lab, SETTLE_TIME_MAX)?;
        check_place(lab, session, path)?;
        let left = lab.node(&from)?;
        session.workload.is_gone(left)?;
        let last = report.moves.last().context("a move")?;
        said.push((last.wire_bytes >> 20, last.downtime_ms));
    }
    Ok(said)
}

fn of(session: &WriterSession) -> Result<&Container> {
    session.workload.container.as_ref().context("a container")
}

/// Its files are where it is, and nowhere else where anybody looks for them.
fn check_place(lab: &Lab, session: &WriterSession, path: &str) -> Result<()> {
    for node in &lab.nodes {
        let (is_there, name) = (node.path(path).exists(), node.name());
        ensure!(
            is_there == (name == session.at),
            "{path} at {name}: {is_there}"
        );
    }
    Ok(())
}

/// Finds out where it runs: at one node alone, with right files there.
fn judge(lab: &Lab, session: &mut WriterSession) -> Result<()> {
    let answers = session
        .prober
        .wait_for_answer_after(Instant::now(), ANSWER_TIME_MAX);
    ensure!(answers, "it does not answer");
    session.client.verify()?;
    let mut here = Vec::new();
    for node in &lab.nodes {
        let writers = node.processes_named("lab-writer");
        here.extend(writers.iter().map(|pid| (node.name().to_owned(), *pid)));
    }
    let [(at, pid)] = &here[..] else {
        bail!("it runs at {here:?}");
    };
    (session.at, session.workload.pid) = (at.clone(), *pid);
    check_place(lab, session, SOURCE)?;
    let container = of(session)?.clone();
    for node in &lab.nodes {
        if node.name() == at {
            container::check_listed(node, &container, *pid)?;
            continue;
        }
        container::check_gone(node, &container)?;
        let hidden = node.path(format!("{DISK}/.pageferry-files"));
        let left = std::fs::read_dir(hidden).into_iter().flatten().flatten();
        let mut coming =
            left.filter(|entry| entry.file_name().to_string_lossy().starts_with("in-"));
        ensure!(
            coming.next().is_none(),
            "something that came is left at {}",
            node.name()
        );
    }
    Ok(())
}

/// What is bound.
const SOURCE: &str = "/srv/disk/volume";
const KILLS: [(&str, &str); 4] = [
    ("b", "receiving"),
    ("a", "copying"),
    ("b", "restoring"),
    ("a", "finishing"),
];
const MOVES: usize = 2;
const MEMORY: usize = 1 << 20; // 1 MiB: little beside the files
/// How long 1 GiB may take to be written.
const FILL_MAX: Duration = Duration::from_secs(120);
