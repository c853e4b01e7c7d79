//! `containers --only OWNER-errors`: what a target, or a source, can lack for a container of runc,
//! crun or containerd: its image, a runtime that is fit, that or the engine at all, its name.
//!
//! Each is one error that names what is wrong, before anything of the container stands still: it
//! runs on as its owner's own, its clients go on, and the target has nothing of it. With a target
//! whose runtime is newer it moves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::lab::containerd::Engine;
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX, wait_settled};
use crate::workload::Workload;
use crate::workload::container::{self, Runtime};
use crate::workload::containerd::{self, IMAGE, IMAGE_FILE, INSTALLED};
use crate::workload::whose::Whose;

/// Something that is not as it must be.
struct Wrong {
    what: &'static str,
    at: &'static str,
    how: How,
    code: &'static str,
    /// All of them are in the text.
    words: Vec<String>,
}

enum How {
    /// What is run at the node, and what undoes it.
    Scripts(String, String),
    /// containerd does not run.
    NoEngine,
}

/// All of them, of one container under load.
pub fn run(settings: &Settings, whose: Whose, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(whose.layer(), 2)?;
    let mut engines = whose.start_engines(&lab)?;
    let held = whose.start_redis(&mut lab, "a")?;
    let all = all(whose, &held, lab.node("b")?)?;
    let dataset = Dataset::first_row(BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for wrong in &all {
        let what = format!("{} {}", whose.name(), wrong.what);
        let came = wrong.come(&lab, &mut engines, &session);
        match came.with_context(|| what.clone()) {
            Ok(said) => println!("{what}: {said}"),
            Err(error) => {
                report.fail(format!("{error:#}"));
                break;
            }
        }
    }
    let (newer, mend) = says(whose.program(), "99.0.0", "+CRIU");
    sh(&lab, "b", &newer)?;
    session.move_to(&lab, "b", &MoveOptions::default(), report)?;
    session.wait_for_writes(WRITES_AROUND)?;
    wait_settled(&lab, SETTLE_TIME_MAX)?;
    sh(&lab, "b", &mend)?;
    session.workload.is_here(lab.node("b")?)?;
    session.workload.is_gone(lab.node("a")?)?;
    session.finish(report)?.kill(&lab)
}

impl Wrong {
    /// Tries to move; what the error says.
    fn come(&self, lab: &Lab, engines: &mut [Engine], session: &Session) -> Result<String> {
        let number = lab.nodes.iter().position(|node| node.name() == self.at);
        let number = number.context("a node")?;
        match &self.how {
            How::Scripts(script, _) => sh(lab, self.at, script)?,
            How::NoEngine => engines[number].kill()?,
        }
        let name = session.workload.name();
        let began = Instant::now();
        let outcome =
            Migration::start(lab.node("a")?, &name, "b", &MoveOptions::default())?.finish()?;
        let took = began.elapsed();
        wait_settled(lab, SETTLE_TIME_MAX)?;
        match &self.how {
            How::Scripts(_, mend) => sh(lab, self.at, mend)?,
            How::NoEngine => engines[number].restart(&lab.nodes[number])?,
        }
        let Some((code, text)) = outcome.error else {
            bail!("it has moved");
        };
        ensure!(code == self.code, "{code}, and not {}: {text}", self.code);
        let missing = self.words.iter().find(|word| !text.contains(&***word));
        ensure!(missing.is_none(), "{missing:?} is not in: {text}");
        let is_one = !text.contains('\n') && text.len() <= TEXT_MAX;
        ensure!(is_one, "it is not one clear error: {text}");
        ensure!(took < REFUSED_WITHIN, "it was refused after {took:?}");
        session.wait_for_writes(WRITES_AROUND)?;
        let (here, there) = (lab.node("a")?, lab.node("b")?);
        session.workload.is_here(here)?;
        session.workload.is_gone(there)?;
        for node in [here, there] {
            let name = node.name();
            ensure!(!node.has_frozen_cgroup(), "node {name} has a frozen cgroup");
            session.workload.is_whole(node)?;
        }
        Ok(format!("{code}: {text}"))
    }
}

fn all(whose: Whose, held: &Workload, target: &Node) -> Result<Vec<Wrong>> {
    let mut all = of_program(whose.program());
    match whose {
        Whose::Runtime(runtime @ (Runtime::Runc | Runtime::Crun)) => {
            let container = held.container.as_ref().context("a container")?;
            all.extend(of_bundle(runtime, &container.id));
        }
        Whose::Containerd => {
            let id = held.containerd.as_ref().context("a container")?;
            let server = [container::SERVER.to_owned()];
            containerd::make_image(target, IMAGE, OTHER_FILE, &server)?;
            all.extend(of_image());
            all.extend(of_engine(id));
        }
        Whose::Runtime(Runtime::Podman) => bail!("podman's are not among these"),
    }
    Ok(all)
}

/// What may be wrong with the program that restores.
fn of_program(program: &str) -> Vec<Wrong> {
    let unfit = |what, at, (script, mend), words: [&str; 2]| Wrong {
        what,
        at,
        how: How::Scripts(script, mend),
        code: "node-unfit",
        words: words.map(str::to_owned).to_vec(),
    };
    let path = format!("$(command -v {program})");
    let away = (
        format!("path={path}; mv $path $path.away; echo $path >{AWAY}"),
        format!("path=$(cat {AWAY}); mv $path.away $path; rm {AWAY}"),
    );
    let none = format!("has no {program}");
    let mut all = vec![
        unfit(
            "of an older runtime",
            "b",
            says(program, "0.9.1", "+CRIU"),
            ["0.9.1 is older than the source's", "or newer"],
        ),
        unfit(
            "of a runtime that says nothing",
            "b",
            says(program, "", ""),
            ["the target's", "says no version"],
        ),
        unfit(
            "without its runtime at the target",
            "b",
            away.clone(),
            ["the target", &none],
        ),
        unfit(
            "without its runtime at the source",
            "a",
            away,
            ["the source", &none],
        ),
    ];
    if program == Runtime::Crun.program() {
        all.push(unfit(
            "of a runtime without CRIU",
            "b",
            says(program, "99.0.0", ""),
            ["the target's", "without CRIU"],
        ));
    }
    all
}

/// Of a runtime that has bundles.
fn of_bundle(runtime: Runtime, id: &str) -> Vec<Wrong> {
    let (program, bundle) = (runtime.program(), container::bundle(id));
    let wrong = |what, code, (script, mend), words: [&str; 2]| Wrong {
        what,
        at: "b",
        how: How::Scripts(script, mend),
        code,
        words: words.map(str::to_owned).to_vec(),
    };
    let away = (
        format!("mv {bundle} {bundle}.away"),
        format!("mv {bundle}.away {bundle}"),
    );
    let config = format!("{bundle}/config.json");
    let other = (
        format!("cp -p {config} {config}.away; echo >>{config}"),
        format!("mv {config}.away {config}"),
    );
    let taken = (
        format!("{program} create --bundle {bundle} {id} <&- >/dev/null 2>&1"),
        format!("{program} delete --force {id}"),
    );
    vec![
        wrong(
            "without its bundle",
            "file-differs",
            away,
            [&*bundle, "not the same at the target"],
        ),
        wrong(
            "with another bundle",
            "file-differs",
            other,
            [&*bundle, "config.json is another one"],
        ),
        wrong(
            "with its name taken",
            "name-taken",
            taken,
            [id, "end it there first"],
        ),
    ]
}

/// Something at the target's containerd.
fn at_engine(
    what: &'static str,
    code: &'static str,
    (script, mend): (&str, &str),
    words: [&str; 2],
) -> Wrong {
    Wrong {
        what,
        at: "b",
        how: How::Scripts(script.to_owned(), mend.to_owned()),
        code,
        words: words.map(str::to_owned).to_vec(),
    }
}

/// Of containerd's images.
fn of_image() -> Vec<Wrong> {
    let remove = format!("ctr images rm --sync {IMAGE}");
    let import = format!("ctr images import --snapshotter overlayfs {IMAGE_FILE}");
    let again = format!("{remove}; {import}");
    let packed = format!("{remove}; ctr images import --no-unpack {IMAGE_FILE}");
    let other = format!("ctr images import {OTHER_FILE}");
    let wrong = |what, scripts, word| at_engine(what, "file-differs", scripts, [word, IMAGE]);
    vec![
        wrong("without its image", (&remove, &import), "no image"),
        wrong("with another image", (&other, &again), "another image"),
        wrong("with its image packed", (&packed, &again), "not unpacked"),
    ]
}

/// Of containerd itself.
fn of_engine(id: &str) -> Vec<Wrong> {
    let unset = format!("rm {INSTALLED}");
    let create = format!("ctr containers create --snapshotter overlayfs {IMAGE} {id}");
    let delete = format!("ctr containers delete {id}");
    let prepare = format!("ctr snapshots --snapshotter overlayfs prepare {id}");
    let discard = format!("ctr snapshots --snapshotter overlayfs rm {id}");
    let none = |what, at, words: [&str; 2]| Wrong {
        what,
        at,
        how: How::NoEngine,
        code: "runtime-failed",
        words: words.map(str::to_owned).to_vec(),
    };
    vec![
        at_engine(
            "without what its shim is to start",
            "node-unfit",
            (&unset, "pageferry setup containerd"),
            [INSTALLED, "pageferry setup containerd"],
        ),
        at_engine(
            "with its name taken",
            "name-taken",
            (&create, &delete),
            [id, "a container"],
        ),
        at_engine(
            "with its snapshot taken",
            "name-taken",
            (&prepare, &discard),
            [id, "a snapshot"],
        ),
        none(
            "with containerd out of reach at the target",
            "b",
            ["at the target", "cannot reach containerd"],
        ),
        none(
            "with containerd out of reach at the source",
            "a",
            ["cannot reach containerd", "is it running?"],
        ),
    ]
}

/// Has a program say that it is of this version, with these features, and do as before all else;
/// and what undoes it.
fn says(program: &str, version: &str, features: &str) -> (String, String) {
    let script = format!(
        "path=$(command -v {program}); mv $path $path.real; echo $path >{AWAY}\n\
         cat >$path <<END\n#!/bin/sh\n\
         case \"\\$*\" in *--version*) echo '{program} version {version}'; echo '{features}';;\n\
         *) exec $path.real \"\\$@\";; esac\nEND\nchmod 755 $path"
    );
    let mend = format!("path=$(cat {AWAY}); mv $path.real $path; rm {AWAY}");
    (script, mend)
}

fn sh(lab: &Lab, node: &str, script: &str) -> Result<()> {
    let command = lab.node(node)?.command("sh")?;
    command.args(["-ec", script]).run().map(drop)
}

/// Another image by the name of the usual one.
const OTHER_FILE: &str = "/srv/images/other.tar";
/// Where a node keeps what was moved away.
const AWAY: &str = "/run/away";
const BYTES: u64 = 64 << 20; // 64 MiB
const WRITES_AROUND: u64 = 3_000;
/// Longest text of an error that anybody reads to its end, in bytes.
const TEXT_MAX: usize = 400;
/// Nothing of this takes a time-out to find.
const REFUSED_WITHIN: Duration = Duration::from_secs(8);
