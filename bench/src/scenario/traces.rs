//! What a lab could leave on this machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::lab::cgroup;
use crate::lab::state::RunFolder;

/// What there is, in words.
#[derive(Debug)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Processes with the names of those that a lab runs, mounts, interfaces, the lab's cgroups
    /// and what a cluster has in its run folder.
    pub fn now() -> Result<Self> {
        let mut found = BTreeSet::new();
        for entry in list("/proc")? {
            let status = fs::read_to_string(entry.join("status")).unwrap_or_default();
            let named = |program: &str| status.starts_with(&format!("Name:\t{program}"));
            // What has ended is there until this process, its parent, ends or asks for it.
            if PROGRAMS.iter().any(|program| named(program)) && !status.contains("\nState:\tZ") {
                let name = status.lines().next().unwrap_or_default();
                found.insert(format!("process {} ({name})", entry.display()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mounts").context("reading mounts")?;
        found.extend(mounts.lines().map(|line| format!("the mount {line}")));
        for entry in list("/sys/class/net")? {
            found.insert(format!("the interface {}", entry.display()));
        }
        for hierarchy in cgroup::hierarchies()? {
            let folder = hierarchy.lab_folder();
            if folder.exists() {
                found.insert(format!("the cgroup {}", folder.display()));
            }
        }
        let folder = RunFolder::new().kubernetes();
        if folder.exists() {
            found.insert(format!("the folder {}", folder.display()));
        }
        Ok(Self(found))
    }

    /// What there is now and was not before.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn list(folder: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {folder}"))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// How their names begin; the kernel keeps 15 letters.
const PROGRAMS: [&str; 11] = [
    "containerd",
    "etcd",
    "kube",
    "lab-cases",
    "lab-writer",
    "pageferry",
    "pause",
    "redis",
    "runc",
    "criu",
    "crun",
];
