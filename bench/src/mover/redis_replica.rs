//! Redis' own way: a replica at the target takes everything, becomes the master by `FAILOVER`, and
//! takes over the address. Connections do not survive it: clients connect anew.
//!
//! `FAILOVER` has the master take no more writes until the replica has them all, so that nothing
//! that was acknowledged is lost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::outcome::{Move, Outcome, Parts, millis};
use super::redis_aof::{says, wait_until};
use super::{Mover, Order};
use crate::lab::Lab;
use crate::lab::inside::in_network;
use crate::lab::network::{PREFIX, WorkloadLink, ip, mac_of};
use crate::lab::node::Node;
use crate::lab::pids;
use crate::sys;
use crate::workload::Workload;
use crate::workload::launch::{LaunchSpec, launch};
use crate::workload::redis;

/// Moves by replication and failover.
#[derive(Clone, Copy, Debug)]
pub struct RedisReplica;

impl Mover for RedisReplica {
    fn name(&self) -> &'static str {
        "redis-replica"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let (source, target) = (lab.node(order.from)?, lab.node(order.to)?);
        ensure!(
            lab.workloads() < REPLICA,
            "the replica needs the number of a workload"
        );
        let master = order.workload;
        let memory_bytes = master.memory_bytes(source)?;
        let begun = Instant::now();
        // Else the master waits for 5 s whether other replicas come.
        let at_once = "CONFIG SET repl-diskless-sync-delay 0";
        ensure!(
            says(source, master.link.address, at_once, "OK")?,
            "the master does not let itself be configured"
        );
        let replica = start_replica(target, master)?;
        let up = "master_link_status:up";
        let link = &replica.link;
        wait_until(SYNC_TIME_MAX, || {
            says(target, link.address, "INFO replication", up)
        })
        .context("the replica does not come up with its master")?;
        let failing = Instant::now();
        let failover = format!("FAILOVER TO {} {} TIMEOUT 30000", link.address, redis::PORT);
        if !says(source, master.link.address, &failover, "OK")? {
            replica.kill(lab)?;
            bail!("the master refuses to fail over");
        }
        let is_master = "role:master";
        wait_until(SYNC_TIME_MAX, || {
            says(target, link.address, "INFO replication", is_master)
        })
        .context("the replica does not become the master")?;
        let promoted = Instant::now();
        let wire_bytes = received_bytes(target, &replica)?;
        send_clients_away(source, master)?;
        master.link.close(source)?;
        take_address(target, &replica, master)?;
        let moved = Instant::now();
        source.signal(master.pid, "KILL")?;
        let mut outcome = Outcome::moved(Move {
            workload: master.name(),
            mode: "failover".to_owned(),
            from: order.from.to_owned(),
            to: order.to.to_owned(),
            rounds: 0,
            memory_bytes,
            wire_bytes,
            downtime_ms: millis(moved - failing),
            parts_ms: Parts {
                commit: millis(promoted - failing),
                handoff: millis(moved - promoted),
                ..Parts::default()
            },
            frozen_ms: None,
            restore_ms: None,
            blackout_ms: None,
            pauses: None,
            longest_pause_ms: None,
            total_ms: millis(moved - begun),
        });
        // It is the replica that goes on.
        outcome.object = json!({ "pid_at_target": replica.pid });
        Ok(outcome)
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

fn start_replica(target: &Node, master: &Workload) -> Result<Workload> {
    let replica = Workload {
        number: REPLICA,
        pid: pids::of_workload(REPLICA),
        link: WorkloadLink::new(REPLICA),
        container: None,
        containerd: None,
        pod: None,
    };
    let mut plan = redis::plan();
    let of = ["--replicaof".to_owned(), master.link.address.to_string()];
    plan.arguments.extend(of);
    plan.arguments.push(redis::PORT.to_string());
    let spec = LaunchSpec {
        pid: replica.pid,
        hostname: "redis-replica".to_owned(),
        arguments: plan.arguments,
        own_pid_mnt: false,
        uid: None,
    };
    launch(target, &spec, &replica.link).context("starting the replica")?;
    Ok(replica)
}

/// Has clients hear that their connections have ended, so that they need not find out; and none
/// comes back, by one connection: there is no room for another.
fn send_clients_away(source: &Node, master: &Workload) -> Result<()> {
    let last_words = "CONFIG SET maxclients 1\nCLIENT KILL TYPE normal\n";
    source
        .command("redis-cli")?
        .args(["-h", &master.link.address.to_string()])
        .run_with_input(last_words)
        .context("sending the master's clients away")?;
    Ok(())
}

/// What a replica has received: from its master alone, as clients do not know it yet.
fn received_bytes(node: &Node, replica: &Workload) -> Result<u64> {
    let path = node.process(replica.pid).join("net/dev");
    let text = std::fs::read_to_string(path).context("reading what a replica has received")?;
    let mut lines = text.lines().map(str::trim_start);
    let line = lines.find_map(|line| line.strip_prefix("eth0:"));
    let bytes = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    bytes.context("a replica without eth0")
}

/// The replica gets the master's address besides its own, and everybody is told.
fn take_address(target: &Node, replica: &Workload, master: &Workload) -> Result<()> {
    let inner = target.network_of(replica.pid)?;
    let address = master.link.address;
    ip(target, &inner, &[], |_| {
        format!("addr add {address}/{PREFIX} dev eth0\n")
    })?;
    let sender = (mac_of(replica.link.address), address.octets());
    in_network(&inner, || {
        sys::send_arp_request("eth0", sender, address.octets())
    })?
    .context("announcing the master's address")
}

/// Above those that a benchmark gives to its workloads.
const REPLICA: usize = 149;
/// All memory over the slowest link of the benchmark.
const SYNC_TIME_MAX: Duration = Duration::from_secs(300);
