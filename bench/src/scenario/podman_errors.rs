//! `containers --only podman-errors`: a target that lacks something that a container of podman
//! needs. Each has one clear error, and costs the container nothing: it moves when all is there.

use anyhow::{Context, Result, ensure};

use super::report::Report;
use super::session::Session;
use super::settings::Settings;
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::node::Node;
use crate::mover::MoveOptions;
use crate::mover::pageferry::{Migration, SETTLE_TIME_MAX};
use crate::workload::container::{self, Runtime};
use crate::workload::podman;

/// What is done to the target, and undone; the error's code, and what its text has.
struct Lack {
    name: &'static str,
    take: &'static str,
    give: &'static str,
    code: &'static str,
    says: &'static str,
}

const LACKS: [Lack; 6] = [
    Lack {
        name: "no image",
        take: "podman save --quiet --output /srv/kept.tar localhost/redis:lab && \
               podman rmi localhost/redis:lab",
        give: "podman load --quiet --input /srv/kept.tar && rm /srv/kept.tar",
        code: "file-differs",
        says: "no image with the id",
    },
    Lack {
        name: "a container of its name",
        take: "podman create --name \"$1\" localhost/redis:lab /usr/bin/redis-server",
        give: "podman rm \"$1\"",
        code: "name-taken",
        says: "remove it first",
    },
    Lack {
        name: "another crun",
        take: "mv /usr/bin/crun /usr/bin/crun.kept && printf \
               '#!/bin/sh\\necho crun version 0.17\\necho +CRIU\\n' >/usr/bin/crun && \
               chmod +x /usr/bin/crun",
        give: "mv /usr/bin/crun.kept /usr/bin/crun",
        code: "node-unfit",
        says: "crun version 0.17",
    },
    Lack {
        name: "no crun",
        take: "mv /usr/bin/crun /usr/bin/crun.kept",
        give: "mv /usr/bin/crun.kept /usr/bin/crun",
        code: "node-unfit",
        says: "crun",
    },
    Lack {
        name: "no podman",
        take: "mv /usr/bin/podman /usr/bin/podman.kept",
        give: "mv /usr/bin/podman.kept /usr/bin/podman",
        code: "node-unfit",
        says: "podman info",
    },
    Lack {
        name: "a podman that fails",
        take: "printf '[storage]\\ndriver = \"none\"\\n' >/etc/containers/storage.conf",
        give: "rm /etc/containers/storage.conf",
        code: "node-unfit",
        says: "podman info has failed",
    },
];

/// All of them, under load.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab_with(&container::LAYER, 2)?;
    let held = container::start(&mut lab, Runtime::Podman, "a")?;
    let container = held.container.clone().context("a container")?;
    let (dataset, load) = (Dataset::first_row(BYTES), LoadPlan::first_row());
    let mut session = Session::watch(&lab, settings.mover, "a", held, dataset, load)?;
    for lack in &LACKS {
        let (source, target) = (lab.node("a")?, lab.node("b")?);
        shell(target, lack.take, &container.id)?;
        let (name, flags) = (session.workload.name(), MoveOptions::default());
        let outcome = Migration::start(source, &name, "b", &flags)?.finish()?;
        shell(target, lack.give, &container.id)?;
        let (code, text) = outcome.error.context("it has moved")?;
        ensure!(
            code == lack.code && text.contains(lack.says),
            "{}: {code}: {text}",
            lack.name
        );
        println!("podman-errors: {}: {code}: {text}", lack.name);
        session.wait_for_writes(WRITES)?;
        podman::check_here(source, &container, session.workload.pid)?;
        podman::check_gone(target, &container)?;
    }
    ensure!(session.move_on(&lab, report)?, "it has not moved");
    podman::check_here(lab.node("b")?, &container, session.workload.pid)?;
    podman::check_gone(lab.node("a")?, &container)?;
    let workload = session.finish(report)?;
    settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    workload.kill(&lab)
}

fn shell(node: &Node, script: &str, container: &str) -> Result<()> {
    let ran = node
        .command("sh")?
        .args(["-ec", script, "sh", container])
        .run();
    ran.map(drop).with_context(|| script.to_owned())
}

const BYTES: u64 = 64 << 20; // 64 MiB
const WRITES: u64 = 1_000;
