//! `containers`: Redis in a container, moved to and fro under load, beside the same Redis as a bare
//! tree.
//!
//! At each node the container must be the runtime's own, and where it was nothing may be left of
//! it.

use anyhow::{Result, bail};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use super::{
    container_disk, container_errors, container_faults, container_files, podman_bridge,
    podman_errors, podman_pod, shapes, volumes,
};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::workload::container::{self, Runtime};
use crate::workload::whose::Whose;
use crate::workload::{containerd, redis};

/// The scenario; its cases are the runtimes, a short one of all, and kills.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("containers are about what stock CRIU does not have")?;
    let only = settings.only.as_deref();
    if let Some(shapes) = shapes_of(only) {
        return shapes::run(settings, shapes, report);
    }
    match only {
        Some(PODMAN_BRIDGE) => return podman_bridge::run(settings, report),
        Some(PODMAN_BRIDGE_FAULTS) => return container_faults::run_bridged(settings, report),
        Some(PODMAN_ERRORS) => return podman_errors::run(settings, report),
        Some(PODMAN_POD) => return podman_pod::run(settings, report),
        _ => {}
    }
    if let Some(which) = only.and_then(|only| only.strip_prefix(PODMAN_POD_FAULTS)) {
        return container_faults::run_pod(settings, which.trim_start(), report);
    }
    if only == Some(PODMAN_VOLUME) {
        let mut lab = settings.lab_with(&container::LAYER, 2)?;
        let said = volumes::of_podman(&mut lab, report)?;
        println!("{PODMAN_VOLUME}: {said}");
        return Ok(());
    }
    if only == Some(CONTAINERD_VOLUME) {
        let mut lab = settings.lab_with(&containerd::LAYER, 2)?;
        let said = volumes::of_containerd(&mut lab, report)?;
        println!("{CONTAINERD_VOLUME}: {said}");
        return Ok(());
    }
    let Some((case, all)) = case(only) else {
        let cases: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
        bail!(
            "containers has no case {:?}, only those of {cases:?} (lab list says what they are)",
            only.unwrap_or_default()
        );
    };
    let mut all = all.into_iter();
    match case {
        Case::Moves => moves(settings, all.as_slice(), (MOVES, BYTES), report),
        Case::Few => moves(settings, all.as_slice(), (MOVES_FEW, BYTES_FEW), report),
        Case::Faults => all.try_for_each(|whose| container_faults::run(settings, whose, report)),
        Case::Files => all.try_for_each(|whose| container_files::run(settings, whose, report)),
        Case::Errors => all.try_for_each(|whose| container_errors::run(settings, whose, report)),
        Case::Disk => all.try_for_each(|whose| container_disk::run(settings, whose, report)),
    }
}

/// Moves a bare tree, and then the containers of each: those whose nodes have the same layer in one
/// lab.
fn moves(
    settings: &Settings,
    all: &[Whose],
    (moves, bytes): (usize, u64),
    report: &mut Report,
) -> Result<()> {
    let dataset = Dataset::first_row(bytes);
    let labs = all.chunk_by(|one, next| one.layer().name == next.layer().name);
    for (number, owners) in labs.enumerate() {
        let mut lab = settings.lab_with(owners[0].layer(), 2)?;
        if number == 0 {
            of_tree(settings, &mut lab, (moves, dataset), report)?;
        }
        let _engines = owners[0].start_engines(&lab)?;
        for whose in owners {
            of_container(settings, &mut lab, *whose, (moves, dataset), report)?;
        }
    }
    Ok(())
}

fn of_tree(
    settings: &Settings,
    lab: &mut Lab,
    (moves, dataset): (usize, Dataset),
    report: &mut Report,
) -> Result<()> {
    let earlier = report.moves.len();
    let tree = redis::start(lab, "a", &redis::plan())?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(lab, settings.mover, "a", tree, dataset, load)?;
    for _ in 0..moves {
        session.move_on(lab, report)?;
    }
    session.finish(report)?.kill(lab)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes("bare tree", &moved);
    report.print_figures("bare tree");
    settings.mover.wait_settled(lab, SETTLE_TIME_MAX)
}

/// Whose shapes are asked for, and which of them.
fn shapes_of(only: Option<&str>) -> Option<(Runtime, Option<&str>)> {
    let (runtime, name) = match only?.strip_prefix("crun-") {
        Some(name) => (Runtime::Crun, name),
        None => (Runtime::Runc, only?),
    };
    match name {
        SHAPES => Some((runtime, None)),
        name if shapes::has(name) => Some((runtime, Some(name))),
        _ => None,
    }
}

fn case(only: Option<&str>) -> Option<(Case, Vec<Whose>)> {
    let all = Whose::ALL.to_vec();
    let name = match only {
        None => return Some((Case::Moves, all)),
        Some(FEW) => return Some((Case::Few, all)),
        Some(FAULTS) => return Some((Case::Faults, all)),
        Some(FILES) => return Some((Case::Files, all)),
        Some(ERRORS) => return Some((Case::Errors, Case::Errors.of(all))),
        Some(DISK) => return Some((Case::Disk, vec![Whose::Runtime(Runtime::Runc)])),
        Some(name) => name,
    };
    let (name, case) = match name.rsplit_once('-') {
        Some((name, FAULTS)) => (name, Case::Faults),
        Some((name, FILES)) => (name, Case::Files),
        Some((name, FEW)) => (name, Case::Few),
        Some((name, ERRORS)) => (name, Case::Errors),
        Some((name, DISK)) => (name, Case::Disk),
        _ => (name, Case::Moves),
    };
    let owners = case.of(Whose::of(name).into_iter().collect());
    owners.first()?;
    Some((case, owners))
}

fn of_container(
    settings: &Settings,
    lab: &mut Lab,
    whose: Whose,
    (moves, dataset): (usize, Dataset),
    report: &mut Report,
) -> Result<()> {
    let earlier = report.moves.len();
    let held = whose.start_redis(lab, "a")?;
    // What is looked at after each move is so before the first.
    held.is_here(lab.node("a")?)?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(lab, settings.mover, "a", held, dataset, load)?;
    for _ in 0..moves {
        let from = session.at.clone();
        if !session.move_on(lab, report)? {
            break;
        }
        settings.mover.wait_settled(lab, SETTLE_TIME_MAX)?;
        let here = session.workload.is_here(lab.node(&session.at)?);
        let gone = session.workload.is_gone(lab.node(&from)?);
        for wrong in [here, gone].into_iter().filter_map(Result::err) {
            report.fail(format!("{wrong:#}"));
        }
    }
    let at = session.at.clone();
    let workload = session.finish(report)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(whose.name(), &moved);
    report.print_figures(whose.name());
    settings.mover.wait_settled(lab, SETTLE_TIME_MAX)?;
    if let Err(error) = workload.end(lab.node(&at)?) {
        report.fail(format!("{error:#}"));
    }
    lab.nodes
        .iter()
        .try_for_each(|node| workload.is_whole(node))?;
    workload.kill(lab)
}

/// Its cases, where OWNER is one of [`Whose::ALL`], and what they are.
pub const CASES: [(&str, &str); 14] = [
    (
        "OWNER",
        "10 moves of a bare tree, and of a container of theirs",
    ),
    ("few, OWNER-few", "2 moves each, of 64 MiB"),
    (
        "faults, OWNER-faults",
        "kill -9 of whoever takes part, at each gate",
    ),
    (
        "files, OWNER-files",
        "a writable root file system, with kills",
    ),
    (
        "errors, OWNER-errors",
        "what a node lacks, not of podman: one error each, the source untouched",
    ),
    (
        "disk, RUNTIME-disk",
        "a sparse file and full disks, of runc or crun",
    ),
    ("shapes, crun-shapes", "containers as people run them"),
    (
        "NAME, crun-NAME",
        "one of the shapes: hardened, nginx, postgresql, refused, volume, volume-killed",
    ),
    ("podman-volume, containerd-volume", "volumes of engines"),
    (
        "podman-bridge",
        "a container on the network that podman gives",
    ),
    ("podman-bridge-faults", "kill -9 while that is made"),
    ("podman-errors", "what a node of podman lacks"),
    (
        "podman-pod",
        "a pod of three containers that talk to each other, there and back twice",
    ),
    (
        "podman-pod-faults, \"podman-pod-faults WHICH\"",
        "kill -9 of whoever moves one of them; WHICH: of these names only, as \"PostRestore \
         Target\"",
    ),
];

/// What is done with the containers of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Moves,
    Few,
    Faults,
    Files,
    Errors,
    Disk,
}

impl Case {
    /// Those of whom it is.
    fn of(self, mut all: Vec<Whose>) -> Vec<Whose> {
        all.retain(|whose| match (self, whose) {
            (Self::Errors, whose) => *whose != Whose::Runtime(Runtime::Podman),
            (Self::Disk, Whose::Runtime(runtime)) => *runtime != Runtime::Podman,
            (Self::Disk, Whose::Containerd) => false,
            (Self::Moves | Self::Few | Self::Faults | Self::Files, _) => true,
        });
        all
    }
}

/// The case that a test runs.
const FEW: &str = "few";
/// Kills at the gates.
const FAULTS: &str = "faults";
/// Files in their root file systems.
const FILES: &str = "files";
/// What a node may lack.
const ERRORS: &str = "errors";
/// A sparse file, and disks that are full.
const DISK: &str = "disk";
/// Of all that people run.
const SHAPES: &str = "shapes";
/// The network that podman gives.
const PODMAN_BRIDGE: &str = "podman-bridge";
const PODMAN_BRIDGE_FAULTS: &str = "podman-bridge-faults";
/// Several containers, which move as one.
const PODMAN_POD: &str = "podman-pod";
const PODMAN_POD_FAULTS: &str = "podman-pod-faults";
/// What is missing at a target.
const PODMAN_ERRORS: &str = "podman-errors";
/// A volume that podman has by its name.
const PODMAN_VOLUME: &str = "podman-volume";
/// A folder that is bound into one of containerd.
const CONTAINERD_VOLUME: &str = "containerd-volume";
const MOVES: usize = 10;
const MOVES_FEW: usize = 2;
/// Values alone; Redis needs a quarter more for them.
const BYTES: u64 = 1 << 30; // 1 GiB
const BYTES_FEW: u64 = 64 << 20; // 64 MiB
