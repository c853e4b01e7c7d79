//! Drain and redeploy: Redis is asked to end, which writes its append-only file to the end, and
//! another one starts at the target from that file, with the same address.
//!
//! The file is on storage that both nodes have, so that nothing is copied: the most favourable case
//! of this way. Its downtime is until Redis has loaded everything.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::criu::announce;
use super::outcome::{Move, Outcome, Parts, millis};
use super::{Mover, Order};
use crate::lab::Lab;
use crate::lab::node::Node;
use crate::workload::launch::{LaunchSpec, launch};
use crate::workload::redis;

/// Ends Redis at the source, and starts it at the target.
#[derive(Clone, Copy, Debug)]
pub struct RedisAof;

impl Mover for RedisAof {
    fn name(&self) -> &'static str {
        "redis-aof"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let (source, target) = (lab.node(order.from)?, lab.node(order.to)?);
        let workload = order.workload;
        let memory_bytes = workload.memory_bytes(source)?;
        let begun = Instant::now();
        source.signal(workload.pid, "TERM")?;
        wait_until(END_TIME_MAX, || Ok(!workload.is_at(source)))
            .context("Redis was asked to end and does not")?;
        let ended = Instant::now();
        let plan = redis::aof_plan(workload.number);
        let spec = LaunchSpec {
            pid: workload.pid,
            hostname: format!("{}-{}", plan.name, workload.number),
            arguments: plan.arguments,
            own_pid_mnt: plan.own_pid_mnt,
            uid: plan.uid,
        };
        launch(target, &spec, &workload.link).context("starting Redis at the target")?;
        announce(target, workload.pid, workload)?;
        let started = Instant::now();
        wait_until(LOAD_TIME_MAX, || {
            says(target, workload.link.address, "PING", "PONG")
        })
        .context("Redis does not load its append-only file")?;
        let loaded = Instant::now();
        Ok(Outcome::moved(Move {
            workload: workload.name(),
            mode: "restart".to_owned(),
            from: order.from.to_owned(),
            to: order.to.to_owned(),
            rounds: 0,
            memory_bytes,
            wire_bytes: 0,
            downtime_ms: millis(loaded - begun),
            parts_ms: Parts {
                freeze: millis(ended - begun),
                final_round: 0.0,
                restore: millis(loaded - started),
                commit: 0.0,
                handoff: millis(started - ended),
            },
            frozen_ms: None,
            restore_ms: None,
            blackout_ms: None,
            pauses: None,
            longest_pause_ms: None,
            total_ms: millis(loaded - begun),
        }))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

/// Whether a Redis answers a command, asked from a node, with something that has `wanted` in it.
pub(super) fn says(node: &Node, address: Ipv4Addr, command: &str, wanted: &str) -> Result<bool> {
    let asked = node
        .command("redis-cli")?
        .args(["-h", &address.to_string(), "-t", "1"])
        .args(command.split(' '))
        .output()?;
    Ok(String::from_utf8_lossy(&asked.stdout).contains(wanted))
}

/// Asks again and again.
pub(super) fn wait_until(
    time_max: Duration,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + time_max;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not within {time_max:?}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

const END_TIME_MAX: Duration = Duration::from_secs(60);
const LOAD_TIME_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(2);
