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

/// The hierarchies of this machine, which nodes get: engines of containers make cgroups in all that
/// `/proc/self/cgroup` lists, and crun takes the first of those for that of the container: without
/// it that would be the node's root.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let found = parse_hierarchies(&mounts);
    if !found
        .iter()
        .any(|h| h.is_v2() || h.controllers == "freezer")
    {
        bail!("this machine has neither cgroup2 nor the freezer cgroup mounted");
    }
    Ok(found)
}

fn parse_hierarchies(mounts: &str) -> Vec<Hierarchy> {
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
        let is_known = kind == "cgroup2" || !controllers.is_empty();
        if is_known && !found.iter().any(|h| h.controllers == controllers) {
            found.push(Hierarchy {
                controllers,
                mount: PathBuf::from(mount),
            });
        }
    }
    found
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
    for hierarchy in hierarchies {
        give_processors(&hierarchy.mount, name)
            .with_context(|| format!("the cgroup {name} in {}", hierarchy.mount.display()))?;
    }
    Ok(folders)
}

/// A cgroup of `cpuset` takes nobody until it is told its processors.
fn give_processors(mount: &Path, name: &str) -> std::io::Result<()> {
    let mut above = mount.to_owned();
    for part in [SUBTREE, name] {
        let folder = above.join(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            // Of version 2 it inherits them.
            if mount.join("cgroup.controllers").exists() || !folder.join(file).exists() {
                continue;
            }
            fs::write(folder.join(file), fs::read(above.join(file))?)?;
        }
        above = folder;
    }
    Ok(())
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
    fn hybrid_mounts_give_all_hierarchies_of_v1_and_v2() {
        let mounts = "proc /proc proc rw 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n\
            cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0\n\
            cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n\
            cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        let found = parse_hierarchies(mounts);
        let names: Vec<_> = found.iter().map(Hierarchy::folder_name).collect();
        assert_eq!(
            names,
            ["cpu,cpuacct", "pids", "freezer", "systemd", "unified"]
        );
        assert_eq!(found[3].controllers, "name=systemd");
        assert_eq!(found[4].mount, Path::new("/sys/fs/cgroup/unified"));
    }
}
