//! A node: one process 1 with namespaces and cgroups of its own, and ways to act inside it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, Hierarchy};
use super::init::{HoldSpec, InitSpec, READY};
use super::inside::{Inside, Namespaces};
use super::pids;

/// What a later process needs to find a node again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    pub name: String,
    /// Process 1 of the node, as the host sees it.
    pub init_pid: i32,
    pub address: Ipv4Addr,
    pub cgroups: Vec<PathBuf>,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    pub record: NodeRecord,
    pub namespaces: Namespaces,
}

/// What all nodes of a lab share.
#[derive(Debug)]
pub struct NodePlan<'a> {
    pub lab_binary: &'a Path,
    /// How many there are.
    pub nodes: usize,
    /// Topmost first.
    pub layers: &'a [PathBuf],
    pub scratch: &'a Path,
    pub shared: &'a Path,
    pub hierarchies: &'a [Hierarchy],
}

impl Node {
    /// Starts process 1 of a node and waits until its root is made.
    pub fn start(
        plan: &NodePlan<'_>,
        name: &str,
        index: usize,
        address: Ipv4Addr,
        cgroups: Vec<PathBuf>,
    ) -> Result<Self> {
        let scratch = plan.scratch.join(name);
        fs::create_dir_all(&scratch).with_context(|| format!("creating {}", scratch.display()))?;
        let spec = InitSpec {
            hostname: format!("node-{name}"),
            layers: plan.layers.to_vec(),
            scratch,
            shared: plan.shared.to_owned(),
            hierarchies: plan.hierarchies.to_vec(),
            pid_first: pids::first_of_node(index, plan.nodes),
        };
        let binary = plan.lab_binary.display().to_string();
        let command = Inside::new(&binary)
            .arg("node-init")
            .cgroups(&cgroups)
            .new_pid_namespace();
        let init = start_and_wait(command, &serde_json::to_string(&spec)?)
            .with_context(|| format!("starting node {name}"))?;
        let init_pid = i32::try_from(init.id()).context("the kernel's pids are ints")?;
        Self::open(NodeRecord {
            name: name.to_owned(),
            init_pid,
            address,
            cgroups,
        })
    }

    /// Finds a node that runs already.
    pub fn open(record: NodeRecord) -> Result<Self> {
        let namespaces = Namespaces::open(&host_process(record.init_pid))
            .with_context(|| format!("node {} is gone", record.name))?;
        Ok(Self { record, namespaces })
    }

    pub fn name(&self) -> &str {
        &self.record.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.record.address
    }

    /// A command inside the node, in all of its namespaces and cgroups.
    pub fn command(&self, program: &str) -> Result<Inside> {
        let ns = &self.namespaces;
        Inside::new(program)
            .cgroups(&self.record.cgroups)
            .root(ns)?
            .enter(&ns.cgroup)?
            .enter(&ns.ipc)?
            .enter(&ns.uts)?
            .enter(&ns.net)
    }

    /// A command with the node's files and processes in the namespaces of one of its processes.
    pub fn command_beside(&self, pid: i32, program: &str) -> Result<Inside> {
        let process = Namespaces::open(&self.process(pid))
            .with_context(|| format!("process {pid} of node {} is gone", self.name()))?;
        Inside::new(program)
            .cgroups(&self.record.cgroups)
            .root(&self.namespaces)?
            .enter(&self.namespaces.cgroup)?
            .enter(process.ipc)?
            .enter(process.uts)?
            .enter(process.net)
    }

    /// A path of the node, as the host reaches it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let relative = inside.strip_prefix("/").unwrap_or(inside);
        host_process(self.record.init_pid)
            .join("root")
            .join(relative)
    }

    /// The folder in the node's /proc of one of its processes, by the pid the node knows.
    pub fn process(&self, pid: i32) -> PathBuf {
        self.path(format!("/proc/{pid}"))
    }

    /// The network namespace of one of the node's processes.
    pub fn network_of(&self, pid: i32) -> Result<OwnedFd> {
        let path = self.process(pid).join("ns/net");
        let file = File::open(&path).with_context(|| {
            format!(
                "opening the network namespace of process {pid} of node {}",
                self.name()
            )
        })?;
        Ok(file.into())
    }

    /// Processes of this node whose command name is `name`, by the pids the node knows.
    pub fn processes_named(&self, name: &str) -> Vec<i32> {
        let mut pids = self.pids();
        pids.retain(|pid| {
            let comm = fs::read_to_string(self.process(*pid).join("comm"));
            comm.is_ok_and(|comm| comm.trim_end() == name)
        });
        pids
    }

    /// As [`Node::processes_named`], by the pids the host knows.
    pub fn host_processes_named(&self, name: &str) -> Vec<i32> {
        let Some(folder) = self.record.cgroups.first() else {
            return Vec::new();
        };
        let mut pids = cgroup::members_below(folder);
        pids.retain(|pid| {
            let comm = fs::read_to_string(host_process(*pid).join("comm"));
            comm.is_ok_and(|comm| comm.trim_end() == name)
        });
        pids.sort_unstable();
        pids
    }

    /// Whether something in the node is frozen by a freezer cgroup.
    pub fn has_frozen_cgroup(&self) -> bool {
        self.record
            .cgroups
            .iter()
            .any(|folder| cgroup::is_frozen_below(folder))
    }

    /// Thaws whatever is frozen in the node.
    pub fn thaw(&self) {
        self.record
            .cgroups
            .iter()
            .for_each(|folder| cgroup::thaw(folder));
    }

    /// Processes of this node in the session that `leader` leads.
    pub fn session(&self, leader: i32) -> Vec<i32> {
        let mut pids = self.pids();
        pids.retain(|pid| {
            let stat = fs::read_to_string(self.process(*pid).join("stat")).unwrap_or_default();
            // After the name in parentheses: state, parent, group, session.
            let session = stat
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.split(' ').nth(3));
            session.and_then(|session| session.parse().ok()) == Some(leader)
        });
        pids
    }

    /// Roots of workloads at this node: leaders of sessions that the lab gave their pids.
    pub fn workload_pids(&self) -> Vec<i32> {
        let mut pids = self.pids();
        pids.retain(|pid| pids::is_of_workload(*pid) && self.session(*pid).contains(pid));
        pids
    }

    fn pids(&self) -> Vec<i32> {
        let Ok(entries) = fs::read_dir(self.path("/proc")) else {
            return Vec::new();
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut pids: Vec<i32> = names
            .filter_map(|name| name.to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Sends a signal to a process of the node.
    pub fn signal(&self, pid: i32, signal: &str) -> Result<()> {
        self.command("kill")?
            .arg(format!("-{signal}"))
            .arg(pid.to_string())
            .run()
            .map(drop)
    }

    /// Starts a process of the node that holds fresh namespaces; returns its pid in the node.
    pub fn hold(&self, spec: HoldSpec) -> Result<i32> {
        let command = self.command("/usr/local/bin/lab")?.arg("hold");
        let child = start_and_wait(command, &serde_json::to_string(&spec)?)?;
        pid_inside(child.id())
    }
}

/// Namespaces of the lab itself that belong to no node, held by a process of the host.
#[derive(Debug)]
pub struct Holder {
    pub pid: i32,
    pub net: OwnedFd,
}

impl Holder {
    pub fn start(lab_binary: &Path, cgroups: &[PathBuf]) -> Result<Self> {
        let binary = lab_binary.display().to_string();
        let command = Inside::new(&binary).arg("hold").cgroups(cgroups);
        let spec = HoldSpec {
            net: true,
            uts: false,
            ipc: false,
        };
        let child = start_and_wait(command, &serde_json::to_string(&spec)?)?;
        Self::open(i32::try_from(child.id()).context("the kernel's pids are ints")?)
    }

    pub fn open(pid: i32) -> Result<Self> {
        let net = File::open(host_process(pid).join("ns/net")).context("a holder is gone")?;
        Ok(Self {
            pid,
            net: net.into(),
        })
    }
}

/// Starts one of the lab's hidden subcommands, hands it its specification, and waits for its word.
fn start_and_wait(command: Inside, spec: &str) -> Result<Child> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child
        .stdin
        .take()
        .expect("stdin was just asked to be a pipe");
    stdin
        .write_all(spec.as_bytes())
        .context("writing the specification")?;
    drop(stdin);
    let stdout = child
        .stdout
        .take()
        .expect("stdout was just asked to be a pipe");
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("reading its answer")?;
    ensure!(line.trim_end() == READY, "{}", line.trim_end());
    Ok(child)
}

/// The pid a process has in the innermost pid namespace it is in.
fn pid_inside(host_pid: u32) -> Result<i32> {
    let path = format!("/proc/{host_pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let last = line.and_then(|pids| pids.split_whitespace().last());
    last.and_then(|pid| pid.parse().ok())
        .with_context(|| format!("no NSpid in {path}"))
}

fn host_process(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}
