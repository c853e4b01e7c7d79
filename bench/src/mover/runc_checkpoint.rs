//! `runc checkpoint`, the images copied, `runc restore`: a container moved by its own runtime.
//!
//! Its network namespace is made by the lab and joined, as engines have it; CRIU's lock of the
//! network is off (`/etc/criu/runc.conf`), since the link is closed meanwhile.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::criu::{announce, know_client};
use super::images::{self, FOLDER, Receiver};
use super::outcome::{Move, Outcome, Parts, millis};
use super::{Mover, Order};
use crate::lab::Lab;
use crate::lab::init::HoldSpec;
use crate::lab::node::Node;
use crate::workload::container;

/// Moves containers of runc.
#[derive(Clone, Copy, Debug)]
pub struct RuncCheckpoint;

impl Mover for RuncCheckpoint {
    fn name(&self) -> &'static str {
        "runc-checkpoint"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let (source, target) = (lab.node(order.from)?, lab.node(order.to)?);
        let workload = order.workload;
        let id = match &workload.container {
            Some(container) => container.id.clone(),
            None => bail!("{} is no container", workload.name()),
        };
        let memory_bytes = workload.memory_bytes(source)?;
        let begun = Instant::now();
        let holder = prepare(source, target, order, &id)?;
        let receiver = Receiver::start(target, FOLDER)?;
        let closed = Instant::now();
        workload.link.close(source)?;
        let checkpoint = runc(source, &["checkpoint"], &id)?;
        if let Err(error) = checkpoint {
            workload.link.open(source)?;
            target.signal(holder, "KILL")?;
            return Ok(Outcome::refused("runc-checkpoint", error));
        }
        let dumped = Instant::now();
        let wire_bytes = receiver.take(source, target, FOLDER)?;
        let copied = Instant::now();
        let bundle = container::bundle(&id);
        if let Err(error) = runc(target, &["restore", "--detach", "--bundle", &bundle], &id)? {
            bail!("runc restore: {error}");
        }
        let restored = Instant::now();
        workload.link.open(target)?;
        announce(target, holder, workload)?;
        let opened = Instant::now();
        let mut outcome = Outcome::moved(Move {
            workload: workload.name(),
            mode: "stop-and-copy".to_owned(),
            from: order.from.to_owned(),
            to: order.to.to_owned(),
            rounds: 0,
            memory_bytes,
            wire_bytes,
            downtime_ms: millis(opened - closed),
            parts_ms: Parts {
                freeze: millis(dumped - closed),
                final_round: millis(copied - dumped),
                restore: millis(restored - copied),
                commit: 0.0,
                handoff: millis(opened - restored),
            },
            frozen_ms: None,
            restore_ms: None,
            blackout_ms: None,
            pauses: None,
            longest_pause_ms: None,
            total_ms: millis(opened - begun),
        });
        let state = target.command("runc")?.args(["state", &id]).run()?;
        let state: Value = serde_json::from_str(&state).context("reading a container's state")?;
        outcome.object = serde_json::json!({ "pid_at_target": state["pid"] });
        Ok(outcome)
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

/// Makes the network namespace at the target, and has the bundle there join it.
fn prepare(source: &Node, target: &Node, order: &Order<'_>, id: &str) -> Result<i32> {
    let holder = hold_network(target)?;
    let link = &order.workload.link;
    link.create(target, &target.network_of(holder)?)?;
    know_client(target, holder)?;
    let path = target.path(format!("{}/config.json", container::bundle(id)));
    let text = fs::read_to_string(&path).context("reading the bundle at the target")?;
    let mut spec: Value = serde_json::from_str(&text).context("reading the bundle")?;
    let spaces = spec["linux"]["namespaces"].as_array_mut();
    for space in spaces.context("a bundle without namespaces")? {
        if space["type"] == "network" {
            space["path"] = network_path(holder).into();
        }
    }
    fs::write(&path, serde_json::to_vec(&spec)?).context("writing the bundle at the target")?;
    for node in [source, target] {
        images::make_folder(node)?;
        let folder = node.path("/etc/criu");
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(folder.join("runc.conf"), "network-lock skip\n"))
            .context("configuring CRIU for runc")?;
    }
    Ok(holder)
}

/// A network namespace of a node, held by a process; its pid.
pub fn hold_network(node: &Node) -> Result<i32> {
    node.hold(HoldSpec {
        net: true,
        uts: false,
        ipc: false,
    })
}

/// By which a bundle joins it.
pub fn network_path(holder: i32) -> String {
    format!("/proc/{holder}/ns/net")
}

/// Runs runc; what it complains of if it fails. Its output would stay open in what it restores.
fn runc(node: &Node, words: &[&str], id: &str) -> Result<Result<(), String>> {
    let common = "--image-path /tmp/images --work-path /tmp/images --tcp-established \
                  --manage-cgroups-mode ignore";
    let script = format!(
        "exec runc {} {common} {id} </dev/null >/dev/null 2>/tmp/runc.log",
        words.join(" ")
    );
    let output = node.command("sh")?.args(["-c", &script]).output()?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = fs::read_to_string(node.path("/tmp/runc.log")).unwrap_or_default();
    let last = said.lines().last().unwrap_or("it says nothing").to_owned();
    Ok(Err(last))
}
