//! `containers --only RUNTIME-files`: a container that writes to its root file system, moved to and
//! fro while it does.
//!
//! Then whoever takes part is killed: the container runs at one node, with all its files, and
//! nothing of it is at the other.
//!
//! The writer knows every file of its own by heart. What it does not write is changed between
//! moves, files of the image too, and compared entry by entry: with what it was before the move,
//! and of a bundle with what has stayed at the source, which is the tree as it was in the freeze.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use xxhash_rust::xxh3::xxh3_64;

use super::faults::{signal_first, wait_for_phase};
use super::report::Report;
use super::settings::{Settings, other};
use super::writing::WriterSession;
use crate::client::writer;
use crate::cluster::wait::until;
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::workload::Workload;
use crate::workload::container::{self, BUNDLES, Plan, Runtime};
use crate::workload::containerd;
use crate::workload::whose::Whose;
use crate::writer::case::FILES;
use crate::writer::case::files::FOLDER;
use crate::writer::options::Options;

/// Moves a container there and back, and kills.
pub fn run(settings: &Settings, whose: Whose, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    let _engines = whose.start_engines(&lab)?;
    match whose {
        Whose::Runtime(_) => lab.nodes.iter().try_for_each(make_disk)?,
        Whose::Containerd => containerd::bring_image(&lab, &writer_plan().1)?,
    }
    run_in(&mut lab, whose, report)
}

fn run_in(lab: &mut Lab, whose: Whose, report: &mut Report) -> Result<()> {
    let (session, plan) = start(lab, whose)?;
    moves(lab, session, (whose.name(), &plan), report)?;
    let mut seen = 0;
    for kill in &KILLS {
        let came = kill.come(lab, whose, report);
        match came.with_context(|| format!("{} {kill:?}", whose.name())) {
            Ok(hit) => seen += usize::from(hit),
            Err(error) => {
                report.fail(format!("{error:#}"));
                // Its workload may be left.
                return Ok(());
            }
        }
    }
    ensure!(
        KILLS.len() <= seen + MISSED_MAX,
        "only {seen} states were seen"
    );
    Ok(())
}

/// Starts a writer in a container at node a.
pub(super) fn start(lab: &mut Lab, whose: Whose) -> Result<(WriterSession, Plan)> {
    let (options, plan) = writer_plan();
    let workload = whose.start(lab, "a", &plan)?;
    let client = writer::connect(lab, &workload, &options)?;
    let session = WriterSession::watch(lab, &Pageferry, "a", (workload, client))?;
    Ok((session, plan))
}

fn writer_plan() -> (Options, Plan) {
    let mut options = Options::new(MEMORY);
    FILES.name.clone_into(&mut options.case);
    let plan = Plan::writer(&options);
    (options, plan)
}

/// Changes what it does not write, moves it, and compares.
fn moves(
    lab: &Lab,
    mut session: WriterSession,
    (name, plan): (&str, &Plan),
    report: &mut Report,
) -> Result<()> {
    let earlier = report.moves.len();
    for (number, change) in CHANGES.iter().enumerate() {
        let from = session.at.clone();
        let node = lab.node(&from)?;
        shell(node, &session.workload, change)?;
        let before = describe(&root_at(node, &session.workload)?)?;
        let what = format!("move {}", number + 1);
        if !session.move_and_note(lab, &MoveOptions::default(), &what, report) {
            break;
        }
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let (here, there) = (lab.node(&session.at)?, lab.node(&from)?);
        session.workload.is_here_as(here, plan)?;
        session.workload.is_gone(there)?;
        compare(&before, &describe(&root_at(here, &session.workload)?)?)?;
        check_left(here, there, &session.workload)?;
        let entries = before.len();
        let last = report.moves.last().context("a move")?;
        println!(
            "  {from} -> {}: downtime {:.1} ms, {} rounds, {} KiB on the wire, {entries} entries \
             the same",
            session.at,
            last.downtime_ms,
            last.rounds,
            last.wire_bytes >> 10
        );
    }
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(&format!("{name}, files"), &moved);
    report.print_figures(&format!("{name}-files"));
    session.finish(lab, report)
}

fn shell(node: &Node, workload: &Workload, script: &str) -> Result<()> {
    match (&workload.container, &workload.containerd) {
        (Some(container), _) => container::shell(node, container, script),
        (_, Some(id)) => containerd::shell(node, id, script),
        (None, None) => bail!("it is in no container"),
    }
}

pub(super) fn root_at(node: &Node, workload: &Workload) -> Result<PathBuf> {
    match (&workload.container, &workload.containerd) {
        (Some(container), _) => container::root_at(node, container),
        (_, Some(id)) => Ok(containerd::root_at(node, id)),
        (None, None) => bail!("it is in no container"),
    }
}

/// Who is killed, and when.
#[derive(Debug)]
struct Kill {
    at: (&'static str, &'static str),
    /// Of the same node; a daemon is started again.
    who: &'static [Who],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Daemon,
    Pager,
    /// It has the root file system bound while it waits.
    Runtime,
}

impl Kill {
    /// Moves a container and kills; whether the moment was met.
    fn come(&self, lab: &mut Lab, whose: Whose, report: &mut Report) -> Result<bool> {
        let (mut session, plan) = start(lab, whose)?;
        let name = session.workload.name();
        let migration = Migration::start(lab.node("a")?, &name, "b", &MoveOptions::default())?;
        let hit = wait_for_phase(lab, &name, self.at)?.is_some();
        for who in self.who.iter().filter(|_| hit) {
            let node = self.at.0;
            let command = match who {
                Who::Daemon => {
                    lab.daemon(node)?.kill()?;
                    lab.restart_daemon(node)?;
                    continue;
                }
                Who::Pager => "pageferry-pager",
                Who::Runtime => whose.program(),
            };
            signal_first(lab, node, command, Signal::SIGKILL)?;
        }
        migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let left = settle(lab, &mut session)?;
        let (here, gone) = (lab.node(&session.at)?, lab.node(left)?);
        session.workload.is_here_as(here, &plan)?;
        // A runtime that was killed may be outlived for a moment by what it has left.
        until("nothing is left of it", SETTLE_TIME_MAX, || {
            session.workload.is_gone(gone)
        })?;
        if let Some(container) = &session.workload.container {
            let bundle = container::bundle(&container.id);
            ensure!(!gone.path(&bundle).exists(), "{bundle} is at {left} too");
        }
        let hidden = format!("{BUNDLES}/.pageferry-files");
        ensure!(
            left == "a" || !gone.path(&hidden).exists(),
            "{hidden} is left at {left}"
        );
        println!(
            "  killed {:?} at {:?}: runs on at {} (seen: {hit})",
            self.who, self.at, session.at
        );
        report.note_contents(true);
        session.finish(lab, report)?;
        for node in &lab.nodes {
            let clean = format!("rm -rf {BUNDLES}/* {hidden}");
            node.command("sh")?.args(["-c", &clean]).run()?;
        }
        Ok(hit)
    }
}

/// Sees at which node it runs, and that its files are right there; the other one.
fn settle(lab: &Lab, session: &mut WriterSession) -> Result<&'static str> {
    let answers = session
        .prober
        .wait_for_answer_after(Instant::now(), ANSWER_TIME_MAX);
    ensure!(answers, "it does not answer: {:?}", session.prober.broken());
    session.client.verify()?;
    let mut here = Vec::new();
    for node in &lab.nodes {
        let writers = node.processes_named(WRITER);
        ensure!(writers.len() <= 1, "node {} has {writers:?}", node.name());
        here.extend(writers.first().map(|pid| (node.name(), *pid)));
    }
    let [(name, pid)] = here[..] else {
        bail!("it runs at {} nodes", here.len());
    };
    (session.at, session.workload.pid) = (name.to_owned(), pid);
    Ok(other(name))
}

const KILLS: [Kill; 9] = [
    kill(("b", "receiving"), &[Who::Runtime]),
    kill(("b", "receiving"), &[Who::Daemon]),
    kill(("b", "receiving"), &[Who::Pager]),
    kill(("b", "receiving"), &[Who::Runtime, Who::Pager, Who::Daemon]),
    kill(("b", "restoring"), &[Who::Daemon]),
    kill(("b", "restoring"), &[Who::Runtime]),
    kill(("a", "copying"), &[Who::Daemon]),
    kill(("a", "copying"), &[Who::Runtime]),
    kill(("a", "finishing"), &[Who::Daemon]),
];

const fn kill(at: (&'static str, &'static str), who: &'static [Who]) -> Kill {
    Kill { at, who }
}

const WRITER: &str = "lab-writer";
/// A client asks again after twice the time it has waited.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Some last for milliseconds.
const MISSED_MAX: usize = 3;

/// Gives a node a disk of its own for bundles.
pub(super) fn make_disk(node: &Node) -> Result<()> {
    let own = format!("{SHARED}/bundles-{}", node.name());
    let script = format!("mkdir -p {BUNDLES} {own} && mount --bind {own} {BUNDLES}");
    node.command("sh")?.args(["-ec", &script]).run().map(drop)
}

/// Whether the source has nothing under the live name, and what it has set aside is what the
/// target has, but for what is written there.
fn check_left(here: &Node, there: &Node, workload: &Workload) -> Result<()> {
    let container = match &workload.container {
        Some(container) if container.runtime != Runtime::Podman => container,
        // Engines remove their layers.
        _ => return Ok(()),
    };
    let bundle = container::bundle(&container.id);
    let live = there.path(&bundle);
    ensure!(!live.exists(), "{bundle} is still at {}", there.name());
    let hidden = there.path(format!("{BUNDLES}/.pageferry-files"));
    let mut kept = fs::read_dir(&hidden)
        .with_context(|| format!("looking for what node {} keeps", there.name()))?;
    let (Some(kept), None) = (kept.next(), kept.next()) else {
        bail!("node {} keeps none, or several", there.name());
    };
    let before = describe(&kept?.path().join("tree/rootfs"))?;
    compare(&before, &describe(&container::root_at(here, container)?)?)
}

/// Fails unless both are the same.
pub(super) fn compare(before: &Entries, after: &Entries) -> Result<()> {
    for (name, entry) in before {
        let now = after.get(name);
        ensure!(
            now == Some(entry),
            "{} was {entry}, and is {now:?}",
            name.display()
        );
    }
    let more = after.keys().find(|name| !before.contains_key(*name));
    ensure!(more.is_none(), "{more:?} is new");
    Ok(())
}

/// What there is, by its path.
pub(super) type Entries = BTreeMap<PathBuf, String>;

/// What each entry is, but for what the writer writes.
fn describe(root: &Path) -> Result<Entries> {
    // CRIU makes a folder in the other one while it dumps, and removes it.
    describe_but(root, &[FOLDER.trim_start_matches('/'), "tmp"])
}

/// What each entry is, but for these and what is in them.
pub(super) fn describe_but(root: &Path, but: &[&str]) -> Result<Entries> {
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if but.iter().any(|but| path == root.join(but)) {
                continue;
            }
            let metadata = fs::symlink_metadata(&path)?;
            let contents = if metadata.is_file() {
                format!("{:016x}", xxh3_64(&fs::read(&path)?))
            } else if metadata.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else {
                metadata.rdev().to_string()
            };
            let (size, names) = match metadata.is_dir() {
                true => (0, 0),
                false => (metadata.len(), metadata.nlink()),
            };
            let entry = format!(
                "{:o} {}:{} {size} {names} {}.{:09} {contents}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.mtime(),
                metadata.mtime_nsec()
            );
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            all.insert(path.strip_prefix(root)?.to_owned(), entry);
        }
    }
    Ok(all)
}

/// What is done in the container before a move, one after the other.
const CHANGES: [&str; 4] = [
    "rm /etc/deleted; rm -r /opt/dir; mkdir /opt/dir; echo new >/opt/dir/one; chmod 600 /etc/kept",
    "echo again >/etc/deleted; mkdir /opt/dir/inner; mv /etc/moved /opt; touch -d @5 /opt/dir",
    "rm /etc/deleted /opt/moved; rm -r /opt/dir/inner; mv /opt/dir /opt/other; mkdir /opt/dir",
    "rm -r /opt/dir; echo file >/opt/dir; mkdir -p /etc/deleted/in; ln /etc/kept /link",
];
const MEMORY: usize = 1 << 20; // 1 MiB: little beside the files
