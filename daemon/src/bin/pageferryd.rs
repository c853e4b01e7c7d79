//! The daemon: one per node.

use std::process::ExitCode;

use clap::Parser;
use pageferry::args::DaemonArgs;
use pageferry::config::Config;
use pageferry::net::tls::Credentials;
use pageferry::{node, telemetry};
use pageferry_sys::{heap, panic};

fn main() -> ExitCode {
    panic::ends_the_process();
    heap::keep_little();
    let args = DaemonArgs::parse();
    // Images hold memory: whatever is created here is its owner's alone.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    if let Err(error) = telemetry::start("pageferryd", &args.log) {
        eprintln!("pageferryd: {}", telemetry::Chain(&error));
        return ExitCode::from(telemetry::EXIT_USAGE);
    }
    let config = match Config::load(&args) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{}", telemetry::Chain(&error));
            return ExitCode::from(telemetry::EXIT_USAGE);
        }
    };
    if args.check {
        return check(&config);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(node::run(config)) {
        Ok(()) => {
            // Blocking threads may be in the middle of a page; nothing of theirs must be kept.
            runtime.shutdown_background();
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says whether a daemon could start with this configuration and these certificates.
fn check(config: &Config) -> ExitCode {
    if let Err(error) = node::check_stand_in(&config.stand_in) {
        tracing::error!("{error:#}");
        return ExitCode::from(telemetry::EXIT_USAGE);
    }
    match Credentials::load(&config.tls, &config.node) {
        Ok(_) => {
            println!(
                "configuration and certificates of node {} are right",
                config.node
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{}", telemetry::Chain(&error));
            ExitCode::from(telemetry::EXIT_USAGE)
        }
    }
}
