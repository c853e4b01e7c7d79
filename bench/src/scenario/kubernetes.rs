//! `kubernetes`: a cluster in the lab, a pod with Redis at one node, a client pod at the other, all
//! that kubectl does with them; and then nothing of it is left. With `--only` pods move, in one of
//! several ways.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::pods::{self, POD_TIME_MAX, Placed};
use super::report::Report;
use super::settings::Settings;
use super::traces::Traces;
use super::{
    annotated, by_hand, crossing, drain, eager, empty_dir, install, kills, multi, refusals,
    resources, twenty,
};
use crate::cluster::laps::Laps;
use crate::cluster::wait::until;
use crate::cluster::{self, Cluster, worker};
use crate::lab::Lab;
use crate::lab::network::Link;
use crate::mover::outcome::round;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let part = settings.only.as_deref().map(part).transpose()?;
    if part.is_some() {
        settings.need_pageferry("stock CRIU moves no pods")?;
    }
    let mut laps = Laps::start();
    let link = settings.link.clone().unwrap_or(Link::Unshaped);
    let mut options = cluster::lab_options(NODES, link, settings.mover.needs_daemons())?;
    options.keep = settings.keep;
    laps.lap("programs are built, or found");
    let before = Traces::now()?;
    let mut lab = Lab::up(&options)?;
    laps.lap("nodes are up");
    let cluster = Cluster::up(&lab, &mut laps);
    let done = cluster.and_then(|mut cluster| match part {
        Some((run, moves)) => run(&mut lab, &mut cluster, &mut laps, report, moves),
        None => in_lab(&lab, &cluster, &mut laps),
    });
    if let (Err(_), Ok(kubectl)) = (&done, cluster::kubectl(&lab)) {
        // What went wrong is in the report; this is for who looks into it.
        let _ = cluster::keep_state(&lab, &kubectl);
    }
    drop(lab);
    if !settings.keep {
        laps.lap("the lab is down");
        for left in Traces::now()?.since(&before) {
            report.fail(format!("the lab left {left}"));
        }
    }
    for (what, took) in laps.taken() {
        report.figure(&format!("{what}, s"), round(took.as_secs_f64()));
    }
    done
}

/// A part of the scenario; with how often it is to move something, where that may be said.
type Part = fn(&mut Lab, &mut Cluster, &mut Laps, &mut Report, usize) -> Result<()>;

/// The part that is asked for: by its name, `NAME=MOVES`, or a number alone of [`twenty`].
fn part(only: &str) -> Result<(Part, usize)> {
    let (name, moves) = match only.split_once('=') {
        Some((name, moves)) => (name, Some(moves)),
        None if only.parse::<usize>().is_ok() => (TWENTY, Some(only)),
        None => (only, None),
    };
    let found = PARTS.iter().find(|part| part.name == name);
    let part = found.with_context(|| {
        let names: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
        format!("kubernetes has no part {name:?}, only {}", names.join(", "))
    })?;
    let moves = match moves {
        None => part.moves,
        Some(_) if part.moves == 0 => bail!("{name} always moves the same: leave out the number"),
        Some(moves) => moves.parse().context("how often it is to move")?,
    };
    ensure!(0 < moves || part.moves == 0, "{name} moves at least once");
    Ok((part.run, moves))
}

/// A part that is run alone.
struct NamedPart {
    name: &'static str,
    what: &'static str,
    run: Part,
    /// How often it moves something unless it is said; 0 where that is fixed.
    moves: usize,
}

/// What `--only` takes, and what that is.
pub const CASES: [(&str, &str); PARTS.len()] = {
    let mut cases = [("", ""); PARTS.len()];
    let mut index = 0;
    while index < PARTS.len() {
        cases[index] = (PARTS[index].name, PARTS[index].what);
        index += 1;
    }
    cases
};

const PARTS: [NamedPart; 11] = [
    NamedPart {
        name: "by-hand",
        what: "a pod moves, each step by hand",
        run: |lab, cluster, laps, report, _| by_hand::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "annotated",
        what: "pods move because they are annotated, one of them a Deployment's",
        run: |lab, cluster, laps, report, _| annotated::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: TWENTY,
        what: "20 moves of Redis with 512 MiB by annotation, or as many as twenty=N says",
        run: |lab, cluster, laps, report, moves| twenty::run(lab, cluster, laps, report, moves),
        moves: twenty::MOVES,
    },
    NamedPart {
        name: "kills",
        what: "30 moves, or kills=N, while controller, agents, daemons, kubelets are killed",
        run: |lab, cluster, laps, report, moves| kills::run(lab, cluster, laps, report, moves),
        moves: kills::MOVES,
    },
    NamedPart {
        name: "install",
        what: "nodes and cluster are prepared by the commands of deploy/README.md, and undone",
        run: |lab, cluster, laps, report, _| install::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "emptydir",
        what: "pods with emptyDirs on disk and in memory move, every file and entry compared",
        run: |lab, cluster, laps, report, _| empty_dir::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "multi",
        what: "a pod of three containers moves, with a loopback connection and a shared emptyDir; \
               then some of what holds it is killed",
        run: |lab, cluster, laps, report, moves| multi::run(lab, cluster, laps, report, moves),
        moves: multi::MOVES,
    },
    NamedPart {
        name: "drain",
        what: "kubectl drain: three pods of a Deployment move, and it ends with 0",
        run: |lab, cluster, laps, report, _| drain::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "crossing",
        what: "two moves cross, and four wait for each other by the limits of a policy",
        run: |lab, cluster, laps, report, _| crossing::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "eager",
        what: "eager probes: moves, also without API server after the commit, and for a fence",
        run: |lab, cluster, laps, report, _| eager::run(lab, cluster, laps, report),
        moves: 0,
    },
    NamedPart {
        name: "refusals",
        what: "targets that do not take a pod, and moves cancelled in every phase",
        run: |lab, cluster, laps, report, _| refusals::run(lab, cluster, laps, report),
        moves: 0,
    },
];

fn in_lab(lab: &Lab, cluster: &Cluster, laps: &mut Laps) -> Result<()> {
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    cluster
        .kubectl
        .apply(&pods::server(SERVER, &worker::name(here)).to_string())?;
    let address = Placed::wait(&cluster.kubectl, SERVER)?.address.to_string();
    laps.lap("the pod of Redis is ready");
    let client = client(&worker::name(there), &address);
    cluster.kubectl.apply(&client.to_string())?;
    let counted = until("the client pod counts", POD_TIME_MAX, || {
        counted(cluster).and_then(|counted| {
            ensure!(COUNT <= counted, "it is at {counted}");
            Ok(counted)
        })
    })?;
    laps.lap("the client pod has counted across nodes, as its log says");
    let get = ["exec", SERVER, "--", "redis-cli", "get", COUNTER];
    let said = cluster.kubectl.run(&get)?;
    let said: usize = said
        .trim()
        .parse()
        .with_context(|| format!("Redis has {said:?}"))?;
    ensure!(
        counted <= said,
        "the client was told {counted}, and Redis has {said}"
    );
    let log = cluster.kubectl.run(&["logs", SERVER])?;
    ensure!(
        log.contains("Ready to accept connections"),
        "the log of Redis: {log}"
    );
    let ping = there
        .command("redis-cli")?
        .args(["-h", &address, "ping"])
        .run()?;
    ensure!(
        ping.trim() == "PONG",
        "Redis says {ping:?} to a process at another node"
    );
    laps.lap("exec, logs, and a process at the other node");
    cluster
        .kubectl
        .run(&["delete", "pod", SERVER, CLIENT, "--timeout=60s"])?;
    until("nothing is left of the pods", POD_TIME_MAX, || {
        lab.nodes.iter().try_for_each(worker::check_no_pods)
    })?;
    laps.lap("the pods are deleted, and nothing of them is left");
    resources::check(&cluster.kubectl)?;
    laps.lap("pageferry's resources are taken, and wrong ones refused");
    Ok(())
}

/// How far the client pod has counted, which must be one after the other.
fn counted(cluster: &Cluster) -> Result<usize> {
    let log = cluster.kubectl.run(&["logs", CLIENT])?;
    for (index, line) in log.lines().enumerate() {
        ensure!(
            line == (index + 1).to_string(),
            "line {} of its log is {line:?}",
            index + 1
        );
    }
    Ok(log.lines().count())
}

fn client(node: &str, server: &str) -> Value {
    let count = [
        "redis-cli",
        "-h",
        server,
        "-r",
        "100000",
        "-i",
        "0.1",
        "incr",
        COUNTER,
    ];
    pods::pod(CLIENT, node, &count.map(str::to_owned))
}

const NODES: usize = 2;
const SERVER: &str = "redis";
const CLIENT: &str = "client";
const COUNTER: &str = "counter";
/// So often the client must have been answered.
const COUNT: usize = 10;
/// The part that a number alone means.
const TWENTY: &str = "twenty";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_known_by_its_name_and_may_say_how_often() {
        assert_eq!(part("twenty").expect("a part").1, twenty::MOVES);
        assert_eq!(part("twenty=3").expect("a part").1, 3);
        assert_eq!(part("7").expect("a part").1, 7);
        for wrong in ["annotated=3", "twenty=0", "twenty=x", "thirty"] {
            part(wrong).map(|(_, moves)| moves).expect_err(wrong);
        }
    }
}
