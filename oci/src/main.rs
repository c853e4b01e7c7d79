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

use pageferry_oci::{Came, Command, Mark, Order, Orders, Place, Places, Taken, Verb, ahead};
use pageferry_sys::bound;

/// The runtime.
const RUNTIME: &str = "runc";

/// What it calls the place to which it binds the root file system while it restores.
const BOUND: &str = "criu-root";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let command = match arguments.split_first() {
        Some((mode, rest)) if mode == ahead::BECOME => Command::read(rest.iter().skip(1).cloned()),
        Some((mode, rest)) if mode == ahead::HOLD => {
            Command::read(rest.iter().skip(ahead::HOLD_ARGUMENTS).cloned())
        }
        _ => Command::read(arguments.clone()),
    };
    match mode(&command, &arguments) {
        Ok(Some(infallible)) => match infallible {},
        Ok(None) => ExitCode::SUCCESS,
        Err(why) => {
            say(command.log(), &why);
            ExitCode::FAILURE
        }
    }
}

/// What an engine has started, or what this program has for a container that is ahead.
fn mode(command: &Command, arguments: &[OsString]) -> Result<Option<Infallible>, String> {
    match arguments.split_first() {
        Some((mode, rest)) if mode == ahead::HOLD => process::exit(ahead::hold(rest)?),
        Some((mode, rest)) if mode == ahead::BECOME => {
            let (gate, rest) = ahead::bind_to_holder(rest)?;
            become_runtime(rest, Some(&gate)).map(Some)
        }
        _ => run(command, arguments),
    }
}

/// Becomes the runtime, or has nothing to do.
fn run(command: &Command, arguments: &[OsString]) -> Result<Option<Infallible>, String> {
    let orders = Orders::of_node();
    let named = command.space().zip(command.id());
    match (command.verb(), named) {
        (Verb::Create, Some((space, id))) => {
            let place = place_of(command)?;
            let taken = match &place {
                Some((bundle, place)) => await_order(&orders, (space, id), (*bundle, place))?,
                None => orders.take(space, id).map_err(|error| error.to_string())?,
            };
            match (taken, place) {
                (Taken::Now(order), Some((bundle, place))) if order.is_ahead => {
                    let at = (bundle, &place);
                    go_ahead(command, &orders, (space, id), (&order, at)).map(|()| None)
                }
                (Taken::Now(order), _) => {
                    let restore = command.restore(&order.images, &order.work);
                    become_runtime(&restore, Some(&order.gate)).map(Some)
                }
                (Taken::Before, _) => Err(format!(
                    "the container {id} is moving here: it is created once, by its restore"
                )),
                (Taken::Unknown, _) => become_runtime(arguments, None).map(Some),
            }
        }
        // It runs, or is held, and does not come later than that.
        (Verb::Start, Some((space, id))) if orders.is_taken(space, id) => {
            let held = orders.held(space, id).map_err(|error| error.to_string())?;
            if let Some(held) = held {
                // The engine knows the container's cgroups by now.
                ahead::join(held.holder, process::id().cast_signed())?;
                let said = orders.start(space, id);
                said.map_err(|error| error.to_string())?;
            }
            Ok(None)
        }
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

/// Has the engine go on before the container is restored, as soon as its runtime waits.
fn go_ahead(
    command: &Command,
    orders: &Orders,
    named: ahead::Named<'_>,
    (order, (bundle, place)): (&Order, (&Path, &Place)),
) -> Result<(), String> {
    let pid_file = command
        .pid_file()
        .ok_or("the engine does not ask which process is the container's (--pid-file)")?;
    let inner = bundle.join(RESTORED_PID);
    let restore = command.clone().with_pid_file(&inner);
    let restore = restore.restore(&order.images, &order.work);
    let started = ahead::start(named, &order.gate, (pid_file, &inner), &restore);
    let mut holder = started.map_err(|error| format!("starting {}: {error}", ahead::THIS))?;
    let pid = holder.id().cast_signed();
    let passed = await_pass(orders, named, place, &mut holder)
        .and_then(|within| ahead::join(pid, within))
        .and_then(|()| {
            let said = fs::write(pid_file, pid.to_string());
            said.map_err(|error| format!("writing {}: {error}", pid_file.display()))
        });
    if passed.is_err() {
        // With it dies the runtime.
        let _ = holder.kill();
        let _ = holder.wait();
    }
    passed
}

/// Waits until the engine may go on; answers with a process that is in the container's cgroups.
fn await_pass(
    orders: &Orders,
    (space, id): ahead::Named<'_>,
    place: &Place,
    holder: &mut process::Child,
) -> Result<i32, String> {
    let Place { pod, container } = place;
    let deadline = Instant::now() + ORDER_MAX;
    loop {
        check_refusal(&Places::of_node(), place)?;
        let said = |error: pageferry_oci::OrderError| error.to_string();
        let held = orders.held(space, id).map_err(said)?;
        if let Some(within) = orders.passed(space, id).map_err(said)?
            && held.is_some()
        {
            return Ok(within);
        }
        if let Ok(Some(status)) = holder.try_wait() {
            return Err(format!(
                "the container {container} of pod {pod} is not restored: its runtime has ended \
                 before that ({status}): see its log, and the migration"
            ));
        }
        if deadline < Instant::now() {
            return Err(format!(
                "the container {container} of pod {pod} waits, and for {ORDER_MAX:?} nobody has \
                 said that others of its pod may come: is pageferryd still there?"
            ));
        }
        thread::sleep(ORDER_POLL);
    }
}

/// Where the runtime writes the first process of a container that was ahead, in its bundle.
const RESTORED_PID: &str = "pageferry.pid";

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
