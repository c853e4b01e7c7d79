//! The program that has the node's range.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{CONFIG, DELEGATE, Failure, INPUT, LATER};
use crate::request::{Environment, find};

/// Has it do something, and returns what it printed.
///
/// # Errors
/// What it says is wrong, as it says it; that it is not there; or that it does not end.
pub(crate) fn call(
    name: &str,
    verb: &str,
    environment: &Environment,
    config: &Value,
) -> Result<Vec<u8>, Failure> {
    let program = find(&environment.path, name).ok_or_else(|| {
        let text = format!("the delegate {name} is in none of {}", environment.path);
        Failure::new(CONFIG, text)
    })?;
    let mut command = Command::new(&program);
    command.env("CNI_COMMAND", verb);
    for (key, value) in [
        ("CNI_CONTAINERID", &environment.container),
        ("CNI_IFNAME", &environment.interface),
        ("CNI_NETNS", &environment.namespace),
        ("CNI_ARGS", &environment.arguments),
        ("CNI_PATH", &environment.path),
    ] {
        command.env(key, value);
    }
    let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let child = started.map_err(|error| {
        let text = format!("cannot start the delegate {}: {error}", program.display());
        Failure::new(INPUT, text)
    })?;
    let (success, output) = finish(child, config.to_string(), (name, verb))?;
    if success {
        return Ok(output);
    }
    // It explains itself by an object; what it explains to a person went to standard error.
    match serde_json::from_slice::<Value>(&output) {
        Ok(object) if object["code"].is_u64() => Err(Failure::Delegate(object)),
        _ => Err(Failure::new(
            DELEGATE,
            format!("the delegate {name} failed at {verb}, and does not say why"),
        )),
    }
}

/// Whether it succeeded, and what it printed.
fn finish(
    mut child: Child,
    input: String,
    (name, verb): (&str, &str),
) -> Result<(bool, Vec<u8>), Failure> {
    let deadline = Instant::now() + TIME_MAX;
    let stdin = child.stdin.take();
    // One that does not read it says so itself, or has no need of it.
    thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
    let stdout = child.stdout.take();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut output = Vec::new();
        let read = stdout.map(|stdout| stdout.take(OUTPUT_MAX).read_to_end(&mut output));
        sender.send(read.transpose().map(|_| output))
    });
    let success = wait(&mut child, deadline, (name, verb))?;
    // Somebody whom it started may still have its output, and is not waited for any longer.
    let left = deadline.saturating_duration_since(Instant::now());
    match receiver.recv_timeout(left.max(READ_TIME_MIN)) {
        Ok(Ok(output)) => Ok((success, output)),
        _ => {
            let text = format!("cannot read what the delegate {name} says to {verb}");
            Err(Failure::new(INPUT, text))
        }
    }
}

/// Ends it if it does not end.
fn wait(child: &mut Child, deadline: Instant, (name, verb): (&str, &str)) -> Result<bool, Failure> {
    loop {
        let failed = |error| Failure::new(INPUT, format!("waiting for the delegate: {error}"));
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status.success());
        }
        if deadline < Instant::now() {
            // It may have ended by itself meanwhile.
            let _ = child.kill();
            child.wait().map_err(failed)?;
            let text = format!("the delegate {name} was at {verb} for {TIME_MAX:?}, and was ended");
            return Err(Failure::new(LATER, text));
        }
        thread::sleep(POLL);
    }
}

/// Kubelets give up after two minutes.
const TIME_MAX: Duration = Duration::from_secs(30);
/// For what it said just before it ended.
const READ_TIME_MIN: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(2);
/// Results have a few hundred bytes.
const OUTPUT_MAX: u64 = 1 << 20; // 1 MiB
