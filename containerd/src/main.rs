//! `pageferry-containerd FOLDER`: has containerd make the container that `arrival.json` in a
//! migration's folder describes; or tells the runtime that Kubernetes has had started for the one
//! in `pod.json`.
//!
//! It stands where for others the runtime itself is started, and behaves as one: it ends when the
//! container runs, or fails, with the reason as the last line of `runtime.log` in that folder. So
//! the restore depends on no daemon.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry_containerd::{Arrival, LOG, PodArrival};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments.next().map(PathBuf::from).unwrap_or_default();
    match run(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let log = folder.join(LOG);
            let log = OpenOptions::new().create(true).append(true).open(log);
            let written = log.and_then(|mut log| writeln!(log, "{why}"));
            if written.is_err() {
                eprintln!("pageferry-containerd: {why}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let pod = PodArrival::read(folder).map_err(|error| chain(&error))?;
    if let Some(pod) = pod {
        return runtime.block_on(pod.come()).map_err(|error| chain(&error));
    }
    let held = Arrival::hold(folder).map_err(|error| chain(&error))?;
    let held = held.ok_or("nothing is to come")?;
    let done = runtime.block_on(held.come());
    done.map_err(|error| chain(&error))
}

/// An error and its sources, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text.replace('\n', " ")
}
