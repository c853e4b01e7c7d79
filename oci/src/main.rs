//! `pageferry-oci`: see the library beside it.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use pageferry_oci::{Command, Orders, Taken, Verb};
use pageferry_sys::bound;

/// The runtime.
const RUNTIME: &str = "runc";

/// What it calls the place to which it binds the root file system while it restores.
const BOUND: &str = "criu-root";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let command = Command::read(arguments.clone());
    match run(&command, &arguments) {
        Ok(Some(infallible)) => match infallible {},
        Ok(None) => ExitCode::SUCCESS,
        Err(why) => {
            say(command.log(), &why);
            ExitCode::FAILURE
        }
    }
}

/// Becomes the runtime, or has nothing to do.
fn run(command: &Command, arguments: &[OsString]) -> Result<Option<Infallible>, String> {
    let orders = Orders::of_node();
    let named = command.space().zip(command.id());
    match (command.verb(), named) {
        (Verb::Create, Some((space, id))) => {
            match orders.take(space, id).map_err(|error| error.to_string())? {
                Taken::Now(order) => {
                    let restore = command.restore(&order.images, &order.work);
                    become_runtime(&restore, Some(&order.gate)).map(Some)
                }
                Taken::Before => Err(format!(
                    "the container {id} is moving here: it is created once, by its restore"
                )),
                Taken::Unknown => become_runtime(arguments, None).map(Some),
            }
        }
        // It runs.
        (Verb::Start, Some((space, id))) if orders.is_taken(space, id) => Ok(None),
        (Verb::Delete, Some(_)) => {
            if let Some(state) = command.state() {
                // Whoever deletes it with something bound in it deletes that.
                let released = bound::release(&state, BOUND);
                released.map_err(|error| format!("unmounting in {}: {error}", state.display()))?;
            }
            become_runtime(arguments, None).map(Some)
        }
        _ => become_runtime(arguments, None).map(Some),
    }
}

/// With `path` alone to look for programs in, or all that the engine has.
fn become_runtime(arguments: &[OsString], path: Option<&Path>) -> Result<Infallible, String> {
    let runtime = find(RUNTIME).ok_or_else(|| format!("{RUNTIME} is not in PATH"))?;
    let mut command = process::Command::new(&runtime);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let error = command.arg0(RUNTIME).args(arguments).exec();
    Err(format!("starting {}: {error}", runtime.display()))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_else(|| USUAL_PATH.into());
    let mut places = env::split_paths(&path).map(|folder| folder.join(program));
    places.find(|place| place.is_file())
}

const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Tells the engine, which reads the last line of the log. Standard error may be the container's.
fn say(log: Option<&Path>, why: &str) {
    let quoted: String = why.chars().flat_map(escape).collect();
    let line = format!("{{\"level\":\"error\",\"msg\":\"pageferry-oci: {quoted}\"}}\n");
    let written = log.map_or(Err(io::ErrorKind::NotFound.into()), |log| {
        let mut file = OpenOptions::new().append(true).create(true).open(log)?;
        file.write_all(line.as_bytes())
    });
    if written.is_err() {
        eprint!("{line}");
    }
}

/// As it stands in a JSON string.
fn escape(letter: char) -> Vec<char> {
    match letter {
        '"' | '\\' => vec!['\\', letter],
        _ if letter.is_control() => vec![' '],
        _ => vec![letter],
    }
}
