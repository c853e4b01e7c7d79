//! `lab bench`: runs a plan in one lab, and writes the series after every move, so that one that
//! is interrupted has lost nothing but the move it was at.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::layer::LAYER;
use super::plan::{Plan, Wanted, shuffled};
use super::series::{FILE, Run, Series};
use super::{identity, report, table, trial};
use crate::lab::network::{self, BRIDGE, Link};
use crate::lab::{Lab, LabOptions};

/// Runs a plan; the series is in the folder `out`. One that is there and is of the same machine,
/// kernel and sources is added to, any other is in the way.
pub fn run(plan: &Plan, out: &Path, command: &str) -> Result<Series> {
    let cells = plan.cells();
    ensure!(
        !cells.is_empty(),
        "no cell is called like that (lab bench --list)"
    );
    fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let path = out.join(FILE);
    let mut stage = Stage::set(&cells)?;
    let mut series = identity::begin(stage.lab()?, &path)?;
    identity::note_command(&mut series, command, plan.seed);
    identity::describe(&mut series, &cells);
    println!(
        "{} cells, {} runs each, seed {}, revision {}, into {}",
        cells.len(),
        plan.repeats,
        plan.seed,
        series.revision,
        path.display()
    );
    let fit = fit_ones(stage.lab()?, cells, &mut series)?;
    let begun = Instant::now();
    'all: for repeat in 0..plan.repeats {
        for index in shuffled(fit.len(), plan.seed, repeat) {
            if plan.budget.is_some_and(|budget| budget < begun.elapsed()) {
                println!("out of time: what is missing is not run");
                break 'all;
            }
            let cell = fit[index];
            let mut run = stage.run(plan, &cell)?;
            run.number = u32::try_from(series.runs()).unwrap_or(u32::MAX) + 1;
            println!("{}", table::line(&cell.name(), &run));
            cell.row(&mut series).runs.push(run);
            series.write(&path)?;
        }
    }
    series.write(&path)?;
    report::write(&series, &out.join(report::FILE))?;
    Ok(series)
}

/// Cells whose system can do its work here; why the others cannot is noted.
fn fit_ones(lab: &Lab, cells: Vec<Wanted>, series: &mut Series) -> Result<Vec<Wanted>> {
    let mut reasons: BTreeMap<&str, Option<String>> = BTreeMap::new();
    let mut fit = Vec::new();
    for cell in cells {
        let name = cell.system.name;
        if !reasons.contains_key(name) {
            let reason = cell.system.mover.unfit(lab)?;
            if let Some(reason) = &reason {
                println!("{name} is not run: {reason}");
            }
            reasons.insert(name, reason);
        }
        let link: Link = cell.link.name.parse()?;
        let reason = reasons.get(name).cloned().flatten();
        let reason = match reason {
            Some(reason) => Some(reason),
            None => match network::unfit(&lab.nodes, &link)? {
                Some(reason) => Some(reason),
                None => cell.crowded(available_bytes()?),
            },
        };
        let is_fit = reason.is_none();
        cell.row(series).unfit = reason;
        if is_fit {
            fit.push(cell);
        }
    }
    Ok(fit)
}

/// What the kernel says can be had without swapping.
fn available_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo does not say MemAvailable")? << 10)
}

/// The lab in which everything runs; it is made anew when a move has failed in it.
struct Stage {
    lab: Option<Lab>,
    daemons: bool,
    layer: bool,
}

impl Stage {
    fn set(cells: &[Wanted]) -> Result<Self> {
        let mut stage = Self {
            lab: None,
            daemons: cells.iter().any(|cell| cell.system.mover.needs_daemons()),
            layer: cells.iter().any(Wanted::needs_layer),
        };
        stage.bring_up()?;
        Ok(stage)
    }

    fn bring_up(&mut self) -> Result<()> {
        // There is one lab at a time.
        self.lab = None;
        self.lab = Some(Lab::up(&LabOptions {
            nodes: 2,
            link: Link::Unshaped,
            daemons: self.daemons,
            bridge: BRIDGE,
            layer: self.layer.then_some(&LAYER),
            programs: None,
            keep: false,
        })?);
        Ok(())
    }

    fn lab(&mut self) -> Result<&mut Lab> {
        self.lab.as_mut().context("the lab did not come up again")
    }

    /// Moves one workload once. What went wrong with it is in the run.
    fn run(&mut self, plan: &Plan, cell: &Wanted) -> Result<Run> {
        let link: Link = cell.link.name.parse()?;
        let lab = self.lab()?;
        lab.reshape(&link)?;
        let run = trial::run(lab, &cell.entry.kind, cell.system, plan.stretches);
        let run = run.unwrap_or_else(|error| trial::failed(format!("{error:#}")));
        // Whatever a move that failed has left would be the next one's.
        if run.failure.is_some() || WORKLOADS_MAX <= self.lab()?.workloads() {
            self.bring_up()?;
        }
        Ok(run)
    }
}

/// A lab has addresses for some more.
const WORKLOADS_MAX: usize = 120;
