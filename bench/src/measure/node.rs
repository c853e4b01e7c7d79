//! What a node as a whole used: CPU time and memory by its cgroups, bytes by its network.
//!
//! Unlike [`super::Meter`], nothing of a process that lived for a moment is missed.

use std::fs;

use anyhow::{Context, Result};

use crate::lab::node::Node;

/// Counters of a node at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Of all its processes, dead ones too.
    pub cpu_seconds: f64,
    /// What its processes and its files in memory take; none where the machine has no memory
    /// cgroups.
    pub memory_bytes: Option<u64>,
    /// IP packets that the node itself has sent: what its workloads send is forwarded by its bridge
    /// and is not among them.
    pub sent_bytes: u64,
}

impl Counters {
    pub fn read(node: &Node) -> Result<Self> {
        Ok(Self {
            cpu_seconds: cpu_seconds(node)?,
            memory_bytes: first_number(node, &["memory.usage_in_bytes", "memory.current"]),
            sent_bytes: sent_bytes(node)?,
        })
    }
}

fn cpu_seconds(node: &Node) -> Result<f64> {
    if let Some(nanos) = first_number(node, &["cpuacct.usage"]) {
        return Ok(nanos as f64 / 1e9);
    }
    let mut stats = node
        .record
        .cgroups
        .iter()
        .filter_map(|folder| fs::read_to_string(folder.join("cpu.stat")).ok());
    let micros = stats.find_map(|stat| field(&stat, "usage_usec"));
    let micros = micros.with_context(|| {
        format!(
            "no cgroup of node {} tells of CPU time (cpuacct, cpu.stat)",
            node.name()
        )
    })?;
    Ok(micros as f64 / 1e6)
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

fn first_number(node: &Node, files: &[&str]) -> Option<u64> {
    let folders = node.record.cgroups.iter();
    let mut paths = folders.flat_map(|folder| files.iter().map(|file| folder.join(file)));
    paths.find_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
}

fn sent_bytes(node: &Node) -> Result<u64> {
    let text = fs::read_to_string(node.process(1).join("net/netstat"));
    let text = text.context("reading what a node has sent")?;
    octets(&text).context("the kernel does not tell how many bytes a node has sent (OutOctets)")
}

/// `OutOctets` of /proc/net/netstat: a line of names, then one of values.
fn octets(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("IpExt: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == "OutOctets")?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_are_found_by_their_name() {
        let text = "TcpExt: A B\nTcpExt: 1 2\nIpExt: InOctets OutOctets X\nIpExt: 3 44 5\n";
        assert_eq!(octets(text), Some(44));
        assert_eq!(octets("TcpExt: A\nTcpExt: 1\n"), None);
    }
}
