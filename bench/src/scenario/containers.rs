//! `containers`: Redis in a container, moved to and fro under load, beside the same Redis as a bare
//! tree.
//!
//! At each node the container must be the runtime's own, and where it was nothing may be left of
//! it.

use anyhow::{Context, Result, bail};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use super::{
    container_faults, container_files, containerd, podman_bridge, podman_errors, shapes, volumes,
};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::workload::container::{self, Runtime};
use crate::workload::redis;

/// The scenario; its cases are the runtimes, a short one of all, and kills.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("containers are about what stock CRIU does not have")?;
    let only = settings.only.as_deref();
    if only == Some(CONTAINERD) {
        return containerd::moves(settings, report);
    }
    if let Some(shapes) = shapes_of(only) {
        return shapes::run(settings, shapes, report);
    }
    match only {
        Some(PODMAN_BRIDGE) => return podman_bridge::run(settings, report),
        Some(PODMAN_BRIDGE_FAULTS) => return container_faults::run_bridged(settings, report),
        Some(PODMAN_ERRORS) => return podman_errors::run(settings, report),
        _ => {}
    }
    if only == Some(PODMAN_VOLUME) {
        let mut lab = settings.lab_with(&container::LAYER, 2)?;
        let said = volumes::of_podman(&mut lab, report)?;
        println!("{PODMAN_VOLUME}: {said}");
        return Ok(());
    }
    if only == Some(CONTAINERD_VOLUME) {
        let mut lab = settings.lab_with(&crate::workload::containerd::LAYER, 2)?;
        let said = volumes::of_containerd(&mut lab, report)?;
        println!("{CONTAINERD_VOLUME}: {said}");
        return Ok(());
    }
    if only == Some(CONTAINERD_FILES) {
        return container_files::run_containerd(settings, report);
    }
    let Some((case, runtimes)) = case(only) else {
        let runtimes = Runtime::ALL.map(Runtime::name);
        bail!(
            "containers has no case {:?}, only {FEW:?}, {FAULTS:?}, {FILES:?}, {runtimes:?}, those \
             with -{FAULTS}, -{FILES} or -{FEW} behind them, {CONTAINERD:?}, {CONTAINERD_FILES:?}, \
             {PODMAN_BRIDGE:?}, {PODMAN_BRIDGE_FAULTS:?}, {PODMAN_ERRORS:?}, {PODMAN_VOLUME:?}, \
             {CONTAINERD_VOLUME:?}, and {SHAPES:?} and each of them by its name, also with crun- \
             before it",
            only.unwrap_or_default()
        );
    };
    let (moves, bytes) = match case {
        Case::Moves => (MOVES, BYTES),
        Case::Few => (MOVES_FEW, BYTES_FEW),
        Case::Faults => {
            let mut all = runtimes.into_iter();
            return all.try_for_each(|runtime| container_faults::run(settings, runtime, report));
        }
        Case::Files => {
            let mut all = runtimes.into_iter();
            return all.try_for_each(|runtime| container_files::run(settings, runtime, report));
        }
    };
    let dataset = Dataset::first_row(bytes);
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    let earlier = report.moves.len();
    let tree = redis::start(&mut lab, "a", &redis::plan())?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", tree, dataset, load)?;
    for _ in 0..moves {
        session.move_on(&lab, report)?;
    }
    session.finish(report)?.kill(&lab)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes("bare tree", &moved);
    report.print_figures("bare tree");
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    for runtime in runtimes {
        of_runtime(settings, &mut lab, runtime, (moves, dataset), report)?;
    }
    Ok(())
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

fn case(only: Option<&str>) -> Option<(Case, Vec<Runtime>)> {
    let all = Runtime::ALL.to_vec();
    let name = match only {
        None => return Some((Case::Moves, all)),
        Some(FEW) => return Some((Case::Few, all)),
        Some(FAULTS) => return Some((Case::Faults, all)),
        Some(FILES) => return Some((Case::Files, all)),
        Some(name) => name,
    };
    let (name, case) = match name.rsplit_once('-') {
        Some((name, FAULTS)) => (name, Case::Faults),
        Some((name, FILES)) => (name, Case::Files),
        Some((name, FEW)) => (name, Case::Few),
        _ => (name, Case::Moves),
    };
    Runtime::of(name).map(|runtime| (case, vec![runtime]))
}

fn of_runtime(
    settings: &Settings,
    lab: &mut Lab,
    runtime: Runtime,
    (moves, dataset): (usize, Dataset),
    report: &mut Report,
) -> Result<()> {
    let earlier = report.moves.len();
    let held = container::start(lab, runtime, "a")?;
    let container = held
        .container
        .clone()
        .context("it was started as a container")?;
    let load = LoadPlan::first_row();
    let mut session = Session::watch(lab, settings.mover, "a", held, dataset, load)?;
    for _ in 0..moves {
        let from = session.at.clone();
        if !session.move_on(lab, report)? {
            break;
        }
        let node = lab.node(&session.at)?;
        let here = container::check_here(node, &container, session.workload.pid);
        let gone = container::check_gone(lab.node(&from)?, &container);
        for wrong in [here, gone].into_iter().filter_map(Result::err) {
            report.fail(format!("{wrong:#}"));
        }
    }
    let at = session.at.clone();
    let workload = session.finish(report)?;
    let moved = report.moves[earlier..].to_vec();
    report.figure_downtimes(runtime.name(), &moved);
    report.print_figures(runtime.name());
    settings.mover.wait_settled(lab, SETTLE_TIME_MAX)?;
    if let Err(error) = container::end(lab.node(&at)?, &container) {
        report.fail(format!("{error:#}"));
    }
    workload.kill(lab)
}

/// What is done with the containers of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Moves,
    Few,
    Faults,
    Files,
}

/// The case that a test runs.
const FEW: &str = "few";
/// Kills at the gates.
const FAULTS: &str = "faults";
/// Files in their root file systems.
const FILES: &str = "files";
/// Of all that people run.
const SHAPES: &str = "shapes";
/// The network that podman gives.
const PODMAN_BRIDGE: &str = "podman-bridge";
const PODMAN_BRIDGE_FAULTS: &str = "podman-bridge-faults";
/// What is missing at a target.
const PODMAN_ERRORS: &str = "podman-errors";
/// A volume that podman has by its name.
const PODMAN_VOLUME: &str = "podman-volume";
/// A folder that is bound into one of containerd.
const CONTAINERD_VOLUME: &str = "containerd-volume";
/// Containerd's.
const CONTAINERD: &str = "containerd";
const CONTAINERD_FILES: &str = "containerd-files";
const MOVES: usize = 10;
const MOVES_FEW: usize = 2;
/// Values alone; Redis needs a quarter more for them.
const BYTES: u64 = 1 << 30; // 1 GiB
const BYTES_FEW: u64 = 64 << 20; // 64 MiB
