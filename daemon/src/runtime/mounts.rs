//! The mounts of a workload that has a mount namespace of its own.
//!
//! CRIU makes such a namespace anew, mount by mount. Each one is of one of two kinds, or the
//! workload is refused by the path of the one that is neither:
//!
//! - **of the node**: the same file system is mounted in the node's own namespace, and what the
//!   mount shows of it can be reached there by a path. CRIU takes it as external, and at the target
//!   binds what is at the same path there. Nothing of it is moved, as with every other file.
//! - **carried**: proc, sysfs, devpts, mqueue and tmpfs that the workload has mounted itself. CRIU
//!   mounts them anew; the contents of a tmpfs go along in the images.
//!
//! CRIU names external mounts by where they are, so of several mounts at one place all or none must
//! be of the node. A proc or sysfs of the node below one of the workload's own (what remains of a
//! namespace that was cloned) is carried, too: nobody can see it, and the kernel makes its
//! contents.
//!
//! Absent: propagation between the workload and the node; mount namespaces within the workload.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{MOUNTS_MAX, MountDescription};
use procfs::FromRead;
use procfs::process::{MountInfo, MountInfos, MountOptFields, Process};

/// Bytes in all tmpfs of a workload: CRIU packs them with tar and gzip in the freeze, at about
/// 0.3 GB/s, and 0.03 GB/s of what does not compress.
pub const TMPFS_BYTES_MAX: u64 = 16 << 20; // 16 MiB

/// Bytes of all paths of mounts: they fit a pager's message twice.
const PATH_BYTES_MAX: usize = 24 << 10; // 24 KiB

/// What CRIU mounts anew. Others it knows need their contents moved, which it does not do.
const CARRIED: [&str; 5] = ["proc", "sysfs", "devpts", "mqueue", "tmpfs"];

/// Those whose contents the kernel makes.
const MADE_BY_KERNEL: [&str; 2] = ["proc", "sysfs"];

/// All mounts that a workload sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounts {
    mounts: Vec<Mount>,
    /// Paths by which its operator knows what is mounted.
    named: Vec<PathBuf>,
}

/// A mount and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    seen: Seen,
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// What the node has at this path.
    Node(PathBuf),
    /// Made anew at the target.
    Carried,
}

/// A line of mountinfo(5), with its paths decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    id: i32,
    parent: i32,
    device: String,
    root: PathBuf,
    path: PathBuf,
    kind: String,
    shared: Option<u32>,
    master: Option<u32>,
}

impl Mounts {
    /// The mounts of process `pid`, as the node that this program runs on sees them. What the node
    /// has at several paths is called by the one that is below one of `named`, if there is one.
    /// Asks the kernel's tables alone: a file system that does not answer holds nobody.
    pub fn read(pid: i32, named: &[PathBuf]) -> Result<Self, Failure> {
        let list = |process: procfs::ProcResult<Process>| {
            let mounts = process.and_then(|process| process.mountinfo());
            mounts
                .map(|mounts| mounts.into_iter().map(Seen::from).collect::<Vec<_>>())
                .map_err(|error| unsupported(format!("the mounts cannot be read: {error}")))
        };
        let (workload, node) = (list(Process::new(pid))?, list(Process::myself())?);
        Self::classify(&workload, &node, named)
    }

    /// The same, of process `pid`, as of now.
    pub fn read_again(&self, pid: i32) -> Result<Self, Failure> {
        Self::read(pid, &self.named)
    }

    fn classify(workload: &[Seen], node: &[Seen], named: &[PathBuf]) -> Result<Self, Failure> {
        if workload.len() > MOUNTS_MAX {
            return Err(unsupported(format!(
                "the workload has more than {MOUNTS_MAX} mounts"
            )));
        }
        let mut mounts = Vec::with_capacity(workload.len());
        for seen in workload {
            check_propagation(seen, node)?;
            let place = match node_path(seen, node, named) {
                Some(path) => Place::Node(path),
                None if is_carried(seen, workload) => Place::Carried,
                None => return Err(neither(seen)),
            };
            let seen = seen.clone();
            mounts.push(Mount { seen, place });
        }
        let named = named.to_vec();
        let mut found = Self { mounts, named };
        found.settle_stacks()?;
        match found.root().map(|root| &root.place) {
            Some(Place::Node(_)) => {}
            Some(Place::Carried) | None => {
                return Err(unsupported(
                    "the root of the workload's mount namespace is no folder of the node".into(),
                ));
            }
        }
        let bytes: usize = found
            .of_the_node()?
            .iter()
            .map(|(path, node)| path.len() + node.len())
            .sum();
        if bytes > PATH_BYTES_MAX {
            return Err(unsupported(format!(
                "the paths of the workload's mounts have more than {PATH_BYTES_MAX} bytes"
            )));
        }
        Ok(found)
    }

    /// Refuses mounts that what is mounted at the node comes to, which nobody makes so again. A
    /// container's runtime does.
    pub fn check_receives_nothing(&self) -> Result<(), Failure> {
        let all = || self.mounts.iter().map(|mount| &mount.seen);
        let is_own = |group| all().any(|other| other.shared == Some(group));
        let mut receiving = all().filter(|seen| seen.master.is_some_and(|group| !is_own(group)));
        receiving.next().map_or(Ok(()), |seen| Err(takes_part(seen)))
    }

    /// Makes all mounts at one place of one kind.
    fn settle_stacks(&mut self) -> Result<(), Failure> {
        for at in 0..self.mounts.len() {
            let (path, place) = (&self.mounts[at].seen.path, &self.mounts[at].place);
            let stack: Vec<usize> = (0..self.mounts.len())
                .filter(|other| self.mounts[*other].seen.path == *path)
                .collect();
            if stack
                .iter()
                .all(|other| self.mounts[*other].place == *place)
            {
                continue;
            }
            let top = self.topmost(path).map(|top| top.place.clone());
            let invisible = stack.iter().all(|other| {
                let mount = &self.mounts[*other];
                mount.place == Place::Carried || MADE_BY_KERNEL.contains(&mount.seen.kind.as_str())
            });
            if top != Some(Place::Carried) || !invisible {
                return Err(unsupported(format!(
                    "the workload has mounted over {}, which is a mount of the node: unmount that \
                     first in its mount namespace",
                    path.display()
                )));
            }
            for other in stack {
                self.mounts[other].place = Place::Carried;
            }
        }
        Ok(())
    }

    /// Where the node has the file that the workload has at `path`; none if the file is carried.
    pub fn node_path(&self, path: &Path) -> Option<PathBuf> {
        let mount = self.topmost(path)?;
        match &mount.place {
            Place::Node(node) => path
                .strip_prefix(&mount.seen.path)
                .ok()
                .map(|below| join(node, below)),
            Place::Carried => None,
        }
    }

    /// Where mounts of the node are seen, but for the root.
    pub fn bound(&self) -> impl Iterator<Item = &Path> {
        let bound = self.mounts.iter().filter(|mount| match mount.place {
            Place::Node(_) => mount.seen.path != Path::new("/"),
            Place::Carried => false,
        });
        bound.map(|mount| mount.seen.path.as_path())
    }

    /// What the target must have, the root first. Asks the file systems of the node.
    pub fn describe(&self) -> Result<Vec<MountDescription>, Failure> {
        let describe = |(path, node_path): (String, String)| MountDescription {
            directory: fs::metadata(&node_path).is_ok_and(|metadata| metadata.is_dir()),
            path,
            node_path,
        };
        Ok(self.of_the_node()?.into_iter().map(describe).collect())
    }

    /// Mounts of the node, the root first: where they are seen, and where the node has them.
    fn of_the_node(&self) -> Result<Vec<(String, String)>, Failure> {
        let mut found: Vec<(String, String)> = Vec::new();
        for mount in &self.mounts {
            let Place::Node(node) = &mount.place else {
                continue;
            };
            let text = |path: &Path| {
                path.to_str().map(str::to_owned).ok_or_else(|| {
                    let path = path.display();
                    unsupported(format!("the mount {path} has a name that is not UTF-8"))
                })
            };
            let (path, node) = (text(&mount.seen.path)?, text(node)?);
            // Several at one place are the same: CRIU knows them by it.
            if found.iter().any(|(other, _)| *other == path) {
                continue;
            }
            let at = if path == "/" { 0 } else { found.len() };
            found.insert(at, (path, node));
        }
        Ok(found)
    }

    /// Refuses what CRIU would refuse in the freeze, or what would make the freeze long: full tmpfs
    /// and queues with messages. `pid` is the process they were read of.
    pub fn check_contents(&self, pid: i32) -> Result<(), Failure> {
        let mut bytes = 0;
        for mount in &self.mounts {
            let seen = &mount.seen;
            let visible = self
                .topmost(&seen.path)
                .is_some_and(|top| top.seen.id == seen.id);
            if mount.place != Place::Carried || !visible || seen.root != Path::new("/") {
                continue;
            }
            let here = join(
                &PathBuf::from(format!("/proc/{pid}/root")),
                strip(&seen.path),
            );
            let unreadable = |error: &dyn std::fmt::Display| {
                unsupported(format!("the mount {}: {error}", seen.path.display()))
            };
            match seen.kind.as_str() {
                "tmpfs" => {
                    let space = statvfs(&here).map_err(|error| unreadable(&error))?;
                    let used = space.blocks().saturating_sub(space.blocks_free());
                    bytes += used * space.fragment_size();
                }
                "mqueue" => {
                    let queues = fs::read_dir(&here).map_err(|error| unreadable(&error))?;
                    if queues.count() > 0 {
                        return Err(unreadable(&"it holds message queues, which are not moved"));
                    }
                }
                _ => {}
            }
        }
        if bytes > TMPFS_BYTES_MAX {
            return Err(unsupported(format!(
                "the workload's own tmpfs mounts hold {bytes} bytes; at most {TMPFS_BYTES_MAX} go \
                 along"
            )));
        }
        Ok(())
    }

    fn root(&self) -> Option<&Mount> {
        let ids = |id| self.mounts.iter().any(|mount| mount.seen.id == id);
        self.mounts
            .iter()
            .find(|mount| mount.seen.parent == mount.seen.id || !ids(mount.seen.parent))
    }

    fn topmost(&self, path: &Path) -> Option<&Mount> {
        let seen: Vec<&Seen> = self.mounts.iter().map(|mount| &mount.seen).collect();
        let top = topmost(&seen, path)?.id;
        self.mounts.iter().find(|mount| mount.seen.id == top)
    }
}

/// A mount of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Its number, which may come again when it is gone.
    pub id: i32,
    /// Of its file system.
    pub device: String,
}

/// The mount that a path of this thread's namespace is on, and those at that very path, the one on
/// top last.
pub fn mounted_at(path: &Path) -> io::Result<(Mounted, Vec<Mounted>)> {
    let listed = MountInfos::from_file("/proc/thread-self/mountinfo").map_err(io::Error::other)?;
    let node: Vec<Seen> = listed.into_iter().map(Seen::from).collect();
    let all: Vec<&Seen> = node.iter().collect();
    let of = |seen: &Seen| Mounted {
        id: seen.id,
        device: seen.device.clone(),
    };
    let top = topmost(&all, path).ok_or_else(|| io::Error::other("no mounts are listed"))?;
    // Each is mounted on the one that was there before it.
    let mut at: Vec<&Seen> = Vec::new();
    let mut next = (top.path == path).then_some(top);
    while let Some(mount) = next.filter(|mount| at.iter().all(|known| known.id != mount.id)) {
        at.push(mount);
        let below = all.iter().find(|below| below.id == mount.parent);
        next = below.copied().filter(|below| below.path == path);
    }
    Ok((of(top), at.into_iter().rev().map(of).collect()))
}

/// A process that is none of `pids` and in a mount namespace of its own, in which something of
/// `folder` is mounted that the node has not mounted there; and where. Of those in one namespace
/// one is asked.
pub fn mounted_elsewhere(folder: &Path, pids: &[i32]) -> Result<Option<(i32, PathBuf)>, Failure> {
    let list = |process: procfs::ProcResult<Process>| {
        let mounts = process.and_then(|process| process.mountinfo()).ok()?;
        Some(mounts.into_iter().map(Seen::from).collect::<Vec<_>>())
    };
    let unreadable = || unsupported("the mounts of this node cannot be read".to_owned());
    let node = list(Process::myself()).ok_or_else(unreadable)?;
    let all: Vec<&Seen> = node.iter().collect();
    let under = topmost(&all, folder).ok_or_else(unreadable)?;
    let below = folder.strip_prefix(&under.path).map_err(|_| unreadable())?;
    let root = join(&under.root, below);
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let own = pids.iter().map(ToString::to_string);
    let own = own.chain(["self".to_owned()]);
    let mut known: BTreeSet<_> = own.filter_map(|pid| namespace(&pid)).collect();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = pid.filter(|pid| !pids.contains(pid)) else {
            continue;
        };
        let is_new = namespace(&pid.to_string()).is_some_and(|found| known.insert(found));
        let seen = is_new.then(|| list(Process::new(pid))).flatten();
        let has = |mount: &&Seen| mount.device == under.device && mount.root.starts_with(&root);
        let same = |mount: &Seen, other: &Seen| {
            (&mount.path, &mount.device, &mount.root) == (&other.path, &other.device, &other.root)
        };
        let mut found = seen.iter().flatten().filter(has);
        if let Some(mount) = found.find(|mount| !node.iter().any(|other| same(mount, other))) {
            return Ok(Some((pid, mount.path.clone())));
        }
    }
    Ok(None)
}

/// `--external` of a dump for all but the root.
pub fn external_at_dump(mounts: &[MountDescription]) -> Vec<String> {
    let inner = mounts.iter().enumerate().skip(1);
    inner
        .map(|(number, mount)| format!("mnt[{}]:{KEY}{number}", mount.path))
        .collect()
}

/// `--external` of the restore of that dump.
pub fn external_at_restore(mounts: &[MountDescription]) -> Vec<String> {
    let inner = mounts.iter().enumerate().skip(1);
    inner
        .map(|(number, mount)| format!("mnt[{KEY}{number}]:{}", mount.node_path))
        .collect()
}

/// Checks at the target that all the mounts of the node that a workload sees are here.
pub fn check(mounts: &[MountDescription]) -> Result<(), Failure> {
    for mount in mounts {
        let differs = |why: String| {
            Err(Failure::new(
                ErrorCode::FileDiffers,
                format!(
                    "{}, mounted at {} of the workload, is not the same at the target: {why}",
                    mount.node_path, mount.path
                ),
            ))
        };
        match fs::metadata(&mount.node_path) {
            Ok(metadata) if metadata.is_dir() == mount.directory => {}
            Ok(_) => return differs("one is a folder, the other is not".to_owned()),
            Err(error) => return differs(error.to_string()),
        }
    }
    Ok(())
}

/// Before the numbers by which CRIU's images name mounts.
const KEY: &str = "pageferry-";

impl From<MountInfo> for Seen {
    fn from(info: MountInfo) -> Self {
        let (mut shared, mut master) = (None, None);
        for field in info.opt_fields {
            match field {
                MountOptFields::Shared(group) => shared = Some(group),
                MountOptFields::Master(group) => master = Some(group),
                MountOptFields::PropagateFrom(_) | MountOptFields::Unbindable => {}
            }
        }
        Self {
            id: info.mnt_id,
            parent: info.pid,
            device: info.majmin,
            root: decoded(&info.root),
            path: decoded(&info.mount_point.to_string_lossy()),
            kind: info.fs_type,
            shared,
            master,
        }
    }
}

/// Blank, tab, line feed and backslash are written as three octal digits in mountinfo(5).
pub(super) fn decoded(text: &str) -> PathBuf {
    let replaced = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    let text = replaced
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| {
            text.replace(code, plain)
        });
    PathBuf::from(text)
}

/// The path by which the node reaches what the mount shows. One that is below one of `named` is
/// preferred, then the node's mount at the same place: that is what the workload's was cloned from.
fn node_path(seen: &Seen, node: &[Seen], named: &[PathBuf]) -> Option<PathBuf> {
    if is_deleted(seen) {
        return None;
    }
    let all: Vec<&Seen> = node.iter().collect();
    let mut found: Vec<PathBuf> = node
        .iter()
        .filter(|other| other.device == seen.device)
        .filter_map(|other| {
            let below = seen.root.strip_prefix(&other.root).ok()?;
            let path = join(&other.path, below);
            // Something else may be mounted over it.
            (topmost(&all, &path)?.id == other.id).then_some(path)
        })
        .collect();
    let is_named = |path: &Path| named.iter().any(|named| path.starts_with(named));
    found.sort_by_key(|path| (!is_named(path), *path != seen.path, path.as_os_str().len()));
    found.into_iter().next()
}

/// Whether CRIU can mount it anew: the whole of a file system it knows, or a part of one that the
/// workload has mounted as a whole, too.
fn is_carried(seen: &Seen, workload: &[Seen]) -> bool {
    let whole = |other: &Seen| other.device == seen.device && other.root == Path::new("/");
    CARRIED.contains(&seen.kind.as_str()) && !is_deleted(seen) && workload.iter().any(whole)
}

/// The kernel puts this behind the path of a mount's root that is gone.
fn is_deleted(seen: &Seen) -> bool {
    seen.root.to_string_lossy().ends_with("//deleted")
}

fn neither(seen: &Seen) -> Failure {
    unsupported(format!(
        "the mount {} of the workload ({} on device {}) is neither a mount of the node nor one \
         that can be made anew ({})",
        seen.path.display(),
        seen.kind,
        seen.device,
        CARRIED.join(", ")
    ))
}

/// A mount that passes events on between the workload and the node would do so at one node only.
fn check_propagation(seen: &Seen, node: &[Seen]) -> Result<(), Failure> {
    let shared = |group: u32, all: &[Seen]| all.iter().any(|other| other.shared == Some(group));
    let with_node = seen.shared.is_some_and(|group| shared(group, node));
    match with_node {
        true => Err(takes_part(seen)),
        false => Ok(()),
    }
}

fn takes_part(seen: &Seen) -> Failure {
    unsupported(format!(
        "the mount {} of the workload takes part in what is mounted at the node: make it private \
         (mount --make-private)",
        seen.path.display()
    ))
}

/// The mount that a walk from the root to `path` ends in.
fn topmost<'a>(mounts: &[&'a Seen], path: &Path) -> Option<&'a Seen> {
    let known = |id| mounts.iter().any(|mount| mount.id == id);
    let mut at = *mounts
        .iter()
        .find(|mount| mount.parent == mount.id || !known(mount.parent))?;
    // Each step goes one deeper in a tree, whose depth is at most their number.
    for _ in 0..mounts.len() {
        let next = mounts
            .iter()
            .filter(|mount| mount.parent == at.id && mount.id != at.id)
            .filter(|mount| path.starts_with(&mount.path))
            .min_by_key(|mount| mount.path.as_os_str().len());
        match next {
            Some(next) => at = next,
            None => break,
        }
    }
    Some(at)
}

fn join(base: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() {
        base.to_owned()
    } else {
        base.join(below)
    }
}

fn strip(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn unsupported(text: String) -> Failure {
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
