//! Programs that work beside a move: started without anything that a restored tree could inherit,
//! waited for with a limit.

use std::fs::File;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::inside::Inside;

/// Starts a program of CRIU's that works beside a restore or a dump; its log says it all. Whatever
/// else it could write to would stay open in the restored tree.
pub fn start_quiet(command: Inside) -> Result<Child> {
    let null = || File::options().read(true).write(true).open("/dev/null");
    command
        .stdin(null()?)
        .stdout(null()?)
        .stderr(null()?)
        .spawn()
}

/// Waits for a child, at most so long; false if it ends in failure.
///
/// # Errors
/// It does not end; it is killed then.
pub fn wait_for(child: &mut Child, what: &str, time_max: Duration) -> Result<bool> {
    let deadline = Instant::now() + time_max;
    loop {
        if let Some(status) = child
            .try_wait()
            .with_context(|| format!("waiting for {what}"))?
        {
            return Ok(status.success());
        }
        if deadline < Instant::now() {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{what} does not end within {time_max:?}");
        }
        std::thread::sleep(POLL);
    }
}

const POLL: Duration = Duration::from_millis(2);
