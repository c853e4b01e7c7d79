//! The lab's cgroups: one subtree `pageferry-lab/NODE` in each hierarchy a node needs.
//!
//! Everything the lab starts is born in this subtree and (cgroup namespaces) cannot leave it, so
//! the subtree is also what clean-up trusts to find the processes of a lab that was killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// One cgroup hierarchy of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Controllers as mount options have them ("freezer", "cpu,cpuacct"), or the name if there are
    /// none ("name=systemd"); empty for version 2.
    pub controllers: String,
    /// Where the host has it mounted.
    pub mount: PathBuf,
}

impl Hierarchy {
    /// What its folder is called at a node.
    pub fn folder_name(&self) -> &str {
        match self.is_v2() {
            true => "unified",
            false => self.controllers.trim_start_matches(NAMED),
        }
    }

    pub fn is_v2(&self) -> bool {
        self.controllers.is_empty()
    }

    /// The folder of the lab's subtree.
    pub fn lab_folder(&self) -> PathBuf {
        self.mount.join(SUBTREE)
    }
}

/// The hierarchies of this machine that nodes get: version 2, and of version 1 those that the
/// migration or the lab's measurements use.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let (mounts, listed) = (read("/proc/self/mounts")?, read("/proc/self/cgroup")?);
    let found = parse_hierarchies(&mounts, &listed);
    if !found
        .iter()
        .any(|h| h.is_v2() || h.controllers == "freezer")
    {
        bail!("this machine has neither cgroup2 nor the freezer cgroup mounted");
    }
    Ok(found)
}

fn parse_hierarchies(mounts: &str, listed: &str) -> Vec<Hierarchy> {
    // There crun looks for the cgroup of a container that it restores, whatever it is; without it
    // it takes the node's root for that, and kills all that is in there.
    let first = listed
        .lines()
        .next()
        .and_then(|line| line.split(':').nth(1));
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(mount), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let controllers = match kind {
            "cgroup2" => String::new(),
            "cgroup" => {
                let is_known =
                    |option: &&str| V1_CONTROLLERS.contains(option) || option.starts_with(NAMED);
                let known = options.split(',').filter(is_known);
                known.collect::<Vec<_>>().join(",")
            }
            _ => continue,
        };
        let wanted = kind == "cgroup2"
            || first == Some(&controllers)
            || WANTED.iter().any(|w| has(&controllers, w));
        if wanted && !found.iter().any(|h| h.controllers == controllers) {
            found.push(Hierarchy {
                controllers,
                mount: PathBuf::from(mount),
            });
        }
    }
    found
}

fn has(controllers: &str, wanted: &str) -> bool {
    controllers
        .split(',')
        .any(|controller| controller == wanted)
}

/// Makes `pageferry-lab/NAME` in each hierarchy; returns the folders.
pub fn create(hierarchies: &[Hierarchy], name: &str) -> Result<Vec<PathBuf>> {
    let folders: Vec<PathBuf> = hierarchies
        .iter()
        .map(|h| h.lab_folder().join(name))
        .collect();
    for folder in &folders {
        fs::create_dir_all(folder)
            .with_context(|| format!("creating the cgroup {}", folder.display()))?;
    }
    Ok(folders)
}

/// Thaws and kills everything in the lab's subtrees and removes them. Safe to call at any time.
pub fn remove_all(hierarchies: &[Hierarchy]) -> Result<()> {
    let deadline = Instant::now() + REMOVAL_TIME_MAX;
    loop {
        let mut left = Vec::new();
        for hierarchy in hierarchies {
            let folder = hierarchy.lab_folder();
            if folder.is_dir() {
                thaw(&folder);
                kill_members(&folder);
            }
        }
        for hierarchy in hierarchies {
            let folder = hierarchy.lab_folder();
            if folder.is_dir() && remove_tree(&folder).is_err() {
                left.push(folder);
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("cgroups of the lab could not be emptied: {left:?}");
        }
        std::thread::sleep(REMOVAL_POLL);
    }
}

/// A frozen task of version 1 does not die of SIGKILL, so everything is thawed first. The children
/// come after their parent: a child cannot thaw below a frozen parent.
pub fn thaw(folder: &Path) {
    // Writes fail where the file does not belong to this hierarchy: nothing to thaw there.
    let _ = fs::write(folder.join("freezer.state"), "THAWED");
    let _ = fs::write(folder.join("cgroup.freeze"), "0");
    for child in subfolders(folder) {
        thaw(&child);
    }
}

fn kill_members(folder: &Path) {
    for pid in members_below(folder) {
        // It may be gone already; what matters is checked by removing the folder.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The processes of a cgroup itself, without those of its children.
pub fn members(folder: &Path) -> Vec<i32> {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect()
}

/// The processes of a cgroup and of all below it.
pub fn members_below(folder: &Path) -> Vec<i32> {
    let mut pids = members(folder);
    for child in subfolders(folder) {
        pids.extend(members_below(&child));
    }
    pids
}

/// Whether this cgroup or one below it is frozen, or about to be: a task that waits for a page
/// (userfaultfd) freezes only when it has got it, and if nobody gives it, never.
pub fn is_frozen_below(folder: &Path) -> bool {
    let holds = |file: &str, wanted: &str| {
        fs::read_to_string(folder.join(file)).is_ok_and(|text| text.contains(wanted))
    };
    holds("freezer.state", "FROZEN")
        || holds("freezer.state", "FREEZING")
        || holds("cgroup.freeze", "1")
        || subfolders(folder)
            .iter()
            .any(|child| is_frozen_below(child))
}

fn remove_tree(folder: &Path) -> std::io::Result<()> {
    for child in subfolders(folder) {
        remove_tree(&child)?;
    }
    fs::remove_dir(folder)
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    paths.map(|entry| entry.path()).collect()
}

const SUBTREE: &str = "pageferry-lab";
/// How the name of a hierarchy begins.
const NAMED: &str = "name=";
/// Without the last one runc starts nothing.
const WANTED: [&str; 4] = ["freezer", "memory", "cpu", "devices"];
const V1_CONTROLLERS: [&str; 13] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];
/// A 4 GiB workload takes some 300 ms to die on one core; nodes hold several.
const REMOVAL_TIME_MAX: Duration = Duration::from_secs(20);
const REMOVAL_POLL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_mounts_give_the_wanted_v1_hierarchies_and_v2() {
        let mounts = "proc /proc proc rw 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n\
            cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0\n\
            cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n\
            cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        let found = parse_hierarchies(mounts, "");
        let names: Vec<_> = found.iter().map(|h| h.controllers.as_str()).collect();
        assert_eq!(names, ["cpu,cpuacct", "freezer", ""]);
        assert_eq!(found[2].mount, Path::new("/sys/fs/cgroup/unified"));
        // And the one that is listed first.
        let found = parse_hierarchies(mounts, "9:name=systemd:/\n8:pids:/\n0::/\n");
        let names: Vec<_> = found.iter().map(Hierarchy::folder_name).collect();
        assert_eq!(names, ["cpu,cpuacct", "freezer", "systemd", "unified"]);
        assert_eq!(found[2].controllers, "name=systemd");
    }
}
