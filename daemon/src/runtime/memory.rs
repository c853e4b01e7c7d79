//! How much memory is left at this node for what comes in, and who says so: the kernel for the
//! node, and every memory cgroup that is charged.
//!
//! The daemon is charged for what it stores of a workload, and a cgroup below our own folder for
//! what is restored. A cgroup's limit holds for all below it, so both are asked, and all above
//! them.
//!
//! Absent: who may have how much.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageferry_cgroup::hierarchies::{Hierarchies, Hierarchy};

/// What is left of one limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Whose, for whoever reads it.
    pub limit: String,
    /// How much is left, in bytes.
    pub bytes: u64,
}

/// What is left of each limit at this node.
pub fn rooms(hierarchies: &Hierarchies) -> io::Result<Vec<Room>> {
    let text = fs::read_to_string(MEMINFO)?;
    let available = available(&text)
        .ok_or_else(|| io::Error::other(format!("{MEMINFO} does not say what is available")))?;
    let mut rooms = vec![Room {
        limit: "MemAvailable of the node".to_owned(),
        bytes: available,
    }];
    let memory = hierarchies.with("memory").or(hierarchies.unified());
    if let Some(memory) = memory {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let charged = memory.current(own).into_iter().chain([memory.ours()]);
        rooms.extend(limited(memory, charged));
    }
    Ok(rooms)
}

/// What is left in each limited cgroup of `charged` and above.
fn limited(memory: &Hierarchy, charged: impl Iterator<Item = PathBuf>) -> Vec<Room> {
    let folders: BTreeSet<PathBuf> = charged
        .flat_map(|folder| memory.chain(&folder).collect::<Vec<_>>())
        .collect();
    let rooms = folders.iter().flat_map(|folder| {
        FILES.iter().filter_map(|(limit, used, prefix)| {
            let limit = folder.join(limit);
            let max = number(&limit).filter(|max| *max < UNLIMITED)?;
            let used = number(&folder.join(used))?;
            let cache = cached(&folder.join("memory.stat"), prefix);
            Some(Room {
                limit: limit.display().to_string(),
                bytes: max.saturating_sub(used.saturating_sub(cache)),
            })
        })
    });
    rooms.collect()
}

/// Pages of files that the kernel can drop. Those of a tmpfs are not among them.
fn cached(stat: &Path, prefix: &str) -> u64 {
    let text = fs::read_to_string(stat).unwrap_or_default();
    let fields = ["inactive_file", "active_file"].map(|name| {
        let wanted = format!("{prefix}{name}");
        let field = text.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == wanted).then(|| value.parse::<u64>().ok())?
        });
        field.unwrap_or_default()
    });
    fields.iter().sum()
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// A number in a file of its own; none for `max` and where there is no such file.
pub(super) fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Version 1 has a number for no limit: the most pages that fit a signed 64-bit number.
pub(super) const UNLIMITED: u64 = 1 << 62;

const MEMINFO: &str = "/proc/meminfo";

/// A limit, what is used of it, and what names in `memory.stat` begin with where they count all
/// cgroups below.
const FILES: [(&str, &str, &str); 3] = [
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_can_drop_counts_as_left_and_every_limit_above_counts() {
        let root = tempfile::tempdir().expect("a folder");
        let memory = Hierarchy {
            point: root.path().to_owned(),
            controllers: None,
        };
        let write = |folder: &str, files: &[(&str, &str)]| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).expect("a folder");
            for (name, text) in files {
                fs::write(folder.join(name), text).expect("a file");
            }
            folder
        };
        let stat = "anon 1\ninactive_file 100\nactive_file 20\nshmem 700\n";
        write(
            "system.slice",
            &[
                ("memory.max", "1000\n"),
                ("memory.high", "max\n"),
                ("memory.current", "900\n"),
                ("memory.stat", stat),
            ],
        );
        let own = write(
            "system.slice/a.service",
            &[("memory.max", "max\n"), ("memory.current", "800\n")],
        );
        let ours = write(
            "pageferry",
            &[("memory.high", "50\n"), ("memory.current", "60\n")],
        );
        let found = limited(&memory, [own, ours].into_iter());
        let named = |path: &str| root.path().join(path).display().to_string();
        let expected = [
            ("pageferry/memory.high", 0),
            ("system.slice/memory.max", 220),
        ];
        let expected = expected.map(|(path, bytes)| Room {
            limit: named(path),
            bytes,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn a_limit_of_version_1_is_seen_where_this_machine_has_it() {
        let hierarchies = Hierarchies::detect().expect("mounts");
        let Some(memory) = hierarchies.with("memory") else {
            return;
        };
        let folder = memory
            .ours()
            .join(format!("test-memory-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a cgroup");
        let limited_to = |bytes: u64| {
            fs::write(folder.join("memory.limit_in_bytes"), bytes.to_string()).expect("a limit");
            let rooms = limited(memory, [folder.clone()].into_iter());
            let ours = folder.display().to_string();
            rooms.into_iter().find(|room| room.limit.starts_with(&ours))
        };
        let room = limited_to(100 << 20).expect("a limit that is seen");
        fs::write(folder.join("memory.limit_in_bytes"), "-1").expect("no limit");
        let rooms = limited(memory, [folder.clone()].into_iter());
        fs::remove_dir(&folder).expect("an empty cgroup");
        assert!((99 << 20..=100 << 20).contains(&room.bytes), "{room:?}");
        let ours = folder.display().to_string();
        assert!(rooms.iter().all(|room| !room.limit.starts_with(&ours)));
    }

    #[test]
    fn the_node_has_memory_left() {
        let hierarchies = Hierarchies::detect().expect("mounts");
        let rooms = rooms(&hierarchies).expect("rooms");
        assert!(0 < rooms[0].bytes, "{rooms:?}");
    }
}
