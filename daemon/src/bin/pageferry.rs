//! The command line: moves workloads, and tells how that goes.

use std::process::ExitCode;

use clap::Parser;
use pageferry::cli;
use pageferry::cli::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime.block_on(cli::run(cli)),
        Err(error) => {
            eprintln!("pageferry: cannot start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}
