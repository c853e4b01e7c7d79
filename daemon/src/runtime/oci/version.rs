//! What a runtime says of itself: its version, and what it was built with.
//!
//! A container that comes from a newer runtime is refused, as images of a newer CRIU are: what the
//! older one does not know of its configuration and its state it would leave aside.

use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VERSION_BYTES_MAX;

use super::habits::Runtime;
use crate::runtime::detached;

/// How long it may take to say it: milliseconds, and a machine may be busy.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const ANSWER_POLL: Duration = Duration::from_millis(2);

/// Fails if the runtime of this node, the target, is not there, or cannot take over from one of the
/// version `source`; nothing is compared with a source that does not say. Blocks.
pub fn check(runtime: Runtime, source: &str) -> Result<(), Failure> {
    let here = of(runtime, "the target")?;
    let program = runtime.program();
    match (numbers(source), numbers(&here)) {
        (Some(theirs), Some(ours)) if ours < theirs => Err(Failure::new(
            ErrorCode::NodeUnfit,
            format!(
                "the target's {program} {here} is older than the source's {source}: it may not \
                 know what the container is made of; install {source} or newer there"
            ),
        )),
        _ => Ok(()),
    }
}

/// The version of a runtime of this node, which is `whose`. Blocks.
///
/// # Errors
/// [`ErrorCode::NodeUnfit`] if it is not there, says nothing, or was built without what it needs
/// to be asked for a checkpoint or a restore.
pub fn of(runtime: Runtime, whose: &str) -> Result<String, Failure> {
    let program = runtime.program();
    let unfit = |text: String| Failure::new(ErrorCode::NodeUnfit, text);
    let said = ask(program).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => unfit(format!(
            "{whose} has no {program} in the PATH of pageferryd: install it there"
        )),
        _ => unfit(format!(
            "{whose}'s {program} does not say its version: {error}"
        )),
    })?;
    let version = read(program, &said)
        .ok_or_else(|| unfit(format!("{whose}'s {program} says no version, but {said:?}")))?;
    for feature in runtime.habits().features {
        if !said.split_whitespace().any(|word| word == *feature) {
            return Err(unfit(format!(
                "{whose}'s {program} {version} was built without CRIU (it does not say {feature}): \
                 it can neither checkpoint nor restore"
            )));
        }
    }
    Ok(version)
}

/// What a program prints of itself, of which the first KiB counts. Blocks, for a limited time.
pub fn ask(program: &str) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + ANSWER_MAX;
    if let Some(output) = &child.stdout {
        // A child of its own may keep this open behind its end, and never say anything.
        let flags = OFlag::from_bits_retain(fcntl(output, FcntlArg::F_GETFL)?);
        fcntl(output, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(ANSWER_POLL),
            None => {
                child.kill()?;
                // One that a file system holds does not end by that.
                drop(detached::begin("version", move || child.wait()));
                let text = format!("it has not ended within {ANSWER_MAX:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    };
    if !status.success() {
        return Err(io::Error::other(format!("it has ended with {status}")));
    }
    let mut said = vec![0; 1024];
    let mut length = 0;
    if let Some(output) = &mut child.stdout {
        // It has ended: what it has said is there already.
        length = match output.read(&mut said) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            read => read?,
        };
    }
    Ok(String::from_utf8_lossy(&said[..length]).into_owned())
}

/// The version in what a program prints of itself.
fn read(program: &str, said: &str) -> Option<String> {
    let mut words = said.lines().next()?.split_whitespace();
    let is_its = words.next() == Some(program) && words.next() == Some("version");
    let version = words.next().filter(|_| is_its)?;
    let is_short = version.len() <= VERSION_BYTES_MAX;
    numbers(version)
        .filter(|_| is_short)
        .map(|_| version.to_owned())
}

/// What is compared of a version; packagers and commits add more behind it.
fn numbers(version: &str) -> Option<[u32; 3]> {
    let end = version.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let mut parts = version[..end.unwrap_or(version.len())].split('.');
    let mut numbers = [0; 3];
    numbers[0] = parts.next()?.parse().ok()?;
    for number in &mut numbers[1..] {
        // `1.` is behind no version, and `1.21` has no third number.
        *number = parts.next().map_or(Some(0), |part| part.parse().ok())?;
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_version_is_what_the_runtime_says_of_itself() {
        let runc = "runc version 1.3.3+ds1\ncommit: 1.3.3+ds1-2\nspec: 1.2.1\n";
        assert_eq!(read("runc", runc).as_deref(), Some("1.3.3+ds1"));
        let crun = "crun version 1.21\ncommit: 10269840\n+SYSTEMD +CRIU +YAJL\n";
        assert_eq!(read("crun", crun).as_deref(), Some("1.21"));
        for none in [
            "",
            "runc",
            "runc version",
            "runc version x",
            "crun version 1.21",
        ] {
            assert_eq!(read("runc", none), None, "{none}");
        }
        let long = format!("runc version 1.{}", "0".repeat(VERSION_BYTES_MAX));
        assert_eq!(read("runc", &long), None);
    }

    #[test]
    fn a_program_that_leaves_its_output_open_and_says_nothing_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("runc");
        fs::write(
            &program,
            "#!/bin/sh\nsleep 30 2>&1 &\necho $! >\"$0.pid\"\n",
        )
        .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let began = Instant::now();
        let said = loop {
            match ask(program.to_str().unwrap()) {
                // Another test has begun a program while this one was written.
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                said => break said,
            }
        };
        let left = fs::read_to_string(folder.path().join("runc.pid")).unwrap();
        Command::new("kill").arg(left.trim()).status().unwrap();
        assert_eq!(said.unwrap(), "");
        assert!(began.elapsed() < Duration::from_secs(25));
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let order = ["1.1.12", "1.2", "1.2.1-rc.1", "1.10.0+ds1", "2"];
        let order = order.map(|version| numbers(version).unwrap());
        assert!(order.is_sorted_by(|one, next| one < next));
        assert_eq!(numbers("1.21"), numbers("1.21.0-dirty"));
        for none in ["", "v1", "1.", "1..2", "99999999999.1"] {
            assert_eq!(numbers(none), None, "{none}");
        }
    }
}
