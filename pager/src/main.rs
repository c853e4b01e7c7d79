//! The process that holds a restored workload's memory. See `pageferry_pager`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use pageferry_pager::process::CgroupFiles;
use pageferry_proto::id::MigrationId;
use tracing_subscriber::EnvFilter;

/// Holds and fills the memory of one incoming workload. Started by pageferryd.
#[derive(Debug, Parser)]
#[command(name = "pageferry-pager", version)]
struct Arguments {
    /// Directory for its socket and its marks.
    #[arg(long)]
    dir: PathBuf,
    /// The migration, for whoever reads a list of processes.
    #[arg(long)]
    id: MigrationId,
    /// `cgroup.procs` file of a cgroup to go into; may be repeated.
    #[arg(long)]
    cgroup_procs: Vec<PathBuf>,
    /// The same for the watcher.
    #[arg(long)]
    watcher_cgroup_procs: Vec<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    pageferry_sys::panic::ends_the_process();
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("PAGEFERRY_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    tracing::info!(id = %arguments.id, "pager starts");
    let cgroups = CgroupFiles {
        pager: arguments.cgroup_procs,
        watcher: arguments.watcher_cgroup_procs,
    };
    pageferry_pager::process::run(&arguments.dir, &cgroups).context("the pager failed")
}
