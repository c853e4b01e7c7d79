//! What the lab moves: process trees started in namespaces of their own, and containers.
//!
//! A workload has its number in the lab; pid, address and port follow from it, so that nothing of
//! one workload is ever taken by another, on whatever node they are.

pub mod bridged;
pub mod case;
pub mod contained;
pub mod container;
pub mod containerd;
pub mod launch;
pub mod nginx;
pub mod podman;
pub mod podman_pod;
pub mod redis;
pub mod whose;
pub mod writer;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::lab::inside::in_network;
use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;
use crate::lab::pids;
use container::Container;
use launch::{LaunchSpec, launch};

/// A workload, wherever it is at the moment.
#[derive(Clone, Debug)]
pub struct Workload {
    pub number: usize,
    /// Of its root process, in the pid namespace of the node it is at: another at each, if it has a
    /// pid namespace of its own.
    pub pid: i32,
    pub link: WorkloadLink,
    /// What it is to a container runtime, if one runs it.
    pub container: Option<Container>,
    /// The id that it has at containerd, if that has it.
    pub containerd: Option<String>,
    /// What podman calls it, if it is a pod of podman.
    pub pod: Option<String>,
}

/// How to start one.
#[derive(Clone, Debug)]
pub struct WorkloadPlan {
    pub name: String,
    pub arguments: Vec<String>,
    pub own_pid_mnt: bool,
    pub uid: Option<u32>,
}

impl Workload {
    /// Starts a workload at a node, with its link open.
    pub fn start(lab: &mut Lab, node: &str, plan: &WorkloadPlan) -> Result<Self> {
        let number = lab.next_workload()?;
        let workload = Self {
            number,
            pid: pids::of_workload(number),
            link: WorkloadLink::new(number),
            container: None,
            containerd: None,
            pod: None,
        };
        let spec = LaunchSpec {
            pid: workload.pid,
            hostname: format!("{}-{number}", plan.name),
            arguments: plan.arguments.clone(),
            own_pid_mnt: plan.own_pid_mnt,
            uid: plan.uid,
        };
        launch(lab.node(node)?, &spec, &workload.link)
            .with_context(|| format!("starting {} at node {node}", plan.name))?;
        Ok(workload)
    }

    /// Waits until it takes connections at a port.
    ///
    /// # Errors
    /// It ended, or does not within half a minute.
    pub fn wait_until_it_listens(&self, lab: &Lab, port: u16) -> Result<()> {
        let address = SocketAddr::from((self.link.address, port));
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            let connected = in_network(&lab.client.net, || {
                TcpStream::connect_timeout(&address, CONNECT_TIME_MAX)
            })?;
            let Err(error) = connected else { return Ok(()) };
            ensure!(
                lab.nodes.iter().any(|node| self.is_at(node)),
                "{} has ended at its start",
                self.name()
            );
            ensure!(
                Instant::now() < deadline,
                "{} takes no connections at {address}: {error}",
                self.name()
            );
            std::thread::sleep(START_POLL);
        }
    }

    /// The name by which pageferry knows it.
    pub fn name(&self) -> String {
        if let Some(pod) = &self.pod {
            return format!("podman-pod/{pod}");
        }
        match (&self.container, &self.containerd) {
            (Some(container), _) => container.name(),
            (_, Some(id)) => format!("containerd/default/{id}"),
            (None, None) => format!("process/{}", self.pid),
        }
    }

    /// True when its root process runs (or is frozen) at this node.
    pub fn is_at(&self, node: &Node) -> bool {
        let stat = fs::read_to_string(node.process(self.pid).join("stat")).unwrap_or_default();
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
    }

    /// Ends it, wherever it is: its whole session, and with it what it forked. A process that is
    /// killed gives its memory back first, so this waits until it is gone.
    pub fn kill(&self, lab: &Lab) -> Result<()> {
        let deadline = Instant::now() + END_TIME_MAX;
        loop {
            self.signal(lab)?;
            if let Some(pod) = &self.pod {
                return podman_pod::delete(lab, pod);
            }
            if !lab.nodes.iter().any(|node| self.is_at(node)) {
                return match (&self.container, &self.containerd) {
                    (Some(container), _) => container::delete(lab, container),
                    (_, Some(id)) => containerd::delete(lab, id),
                    (None, None) => Ok(()),
                };
            }
            ensure!(
                Instant::now() < deadline,
                "{} was killed and does not end within {END_TIME_MAX:?}",
                self.name()
            );
            std::thread::sleep(END_POLL);
        }
    }

    /// Sends SIGKILL, wherever it is: a frozen process does not die of it before it is thawed.
    pub fn signal(&self, lab: &Lab) -> Result<()> {
        for node in &lab.nodes {
            let pids = node.session(self.pid);
            if !pids.is_empty() {
                let pids = pids.iter().map(i32::to_string);
                // One that ended meanwhile makes kill fail, which is as good.
                node.command("kill")?.arg("-KILL").args(pids).output()?;
            }
        }
        Ok(())
    }

    /// Bytes of its root process in memory.
    pub fn memory_bytes(&self, node: &Node) -> Result<u64> {
        let path = node.process(self.pid).join("status");
        let status = fs::read_to_string(&path).context("reading the workload's status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.context("a process without VmRSS")? << 10)
    }
}

/// A database that recovers takes seconds.
const START_TIME_MAX: Duration = Duration::from_secs(30);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(1);
const START_POLL: Duration = Duration::from_millis(20);
/// How long a killed workload may take to end.
const END_TIME_MAX: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(5);
