//! `lab bench`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use pageferry_bench::bench::kinds::{KINDS, LINKS, SYSTEMS};
use pageferry_bench::bench::plan::Plan;
use pageferry_bench::bench::series::{FILE, Series};
use pageferry_bench::bench::{ab, published, readme, report, run, table};

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
    /// Run nothing: print the tables of the series in --out, and write its report anew.
    #[arg(long)]
    show: bool,
    /// Run nothing: print README's table of the series in --out, or of a file.
    #[arg(long)]
    readme: bool,
    /// With --show: also write the series without what only drawings need.
    #[arg(long, value_name = "FILE")]
    slim: Option<PathBuf>,
    /// Repeat a table of a paper as far as one machine allows: swiftbaton or kubespt.
    #[arg(long, value_name = "TABLE", conflicts_with_all = ["only", "full"])]
    table: Option<String>,
}

/// Two builds, and what they move.
#[derive(Debug, Args)]
pub struct AbArguments {
    /// A folder with programs, such as target/release of another work tree.
    base: PathBuf,
    head: PathBuf,
    /// The cells, as `lab bench --only` has them.
    #[arg(
        long,
        value_name = "PATTERN",
        default_value = "redis-ycsb-a/unshaped/pageferry"
    )]
    only: String,
    /// How many pairs of moves for each cell.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pairs: u32,
    /// Begin no pair after so many minutes.
    #[arg(long, value_name = "MINUTES")]
    budget: Option<u64>,
    #[arg(long)]
    seed: Option<u64>,
}

/// The subcommand `lab ab`.
pub fn run_ab(arguments: &AbArguments) -> Result<ExitCode> {
    let mut plan = Plan::quick(seed(arguments.seed)?);
    plan.only = Some(arguments.only.clone());
    plan.repeats = arguments.pairs;
    plan.budget = arguments
        .budget
        .map(|minutes| Duration::from_secs(minutes * 60));
    println!("seed {}", plan.seed);
    print!("{}", ab::run(&plan, [&arguments.base, &arguments.head])?);
    Ok(ExitCode::SUCCESS)
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        list();
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.readme {
        print!("{}", readme::section(&read(&arguments.out)?));
        return Ok(ExitCode::SUCCESS);
    }
    let series = if arguments.show {
        let series = read(&arguments.out)?;
        if let Some(file) = &arguments.slim {
            readme::slim(&series).write(file)?;
        }
        if arguments.out.is_dir() {
            report::write(&series, &arguments.out.join(report::FILE))?;
        }
        series
    } else {
        run::run(&plan(arguments)?, &arguments.out, &command())?
    };
    if arguments.json {
        println!(
            "{}",
            serde_json::to_string(&series).context("printing the series")?
        );
    } else {
        print!("{}", table::tables(&series));
        for table in published::ALL.iter() {
            if let Some(rows) = published::rows(table, &series) {
                println!("\n{}", table.title);
                print!("{}", table::aligned(&rows));
                println!("  {}", table.differs);
            }
        }
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
    let seed = seed(arguments.seed)?;
    let mut plan = if arguments.full {
        Plan::full(seed)
    } else {
        Plan::quick(seed)
    };
    plan.only.clone_from(&arguments.only);
    if let Some(name) = &arguments.table {
        let names = published::ALL.map(|table| table.name).join(" or ");
        let table = published::find(name).with_context(|| format!("tables are {names}"))?;
        plan.only = Some(table.pattern.to_owned());
    }
    plan.repeats = arguments.repeats.unwrap_or(plan.repeats);
    let budget = arguments
        .budget
        .map(|minutes| Duration::from_secs(minutes * 60));
    plan.budget = budget.or(plan.budget);
    Ok(plan)
}

fn seed(asked: Option<u64>) -> Result<u64> {
    if let Some(seed) = asked {
        return Ok(seed);
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Ok(since
        .context("this machine's clock is before 1970")?
        .as_secs())
}

/// The series of a folder, or of a file.
fn read(out: &Path) -> Result<Series> {
    if out.is_dir() {
        Series::read(&out.join(FILE))
    } else {
        Series::read(out)
    }
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
    if out.is_dir() {
        let [series, page] = [FILE, report::FILE].map(|file| out.join(file));
        println!(
            "\nthe series is {}, the report {}",
            series.display(),
            page.display()
        );
    }
}

/// The command line that this is, without the program's path.
fn command() -> String {
    let words = std::env::args().skip(1);
    let words: Vec<String> = ["lab".to_owned()].into_iter().chain(words).collect();
    words.join(" ")
}
