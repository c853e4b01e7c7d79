//! `pageferry-oci`: see the library beside it.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_oci::{Came, Command, Mark, Orders, Place, Places, Taken, Verb};
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
            let taken = match place_of(command)? {
                Some((bundle, place)) => await_order(&orders, (space, id), (bundle, &place))?,
                None => orders.take(space, id).map_err(|error| error.to_string())?,
            };
            match taken {
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

/// The place of a container of a pod that is the destination of a migration, and its bundle.
fn place_of(command: &Command) -> Result<Option<(&Path, Place)>, String> {
    let Some(bundle) = command.bundle() else {
        return Ok(None);
    };
    let config = fs::read(bundle.join("config.json")).unwrap_or_default();
    let place = Place::of(&config)?;
    Ok(place.map(|place| (bundle, place)))
}

/// Waits until somebody says what becomes of a container at such a place; where one has run that
/// was restored it is one like others.
fn await_order(
    orders: &Orders,
    (space, id): (&str, &str),
    (bundle, place): (&Path, &Place),
) -> Result<Taken, String> {
    let places = Places::of_node();
    let deadline = Instant::now() + ORDER_MAX;
    if has_run(&places, place, deadline)? {
        return Ok(Taken::Unknown);
    }
    let Place { pod, container } = place;
    let came = Came {
        space: space.to_owned(),
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        pid: process::id().cast_signed(),
    };
    let _waiting = places
        .come(place, &came)
        .map_err(|error| format!("the container {container} of pod {pod}: {error}"))?;
    loop {
        check_refusal(&places, place)?;
        match orders.take(space, id).map_err(|error| error.to_string())? {
            Taken::Unknown if Instant::now() < deadline => thread::sleep(ORDER_POLL),
            Taken::Unknown => {
                return Err(format!(
                    "the container {container} of pod {pod} is to be restored, and for \
                     {ORDER_MAX:?} nobody has said from what: is the migration still there, and \
                     pageferryd?"
                ));
            }
            taken => return Ok(taken),
        }
    }
}

/// Whether what was restored at such a place has run. Of one that may run, or may have run, it is
/// waited until that is known: a second one must not be beside its source, nor beside it.
fn has_run(places: &Places, place: &Place, deadline: Instant) -> Result<bool, String> {
    let Place { pod, container } = place;
    loop {
        check_refusal(places, place)?;
        let mark = places.mark(place);
        match mark.map_err(|error| format!("the mark of {container} of pod {pod}: {error}"))? {
            None => return Ok(false),
            Some(Mark::Ran) => return Ok(true),
            Some(Mark::Going) if Instant::now() < deadline => thread::sleep(ORDER_POLL),
            Some(Mark::Going) => {
                return Err(format!(
                    "the container {container} of pod {pod} was to run here as it was restored, \
                     and whether it has is not known: look at its migration, and delete this pod \
                     if its source runs"
                ));
            }
        }
    }
}

fn check_refusal(places: &Places, place: &Place) -> Result<(), String> {
    let Place { pod, container } = place;
    match places.refusal(place) {
        Some(why) => Err(format!(
            "the container {container} of pod {pod} is not restored here: {why}"
        )),
        None => Ok(()),
    }
}

/// How long a container of a pod waits for its order. Kubernetes gives up after two minutes.
const ORDER_MAX: Duration = Duration::from_secs(60);

/// How often it looks.
const ORDER_POLL: Duration = Duration::from_millis(5);

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
