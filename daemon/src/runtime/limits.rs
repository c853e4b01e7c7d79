//! The limits of a workload: read from its cgroups at the source, set on its cgroup at the target.
//!
//! What is carried is in [`ResourceLimits`]: memory, swap, processor time and weight, processes.
//! The strictest limit counts of the workload's own cgroup and those above it, but for the root of
//! the hierarchy, whose limits are the node's. What is bound to devices, processors or memory nodes
//! of one machine is not carried; it is named ([`Found::left_behind`]).
//!
//! Both versions of cgroups are read and set; each controller is in one of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageferry_cgroup::hierarchies::{FOLDER, Hierarchies, Hierarchy};
use pageferry_proto::wire::needs::{CPU_WEIGHT_MAX, CpuMax, ResourceLimits};
use thiserror::Error;

use super::memory::{UNLIMITED, number};

/// The limits of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// What is carried.
    pub limits: ResourceLimits,
    /// Files of its cgroups that say something which is not.
    pub left_behind: Vec<PathBuf>,
}

/// Why a limit cannot be set.
#[derive(Debug, Error)]
pub enum LimitError {
    /// No hierarchy has the controller.
    #[error(
        "the workload has a limit that the cgroup controller {controller} keeps, which this node \
         does not have"
    )]
    NoController {
        /// The controller.
        controller: &'static str,
    },
    /// A file could not be written.
    #[error("cannot write {value} to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What limits process `pid`.
pub fn read(pid: i32, hierarchies: &Hierarchies) -> Found {
    let mut found = Found::default();
    for hierarchy in hierarchies.iter() {
        let Some(folder) = hierarchy.current(pid) else {
            continue;
        };
        let own: Vec<PathBuf> = hierarchy
            .chain(&folder)
            .filter(|folder| *folder != hierarchy.point)
            .collect();
        merge(&mut found.limits, hierarchy, &own);
        found.left_behind.extend(left_behind(hierarchy, &own));
    }
    found
}

/// `folders` are the workload's own and those above it.
fn merge(limits: &mut ResourceLimits, hierarchy: &Hierarchy, folders: &[PathBuf]) {
    let strictest = |file: &str| {
        let numbers = folders
            .iter()
            .filter_map(|folder| number(&folder.join(file)));
        numbers.filter(|number| *number < UNLIMITED).min()
    };
    let is_v2 = hierarchy.controllers.is_none();
    let keep = |limit: &mut Option<u64>, found: Option<u64>| *limit = found.or(*limit);
    keep(&mut limits.pids_max, strictest("pids.max"));
    if is_v2 {
        keep(&mut limits.memory_max, strictest("memory.max"));
        keep(&mut limits.memory_high, strictest("memory.high"));
        keep(&mut limits.swap_max, strictest("memory.swap.max"));
    } else if hierarchy.has("memory") {
        keep(&mut limits.memory_max, strictest(LIMIT_V1));
        let both = strictest(SWAP_LIMIT_V1);
        let swap = both.map(|both| both.saturating_sub(limits.memory_max.unwrap_or(both)));
        keep(&mut limits.swap_max, swap);
    }
    let times = folders.iter().filter_map(|folder| cpu_max(folder, is_v2));
    // Compared as fractions: quota times the other's period.
    let least =
        times.min_by_key(|max| u128::from(max.quota_us) * 1_000_000 / u128::from(max.period_us));
    limits.cpu_max = least.or(limits.cpu_max);
    limits.cpu_weight = folders
        .first()
        .and_then(|own| cpu_weight(own, is_v2))
        .or(limits.cpu_weight);
}

fn cpu_max(folder: &Path, is_v2: bool) -> Option<CpuMax> {
    if !is_v2 {
        return Some(CpuMax {
            quota_us: number(&folder.join("cpu.cfs_quota_us"))?,
            period_us: number(&folder.join("cpu.cfs_period_us"))?,
        });
    }
    let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    Some(CpuMax {
        quota_us: quota.parse().ok()?,
        period_us: period.parse().ok()?,
    })
}

/// The weight, unless it is the usual one.
fn cpu_weight(folder: &Path, is_v2: bool) -> Option<u32> {
    let weight = if is_v2 {
        number(&folder.join("cpu.weight"))?
    } else {
        // As in the kernel: 1024 shares are a weight of 100.
        (number(&folder.join("cpu.shares"))? * WEIGHT_USUAL / SHARES_USUAL).max(1)
    };
    let weight = weight.min(CPU_WEIGHT_MAX.into());
    (weight != WEIGHT_USUAL).then(|| u32::try_from(weight).unwrap_or(CPU_WEIGHT_MAX))
}

/// Files that say something which is not carried.
fn left_behind(hierarchy: &Hierarchy, folders: &[PathBuf]) -> Vec<PathBuf> {
    let says_something = |folder: &PathBuf, (file, usual): &(&str, Usual)| {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).ok()?;
        let is_usual = match usual {
            Usual::Empty => text.trim().is_empty(),
            Usual::Text(usual) => text.trim() == *usual,
            Usual::AsTheRoot => {
                let root = fs::read_to_string(hierarchy.point.join(file));
                text.trim().is_empty() || root.is_ok_and(|root| root == text)
            }
        };
        (!is_usual).then_some(path)
    };
    let files = folders.iter().flat_map(|folder| {
        NOT_CARRIED
            .iter()
            .filter_map(move |file| says_something(folder, file))
    });
    files.collect()
}

/// What a file says where nobody has set anything.
enum Usual {
    Empty,
    Text(&'static str),
    AsTheRoot,
}

const NOT_CARRIED: [(&str, Usual); 16] = [
    ("blkio.throttle.read_bps_device", Usual::Empty),
    ("blkio.throttle.read_iops_device", Usual::Empty),
    ("blkio.throttle.write_bps_device", Usual::Empty),
    ("blkio.throttle.write_iops_device", Usual::Empty),
    ("cpu.idle", Usual::Text("0")),
    ("cpuset.cpus", Usual::AsTheRoot),
    ("cpuset.mems", Usual::AsTheRoot),
    ("devices.list", Usual::AsTheRoot),
    ("hugetlb.2MB.limit_in_bytes", Usual::AsTheRoot),
    ("hugetlb.2MB.max", Usual::Text("max")),
    ("io.max", Usual::Empty),
    ("memory.low", Usual::Text("0")),
    ("memory.min", Usual::Text("0")),
    ("memory.oom.group", Usual::Text("0")),
    ("net_cls.classid", Usual::Text("0")),
    ("rdma.max", Usual::Empty),
];

/// When limits are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before the restore: those of memory, which the workload never had more of. The others are
    /// tried, and lifted again: CRIU works in the same cgroup, beside tasks that may be as many as
    /// they may be, and nobody should wait for processor time that the workload used up elsewhere.
    Making,
    /// When the workload is restored, before its first instruction: those others.
    Restored,
}

/// Sets `limits` on the cgroup `name` of ours, made where it is needed, as far as it is time for
/// them. Returns its folders: whoever is in all of them is limited.
pub fn set(
    limits: &ResourceLimits,
    name: &str,
    hierarchies: &Hierarchies,
    stage: Stage,
) -> Result<Vec<PathBuf>, LimitError> {
    let ResourceLimits {
        memory_max,
        memory_high,
        swap_max,
        cpu_max,
        cpu_weight,
        pids_max,
    } = *limits;
    let mut folders = Vec::new();
    let mut write = |controller, v1: Vec<(&str, String)>, v2: Vec<(&str, String)>| {
        let Some((folder, is_v2)) = folder(controller, name, hierarchies)? else {
            return Err(LimitError::NoController { controller });
        };
        let files = if is_v2 { v2 } else { v1 };
        for (file, value) in files {
            let path = folder.join(file);
            let lifted = lifted(file).filter(|_| stage == Stage::Making);
            put(&path, value)?;
            lifted.map_or(Ok(()), |lifted| put(&path, lifted.to_owned()))?;
        }
        folders.push(folder);
        Ok(())
    };
    let is_making = stage == Stage::Making;
    if is_making && (memory_max.is_some() || memory_high.is_some() || swap_max.is_some()) {
        let text = |file, limit: Option<u64>| limit.map(|limit| (file, limit.to_string()));
        let both = memory_max
            .zip(swap_max)
            .map(|(max, swap)| max.saturating_add(swap));
        // Version 1 has nothing like `memory.high`, and no limit of swap alone.
        let v1 = [text(LIMIT_V1, memory_max), text(SWAP_LIMIT_V1, both)];
        let v2 = [
            text("memory.max", memory_max),
            text("memory.high", memory_high),
            text("memory.swap.max", swap_max),
        ];
        write(
            "memory",
            v1.into_iter().flatten().collect(),
            v2.into_iter().flatten().collect(),
        )?;
    }
    if let Some(max) = pids_max {
        let value = vec![("pids.max", max.to_string())];
        write("pids", value.clone(), value)?;
    }
    if cpu_max.is_some() || cpu_weight.is_some() {
        let (mut v1, mut v2) = (Vec::new(), Vec::new());
        if let Some(CpuMax {
            quota_us,
            period_us,
        }) = cpu_max
        {
            v1.push(("cpu.cfs_period_us", period_us.to_string()));
            v1.push(("cpu.cfs_quota_us", quota_us.to_string()));
            v2.push(("cpu.max", format!("{quota_us} {period_us}")));
        }
        if let Some(weight) = cpu_weight {
            let shares = u64::from(weight) * SHARES_USUAL / WEIGHT_USUAL;
            v1.push(("cpu.shares", shares.max(SHARES_MIN).to_string()));
            v2.push(("cpu.weight", weight.to_string()));
        }
        write("cpu", v1, v2)?;
    }
    Ok(folders)
}

/// What lifts a limit that does not hold during the restore.
fn lifted(file: &str) -> Option<&'static str> {
    match file {
        "pids.max" | "cpu.max" => Some("max"),
        "cpu.cfs_quota_us" => Some("-1"),
        "cpu.shares" => Some("1024"),
        "cpu.weight" => Some("100"),
        _ => None,
    }
}

/// The folder of cgroup `name` with this controller, and whether it is of version 2.
fn folder(
    controller: &'static str,
    name: &str,
    hierarchies: &Hierarchies,
) -> Result<Option<(PathBuf, bool)>, LimitError> {
    let (hierarchy, is_v2) = match (hierarchies.with(controller), hierarchies.unified()) {
        (Some(hierarchy), _) => (hierarchy, false),
        (None, Some(hierarchy)) if offers(&hierarchy.point, controller) => (hierarchy, true),
        (None, _) => return Ok(None),
    };
    let folder = hierarchy.ours().join(name);
    fs::create_dir_all(&folder).map_err(|source| LimitError::Write {
        path: folder.clone(),
        value: "a cgroup".to_owned(),
        source,
    })?;
    if is_v2 {
        // A controller is passed on by each cgroup above.
        for above in [hierarchy.point.clone(), hierarchy.point.join(FOLDER)] {
            let path = above.join("cgroup.subtree_control");
            let passed_on = fs::read_to_string(&path).unwrap_or_default();
            if !passed_on
                .split_whitespace()
                .any(|known| known == controller)
            {
                put(&path, format!("+{controller}"))?;
            }
        }
    }
    Ok(Some((folder, is_v2)))
}

fn offers(folder: &Path, controller: &str) -> bool {
    let offered = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    offered.split_whitespace().any(|known| known == controller)
}

fn put(path: &Path, value: String) -> Result<(), LimitError> {
    fs::write(path, &value).map_err(|source| LimitError::Write {
        path: path.to_owned(),
        value,
        source,
    })
}

const LIMIT_V1: &str = "memory.limit_in_bytes";
/// Of memory and swap together; absent where the kernel does not count swap.
const SWAP_LIMIT_V1: &str = "memory.memsw.limit_in_bytes";
const WEIGHT_USUAL: u64 = 100;
const SHARES_USUAL: u64 = 1024;
/// The kernel's least.
const SHARES_MIN: u64 = 2;

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
