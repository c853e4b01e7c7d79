//! The cgroup hierarchies of this node, and cgroups of one name in all of them.
//!
//! A process that is in a cgroup of its own in every hierarchy in which processes are killed or
//! limited together shares the fate of nobody: not when the kernel kills for memory, not when an
//! operator kills a unit of systemd, which knows its processes by its own hierarchy. The workload,
//! its pager and the pager's watcher each have such a [`Group`]; all are in a folder `pageferry` at
//! the root of their hierarchy, so in no unit.
//!
//! Hierarchies that only say what is shared or allowed (`blkio`, `cpuset`, `devices` and the like
//! of version 1) are left out: there everybody stays where the daemon is. So is `cpu` of version 1,
//! but for a workload that brings a limit: a group competes with other groups as a whole, and what
//! CRIU's niceness gains would be lost.
//!
//! Invariant: a group is removed only when it is empty. Absent: freezing ([`crate::freezer`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::freezer::CgroupError;

/// The folder of ours at the root of each hierarchy.
pub const FOLDER: &str = "pageferry";

/// How often it is looked whether a group is empty.
const EMPTY_POLL: Duration = Duration::from_millis(1);

/// Controllers of version 1 that kill, or refuse to fork, for a whole cgroup; and the freezer.
const FATE: [&str; 3] = ["freezer", "memory", "pids"];

/// How systemd calls its own hierarchy of version 1.
const SYSTEMD: &str = "name=systemd";

/// One hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Its controllers in version 1; none in version 2.
    pub controllers: Option<Vec<String>>,
}

/// The hierarchies of this node. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Hierarchies(Arc<[Hierarchy]>);

/// A cgroup of one name in several hierarchies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    folders: Vec<PathBuf>,
}

/// The cgroups of an incoming migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// `ID`: what is restored.
    pub tree: Group,
    /// `ID.pager`.
    pub pager: Group,
    /// `ID.watcher`.
    pub watcher: Group,
}

impl Hierarchies {
    /// The hierarchies that are mounted here.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = PathBuf::from("/proc/self/mountinfo");
        let mounts = fs::read_to_string(&path).map_err(|source| CgroupError::Io {
            action: "reading",
            path,
            source,
        })?;
        Ok(Self::from_mountinfo(&mounts))
    }

    /// Those that a `mountinfo` names; what it says otherwise is passed over.
    pub fn from_mountinfo(mounts: &str) -> Self {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mounts.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let mut right = right.split(' ');
            let (Some(point), Some(kind), Some(options)) =
                (left.split(' ').nth(4), right.next(), right.nth(1))
            else {
                continue;
            };
            let controllers = match kind {
                "cgroup2" => None,
                "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
                _ => continue,
            };
            // What is mounted twice is one hierarchy.
            if found.iter().all(|known| known.controllers != controllers) {
                let point = PathBuf::from(point);
                found.push(Hierarchy { point, controllers });
            }
        }
        Self(found.into())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Hierarchy> {
        self.0.iter()
    }

    /// The one with this controller of version 1.
    pub fn with(&self, controller: &str) -> Option<&Hierarchy> {
        self.iter().find(|known| known.has(controller))
    }

    /// That of version 2.
    pub fn unified(&self) -> Option<&Hierarchy> {
        self.iter().find(|known| known.controllers.is_none())
    }

    /// The cgroup `name` wherever one decides over the life of its processes.
    pub fn group(&self, name: &str) -> Group {
        let fateful = self.iter().filter(|known| known.is_fateful());
        Group {
            folders: fateful.map(|known| known.ours().join(name)).collect(),
        }
    }

    /// The cgroups of an incoming migration, which need not exist.
    pub fn groups(&self, id: &str) -> Groups {
        Groups {
            tree: self.group(id),
            pager: self.group(&format!("{id}.pager")),
            watcher: self.group(&format!("{id}.watcher")),
        }
    }

    /// The cgroup `name` in every hierarchy in which there could be one: to be removed.
    pub fn everywhere(&self, name: &str) -> Group {
        Group {
            folders: self.iter().map(|known| known.ours().join(name)).collect(),
        }
    }
}

impl Hierarchy {
    /// Whether it is of version 1 and has this controller.
    pub fn has(&self, controller: &str) -> bool {
        let controllers = self.controllers.as_deref().unwrap_or_default();
        controllers.iter().any(|known| known == controller)
    }

    /// The folder below which our cgroups are.
    pub fn ours(&self) -> PathBuf {
        self.point.join(FOLDER)
    }

    /// `folder` and all above it, up to the root of the hierarchy.
    pub fn chain<'a>(&'a self, folder: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        let all = folder.ancestors();
        all.take_while(|folder| folder.starts_with(&self.point))
            .map(Path::to_owned)
    }

    /// The cgroup of `pid` in it, if this process can see it.
    pub fn current(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, names) = (fields.next()?, fields.next()?);
            let ours = match &self.controllers {
                None => number == "0",
                Some(known) => {
                    let shown = |name: &str| known.iter().any(|known| known == name);
                    !names.is_empty() && names.split(',').all(shown)
                }
            };
            ours.then(|| fields.next()).flatten()
        })?;
        let inside = path.trim_start_matches('/');
        // A path that leaves the cgroup namespace names nothing that can be read here.
        let visible = !inside.split('/').any(|part| part == "..");
        visible.then(|| self.point.join(inside))
    }

    fn is_fateful(&self) -> bool {
        let of_v1 = FATE.iter().any(|name| self.has(name)) && !self.needs_processors();
        self.controllers.is_none() || self.has(SYSTEMD) || of_v1
    }

    /// A cgroup of `cpuset` takes nobody until it is told its processors.
    fn needs_processors(&self) -> bool {
        self.has("cpuset")
    }
}

impl Group {
    /// Its folders, one in each hierarchy.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// With one folder more.
    #[must_use]
    pub fn and(mut self, folder: PathBuf) -> Self {
        if !self.folders.contains(&folder) {
            self.folders.push(folder);
        }
        self
    }

    /// The files into which a process writes its pid, or 0, to join.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        let folders = self.folders.iter();
        folders.map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// Makes it where it does not exist.
    pub fn make(&self) -> Result<(), CgroupError> {
        let mut folders = self.folders.iter();
        folders
            .try_for_each(|folder| fs::create_dir_all(folder).map_err(io_error("creating", folder)))
    }

    /// Who is in it, in any hierarchy.
    pub fn processes(&self) -> Vec<i32> {
        let texts = self.procs_files().into_iter().map(fs::read_to_string);
        let mut pids: Vec<i32> = texts
            .flatten()
            .flat_map(|text| text.lines().flat_map(str::parse).collect::<Vec<i32>>())
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Kills whoever is in it. Does not wait.
    pub fn kill(&self) {
        // A process of another pid namespace reads as 0, which would mean ourselves.
        for pid in self.processes().into_iter().filter(|pid| 0 < *pid) {
            // One that has ended is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Removes it, when it is empty. Blocks, at most `within`.
    pub fn remove(&self, within: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + within;
        self.folders.iter().try_for_each(|folder| {
            loop {
                match fs::remove_dir(folder) {
                    Ok(()) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    // Somebody is in it, and is about to end.
                    Err(error)
                        if error.raw_os_error() == Some(libc::EBUSY)
                            && Instant::now() < deadline =>
                    {
                        std::thread::sleep(EMPTY_POLL);
                    }
                    Err(error) => return Err(io_error("removing", folder)(error)),
                }
            }
        })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
        30 24 0:26 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        31 24 0:27 / /cg/memory rw,nosuid - cgroup cgroup rw,memory\n\
        32 24 0:28 / /cg/freezer rw - cgroup cgroup rw,freezer\n\
        33 24 0:29 / /cg/pids rw - cgroup cgroup rw,pids\n\
        34 24 0:30 / /cg/devices rw - cgroup cgroup rw,devices\n\
        35 24 0:31 / /cg/systemd rw - cgroup cgroup rw,name=systemd\n\
        36 24 0:32 / /cg/unified rw - cgroup2 cgroup2 rw\n\
        37 24 0:27 / /elsewhere rw - cgroup cgroup rw,memory\n";

    #[test]
    fn a_group_is_in_every_hierarchy_that_decides_over_life_once() {
        let found = Hierarchies::from_mountinfo(HYBRID);
        let expected = ["memory", "freezer", "pids", "systemd", "unified"];
        let expected = expected.map(|name| PathBuf::from(format!("/cg/{name}/pageferry/x")));
        assert_eq!(found.group("x").folders(), expected);
        let alone = Hierarchies::from_mountinfo("30 24 0:26 / /cg rw - cgroup2 cgroup2 rw\n");
        assert_eq!(alone.group("x").folders(), [Path::new("/cg/pageferry/x")]);
    }

    #[test]
    fn pager_watcher_and_tree_are_in_no_cgroup_together() {
        let Groups {
            tree,
            pager,
            watcher,
        } = Hierarchies::from_mountinfo(HYBRID).groups("id");
        for ((tree, pager), watcher) in tree
            .folders()
            .iter()
            .zip(pager.folders())
            .zip(watcher.folders())
        {
            let all = [tree, pager, watcher];
            for (index, one) in all.iter().enumerate() {
                let mut others = all.iter().enumerate().filter(|(other, _)| *other != index);
                assert!(others.all(|(_, other)| !one.starts_with(other)), "{all:?}");
            }
        }
    }

    #[test]
    fn a_group_waits_for_whoever_is_about_to_end_and_is_removed() {
        let hierarchies = Hierarchies::detect().expect("mounts");
        let group = hierarchies.group(&format!("test-group-{}", std::process::id()));
        group.make().expect("make");
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("sleep starts");
        let pid = i32::try_from(child.id()).expect("pid");
        for file in group.procs_files() {
            fs::write(&file, pid.to_string()).expect("join");
        }
        assert_eq!(group.processes(), [pid]);
        for (hierarchy, folder) in hierarchies
            .iter()
            .filter(|known| known.is_fateful())
            .zip(group.folders())
        {
            assert_eq!(hierarchy.current(pid).as_ref(), Some(folder));
        }
        assert!(group.remove(Duration::ZERO).is_err());
        group.kill();
        let ended = group.remove(Duration::from_secs(20));
        child.wait().expect("reaped");
        ended.expect("removed");
        assert!(group.folders().iter().all(|folder| !folder.exists()));
    }
}
