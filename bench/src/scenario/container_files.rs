//! `containers --only RUNTIME-files`: a container that writes to its root file system, moved to and
//! fro while it does.
//!
//! Then whoever takes part is killed: the container runs at one node, with all its files, and
//! nothing of it is at the other.
//!
//! The writer knows every file of its own by heart. What it does not write is compared entry by
//! entry with what has stayed at the source, which is the tree as it was in the freeze.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use xxhash_rust::xxh3::xxh3_64;

use super::faults::{Survivor, judge, signal_first, wait_for_phase};
use super::report::Report;
use super::settings::Settings;
use super::writing::WriterSession;
use crate::client::writer;
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::workload::container::{self, BUNDLES, Container, Plan, Runtime};
use crate::writer::case::FILES;
use crate::writer::case::files::FOLDER;
use crate::writer::options::Options;

/// Moves a container of `runtime` there and back.
pub fn run(settings: &Settings, runtime: Runtime, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    for node in &lab.nodes {
        make_disk(node)?;
    }
    let (mut session, container, plan) = start(&mut lab, runtime)?;
    let earlier = report.moves.len();
    for number in 1..=MOVES {
        let from = session.at.clone();
        let what = format!("move {number}");
        if !session.move_and_note(&lab, &MoveOptions::default(), &what, report) {
            break;
        }
        wait_settled(&lab, SETTLE_TIME_MAX)?;
        let (here, there) = (lab.node(&session.at)?, lab.node(&from)?);
        container::check_here_as(here, &container, session.workload.pid, &plan)?;
        container::check_gone(there, &container)?;
        let entries = check_moved(here, there, &container)?;
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
    report.figure_downtimes(&format!("{}, files", runtime.name()), &moved);
    report.print_figures(&format!("{}-files", runtime.name()));
    session.finish(&lab, report)?;
    let mut seen = 0;
    for kill in &KILLS {
        let came = kill.come(&mut lab, runtime, report);
        match came.with_context(|| format!("{} {kill:?}", runtime.name())) {
            Ok(hit) => seen += usize::from(hit),
            Err(error) => {
                report.fail(format!("{error:#}"));
                // Its workload may be left.
                return Ok(());
            }
        }
    }
    ensure!(KILLS.len() <= seen + MISSED_MAX, "only {seen} states were seen");
    Ok(())
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
    fn come(&self, lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<bool> {
        let (mut session, container, plan) = start(lab, runtime)?;
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
                Who::Runtime => runtime.program(),
            };
            signal_first(lab, node, command, Signal::SIGKILL)?;
        }
        migration.finish()?;
        wait_settled(lab, SETTLE_TIME_MAX)?;
        let survivor = judge(lab, &mut session)?;
        let (at, left) = match survivor {
            Survivor::Source => ("a", "b"),
            Survivor::Target => ("b", "a"),
            Survivor::NobodyFrozen => bail!("nobody runs"),
        };
        session.at = at.to_owned();
        let here = lab.node(at)?;
        let pid = here.processes_named("lab-writer").first().copied();
        session.workload.pid = pid.context("no writer is there")?;
        container::check_here_as(here, &container, session.workload.pid, &plan)?;
        let gone = lab.node(left)?;
        container::check_gone(gone, &container)?;
        let bundle = container::bundle(&container.id);
        ensure!(!gone.path(&bundle).exists(), "{bundle} is at {left} too");
        let hidden = format!("{BUNDLES}/.pageferry-files");
        ensure!(
            survivor == Survivor::Target || !gone.path(&hidden).exists(),
            "{hidden} is left at {left}"
        );
        println!("  killed {:?} at {:?}: {survivor:?} runs on (seen: {hit})", self.who, self.at);
        report.note_contents(true);
        session.finish(lab, report)?;
        for node in &lab.nodes {
            let clean = format!("rm -rf {BUNDLES}/* {hidden}");
            node.command("sh")?.args(["-c", &clean]).run()?;
        }
        Ok(hit)
    }
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

/// Some last for milliseconds.
const MISSED_MAX: usize = 3;

/// Starts a writer in a container at node a.
pub fn start(lab: &mut Lab, runtime: Runtime) -> Result<(WriterSession, Container, Plan)> {
    let mut options = Options::new(MEMORY);
    FILES.name.clone_into(&mut options.case);
    let plan = Plan::writer(&options);
    let workload = container::start_with(lab, runtime, "a", &plan)?;
    let container = workload.container.clone();
    let container = container.context("it was started as a container")?;
    let client = writer::connect(lab, &workload, &options)?;
    let session = WriterSession::watch(lab, &Pageferry, "a", (workload, client))?;
    Ok((session, container, plan))
}

/// Gives a node a disk of its own for bundles.
pub fn make_disk(node: &Node) -> Result<()> {
    let own = format!("{SHARED}/bundles-{}", node.name());
    let script = format!("mkdir -p {BUNDLES} {own} && mount --bind {own} {BUNDLES}");
    node.command("sh")?.args(["-ec", &script]).run().map(drop)
}

/// Whether the source has nothing under the live name, and what it has set aside is what the
/// target has, but for what is written there; how many entries that are.
fn check_moved(here: &Node, there: &Node, container: &Container) -> Result<usize> {
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
    let after = describe(&here.path(format!("{bundle}/rootfs")))?;
    for (name, entry) in &before {
        let now = after.get(name);
        ensure!(now == Some(entry), "{name:?} was {entry}, and is {now:?}");
    }
    let more = after.keys().find(|name| !before.contains_key(*name));
    ensure!(more.is_none(), "{more:?} is new");
    Ok(before.len())
}

/// What each entry is, but for what the writer writes.
fn describe(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let written = root.join(FOLDER.trim_start_matches('/'));
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path == written {
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

const MOVES: usize = 4;
const MEMORY: usize = 1 << 20; // 1 MiB: little beside the files
