//! Storage for the cases of direct I/O: the file that they read, and for one of them reads that
//! take long.
//!
//! A read is slowed down by the throttle of the block layer, which holds it back when it has hold
//! of the memory already: as a disk does that is slow. The throttle is of a cgroup in the hierarchy
//! `blkio`, which nodes do not have, so that pageferry leaves it alone.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::writer::case::direct::{PATH, write_file};

/// What a case reads from.
#[derive(Debug)]
pub struct Storage {
    throttle: Option<Throttle>,
}

impl Storage {
    /// That of the case of this name; most have none.
    pub fn of_case(name: &str, lab: &Lab) -> Result<Self> {
        if !name.starts_with("direct-io") {
            return Ok(Self { throttle: None });
        }
        let node = lab.nodes.first().context("a lab has nodes")?;
        let path = node.path(PATH);
        write_file(&path).with_context(|| format!("writing {}", path.display()))?;
        let throttle = if name == SLOW {
            Throttle::of(&path).context("slowing reads down")?
        } else {
            None
        };
        if name == SLOW && throttle.is_none() {
            println!(
                "{name}: reads cannot be slowed down: there is no cgroup hierarchy blkio, or the \
                 shared folder is not on a disk"
            );
        }
        Ok(Self { throttle })
    }

    /// Slows the writers of all nodes down, wherever they have come from.
    pub fn slow_down(&self, lab: &Lab) -> Result<()> {
        let Some(throttle) = &self.throttle else {
            return Ok(());
        };
        let nodes = lab.nodes.iter();
        let writers: Vec<i32> = nodes
            .flat_map(|node| node.host_processes_named(PROGRAM))
            .collect();
        ensure!(!writers.is_empty(), "no node has a writer");
        writers
            .into_iter()
            .try_for_each(|pid| throttle.take_in(pid))
    }
}

/// A cgroup whose processes read slowly from one disk; removed on drop.
#[derive(Debug)]
struct Throttle {
    hierarchy: PathBuf,
    folder: PathBuf,
}

impl Throttle {
    /// None if this machine cannot do it.
    fn of(file: &Path) -> Result<Option<Self>> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mounts")?;
        let (Some(hierarchy), Some(disk)) = (find_hierarchy(&mounts), find_disk(file)?) else {
            return Ok(None);
        };
        let folder = hierarchy.join(FOLDER);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let throttle = Self { hierarchy, folder };
        let rate = throttle.folder.join("blkio.throttle.read_bps_device");
        let written = fs::write(&rate, format!("{disk} {BYTES_PER_SECOND}"));
        written.with_context(|| format!("writing {}", rate.display()))?;
        Ok(Some(throttle))
    }

    fn take_in(&self, pid: i32) -> Result<()> {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("moving process {pid} into {}", self.folder.display()))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let left = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for pid in left.lines() {
            let _ = fs::write(self.hierarchy.join("cgroup.procs"), pid);
        }
        // Fails only if a process of the workload is still ending.
        let _ = fs::remove_dir(&self.folder);
    }
}

fn find_hierarchy(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (mount, kind, options) = (fields.get(1)?, fields.get(2)?, fields.get(3)?);
        let is_wanted = *kind == "cgroup" && options.split(',').any(|option| option == "blkio");
        is_wanted.then(|| PathBuf::from(mount))
    })
}

/// The numbers of the whole disk that a file is on, as the kernel writes them.
fn find_disk(file: &Path) -> Result<Option<String>> {
    let device = fs::metadata(file).context("looking at the file")?.st_dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let Ok(folder) = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        return Ok(None);
    };
    let disk = if folder.join("partition").exists() {
        folder.parent().unwrap_or(&folder)
    } else {
        &folder
    };
    let numbers = fs::read_to_string(disk.join("dev")).context("reading the disk's numbers")?;
    Ok(Some(numbers.trim_end().to_owned()))
}

/// The case whose reads are slowed down.
const SLOW: &str = "direct-io";
/// Of the writer, as its command name.
const PROGRAM: &str = "lab-writer";
/// Four reads of 256 KiB at a time take 31 ms each.
const BYTES_PER_SECOND: u64 = 32 << 20;
const FOLDER: &str = "pageferry-lab-direct-io";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_of_the_block_layer_is_found_among_the_mounts() {
        let mounts = "cgroup /sys/fs/cgroup/freezer cgroup rw,freezer 0 0\n\
            cgroup /cg/io cgroup rw,relatime,blkio 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_hierarchy(mounts), Some(PathBuf::from("/cg/io")));
        assert_eq!(find_hierarchy(""), None);
    }
}
