//! `lab`: brings labs up and down and runs scenarios in them.

#[path = "lab/bench.rs"]
mod bench;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use pageferry_bench::app::layer::LAYER;
use pageferry_bench::client::writer;
use pageferry_bench::cluster::{self, Cluster, laps::Laps};
use pageferry_bench::lab::inside::Inside;
use pageferry_bench::lab::network::{BRIDGE, Link};
use pageferry_bench::lab::{self, Lab, LabOptions};
use pageferry_bench::mover::Mover;
use pageferry_bench::mover::images;
use pageferry_bench::mover::pageferry::Pageferry;
use pageferry_bench::mover::stock_criu::StockCriu;
use pageferry_bench::scenario;
use pageferry_bench::scenario::settings::Settings;
use pageferry_bench::workload::whose::Whose;
use pageferry_bench::workload::{WorkloadPlan, launch, nginx, redis};
use pageferry_bench::writer::options::Options;

/// Nodes on one machine to try live migration on.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring up a lab and leave it up.
    Up {
        /// How many nodes: a, b, …
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Speed of the links: "unshaped", or a rate such as 1gbit.
        #[arg(long, default_value = "unshaped")]
        link: Link,
        /// Without pageferryd on the nodes.
        #[arg(long)]
        bare: bool,
        /// With the applications of the scenario `apps`.
        #[arg(long)]
        apps: bool,
        /// As a Kubernetes cluster, whose nodes are node-a, node-b, …
        #[arg(long, conflicts_with = "apps")]
        kubernetes: bool,
    },
    /// Run kubectl in the cluster of the lab that is up, as its administrator.
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a command in a node of the lab that is up.
    Exec {
        node: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Start a workload in the lab that is up, and print its name.
    Start {
        node: String,
        workload: Kind,
        /// Arguments of the writer, such as memory=1G hot=64M rate=5000 case=fork; or more of
        /// Redis'.
        #[arg(last = true)]
        arguments: Vec<String>,
        /// With a pid and a mount namespace of its own too.
        #[arg(long)]
        own_pid_mnt: bool,
    },
    /// Show the lab that is up.
    Status,
    /// Take the lab down, also what a killed one left.
    Down,
    /// Run one scenario, from bringing a lab up to taking it down.
    Run {
        scenario: String,
        /// Write what was seen to this file as one JSON object.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Speed of the links; each scenario has its own default.
        #[arg(long)]
        link: Option<Link>,
        /// Leave the lab up afterwards.
        #[arg(long)]
        keep: bool,
        /// Move by stock CRIU instead of pageferry (a scenario whose clients do not survive that is
        /// wrong itself).
        #[arg(long)]
        baseline: bool,
        /// Of a scenario with cases, only this one; of `cases` and `apps` several, with commas
        /// between them.
        #[arg(long)]
        only: Option<String>,
        /// Of `demo`, move a container instead of a bare tree: of runc, or of crun, podman or
        /// containerd.
        #[arg(long, value_name = "RUNTIME", num_args = 0..=1, default_missing_value = "runc",
              value_parser = whose)]
        container: Option<Whose>,
    },
    /// Move workloads over links by pageferry and its peers, and compare.
    Bench(bench::Arguments),
    /// Compare two builds: their moves mixed in one run, with a rank test.
    Ab(bench::AbArguments),
    /// Name the scenarios.
    List,
    /// Process 1 of a node.
    #[command(hide = true)]
    NodeInit,
    /// Hold namespaces.
    #[command(hide = true)]
    Hold,
    /// Start a workload.
    #[command(hide = true)]
    Launch,
    /// Send the files of a folder to another node.
    #[command(hide = true)]
    SendImages { folder: PathBuf, target: Ipv4Addr },
    /// Take the files that another node sends.
    #[command(hide = true)]
    ReceiveImages { folder: PathBuf },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Nginx,
    Redis,
    Writer,
}

fn whose(name: &str) -> Result<Whose, String> {
    Whose::of(name).ok_or_else(|| {
        let names = Whose::ALL.map(Whose::name).join(", ");
        format!("it is one of {names}")
    })
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up {
            nodes,
            link,
            bare,
            apps,
            kubernetes,
        } => match kubernetes {
            true => up_with_kubernetes(nodes, link, !bare),
            false => up(nodes, link, !bare, apps),
        },
        Command::Kubectl { arguments } => {
            let kubectl = cluster::kubectl(&Lab::attach()?)?;
            run_in_front(kubectl.command()?.args(arguments))
        }
        Command::Exec { node, command } => exec(&node, &command),
        Command::Start {
            node,
            workload,
            arguments,
            own_pid_mnt,
        } => start(&node, workload, arguments, own_pid_mnt),
        Command::Status => {
            print_status(&Lab::attach()?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Down => lab::down().map(|()| ExitCode::SUCCESS),
        Command::Run {
            scenario,
            json,
            link,
            keep,
            baseline,
            only,
            container,
        } => {
            let Some(scenario) = scenario::find(&scenario) else {
                bail!("no scenario is called {scenario:?} (lab list)")
            };
            let mover: &dyn Mover = if baseline { &StockCriu } else { &Pageferry };
            let ok = scenario.run(
                &Settings {
                    link,
                    keep,
                    mover,
                    only,
                    container,
                },
                json.as_deref(),
            )?;
            Ok(if ok {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Ab(arguments) => bench::run_ab(&arguments),
        Command::List => {
            list();
            Ok(ExitCode::SUCCESS)
        }
        Command::NodeInit => lab::init::node_init().map(|()| ExitCode::SUCCESS),
        Command::Hold => lab::init::hold().map(|()| ExitCode::SUCCESS),
        Command::Launch => launch::launcher().map(|()| ExitCode::SUCCESS),
        Command::SendImages { folder, target } => {
            images::send(&folder, target).map(|()| ExitCode::SUCCESS)
        }
        Command::ReceiveImages { folder } => images::receive(&folder).map(|()| ExitCode::SUCCESS),
    }
}

fn list() {
    for scenario in &scenario::ALL {
        println!("{:<14} {}", scenario.name, scenario.summary);
        let cases = scenario.named_cases().iter();
        cases.for_each(|(name, what)| println!("  --only {name}: {what}"));
    }
}

fn up(nodes: usize, link: Link, daemons: bool, apps: bool) -> Result<ExitCode> {
    let lab = Lab::up(&LabOptions {
        nodes,
        link,
        daemons,
        bridge: BRIDGE,
        layer: apps.then_some(&LAYER),
        programs: None,
        keep: true,
    })?;
    print_status(&lab);
    Ok(ExitCode::SUCCESS)
}

fn up_with_kubernetes(nodes: usize, link: Link, daemons: bool) -> Result<ExitCode> {
    let mut laps = Laps::start();
    let mut lab = Lab::up(&cluster::lab_options(nodes, link, daemons)?)?;
    laps.lap("nodes are up");
    Cluster::up(&lab, &mut laps)?;
    lab.keep()?;
    print_status(&lab);
    Ok(ExitCode::SUCCESS)
}

fn exec(node: &str, command: &[String]) -> Result<ExitCode> {
    let lab = Lab::attach()?;
    run_in_front(lab.node(node)?.command(&command[0])?.args(&command[1..]))
}

/// Runs a command with the input and output of this one.
fn run_in_front(command: Inside) -> Result<ExitCode> {
    let status = command.stdin(Stdio::inherit()).spawn()?.wait()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn start(node: &str, kind: Kind, arguments: Vec<String>, own_pid_mnt: bool) -> Result<ExitCode> {
    let mut lab = Lab::attach()?;
    let workload = match kind {
        Kind::Nginx => nginx::start(&mut lab, node)?,
        Kind::Redis => {
            let mut plan = redis::plan();
            plan.arguments.extend(arguments);
            plan.own_pid_mnt = own_pid_mnt;
            redis::start(&mut lab, node, &plan)?
        }
        Kind::Writer => {
            let options = Options::parse(&arguments)?;
            let change = |plan: &mut WorkloadPlan| plan.own_pid_mnt = own_pid_mnt;
            writer::start(&mut lab, node, &options, change)?.0
        }
    };
    println!("{} at {}", workload.name(), workload.link.address);
    Ok(ExitCode::SUCCESS)
}

fn print_status(lab: &Lab) {
    println!(
        "links {}, logs in {}",
        lab.link(),
        lab.folder.logs().display()
    );
    for node in &lab.nodes {
        let daemon = match node.processes_named("pageferryd").first() {
            Some(pid) => format!("pageferryd is {pid}"),
            None => "no pageferryd".to_owned(),
        };
        let workloads = node.workload_pids();
        let names: Vec<String> = workloads
            .iter()
            .map(|pid| format!("process/{pid}"))
            .collect();
        println!(
            "node {}  {}  {daemon}  {}",
            node.name(),
            node.address(),
            names.join(" ")
        );
    }
    if cluster::is_in(lab) {
        let said = cluster::kubectl(lab).and_then(|kubectl| kubectl.run(&["get", "nodes"]));
        match said {
            Ok(nodes) => print!("Kubernetes (lab kubectl):\n{nodes}"),
            Err(error) => println!("Kubernetes does not answer: {error:#}"),
        }
    }
}
