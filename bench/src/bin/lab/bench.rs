//! `lab bench`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use pageferry_bench::bench::kinds::{KINDS, LINKS, SYSTEMS};
use pageferry_bench::bench::plan::Plan;
use pageferry_bench::bench::series::{FILE, Series};
use pageferry_bench::bench::{run, table};

/// What is run, and where it goes.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Three runs of the cells that tell most, within 20 minutes; the default.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Five runs of every cell, for hours: in pieces by --only, into the same --out.
    #[arg(long)]
    full: bool,
    /// Only cells like this: WORKLOAD/LINK/SYSTEM, or the name of one of these; with * for
    /// anything, and commas between several.
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Where series.json and report.html are written; a series of this machine and revision that is
    /// there is added to.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Print the series as JSON at the end.
    #[arg(long)]
    json: bool,
    /// How many runs of each cell.
    #[arg(long, value_name = "N")]
    repeats: Option<u32>,
    /// Begin no run after so many minutes.
    #[arg(long, value_name = "MINUTES")]
    budget: Option<u64>,
    /// What the order of the runs is made of.
    #[arg(long)]
    seed: Option<u64>,
    /// Name the workloads, links and systems.
    #[arg(long)]
    list: bool,
    /// Run nothing: print the tables of the series in --out.
    #[arg(long)]
    show: bool,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        list();
        return Ok(ExitCode::SUCCESS);
    }
    let series = if arguments.show {
        Series::read(&arguments.out.join(FILE))?
    } else {
        run::run(&plan(arguments)?, &arguments.out, &command())?
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&series).context("printing the series")?);
    } else {
        print!("{}", table::tables(&series));
        say_where(&arguments.out);
    }
    let failed = series.cells.iter().any(|cell| {
        let all = cell.runs.iter();
        cell.system.starts_with("pageferry") && all.clone().any(|run| run.failure.is_some())
    });
    // What fails for a peer is a result; what fails for us is a fault.
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .context("this machine's clock is before 1970")?
            .as_secs(),
    };
    let mut plan = if arguments.full {
        Plan::full(seed)
    } else {
        Plan::quick(seed)
    };
    plan.only.clone_from(&arguments.only);
    plan.repeats = arguments.repeats.unwrap_or(plan.repeats);
    let budget = arguments.budget.map(|minutes| Duration::from_secs(minutes * 60));
    plan.budget = budget.or(plan.budget);
    Ok(plan)
}

fn list() {
    println!("workloads:");
    for entry in &KINDS {
        let kind = &entry.kind;
        let ratio = kind.compression();
        println!("  {:<20} {} (LZ4 {ratio:.2}:1)", kind.name, kind.summary);
    }
    println!("links:");
    for link in &LINKS {
        println!("  {:<20} {}", link.name, link.summary);
    }
    println!("systems:");
    for system in &SYSTEMS {
        println!("  {:<20} {}", system.name, system.summary);
    }
}

fn say_where(out: &Path) {
    println!("\nthe series is in {}", out.join(FILE).display());
}

/// The command line that this is, without the program's path.
fn command() -> String {
    let words = std::env::args().skip(1);
    let words: Vec<String> = ["lab".to_owned()].into_iter().chain(words).collect();
    words.join(" ")
}
