use std::process::{Child, Command};
use std::time::Duration;

use pageferry_cgroup::hierarchies::Group;

use super::*;

/// A process in cgroups of its own, taken away in the end.
struct Limited {
    child: Child,
    group: Group,
}

impl Limited {
    /// A process below the first of `folders`, in all of them.
    fn new(folders: Vec<PathBuf>) -> Self {
        let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let group = folders.into_iter().fold(Group::default(), Group::and);
        let limited = Self { child, group };
        limited.group.make().expect("cgroups");
        for file in limited.group.procs_files() {
            fs::write(&file, limited.child.id().to_string()).expect("a process that joins");
        }
        limited
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.group.remove(Duration::from_secs(20));
    }
}

/// One stage after the other.
fn set_all(
    limits: &ResourceLimits,
    name: &str,
    hierarchies: &Hierarchies,
) -> Result<Vec<PathBuf>, LimitError> {
    let made = set(limits, name, hierarchies, Stage::Making)?;
    set(limits, name, hierarchies, Stage::Restored)?;
    Ok(made)
}

/// CRIU forks in the same cgroup, beside as many tasks as the workload may have.
#[test]
fn a_limit_of_processes_does_not_hold_before_the_workload_is_restored() {
    let (hierarchies, _) = here();
    let limits = ResourceLimits {
        pids_max: hierarchies.with("pids").map(|_| 1),
        cpu_max: hierarchies.with("cpu").map(|_| CpuMax {
            quota_us: 1000,
            period_us: 50_000,
        }),
        ..ResourceLimits::default()
    };
    let name = name("later");
    let folders = set(&limits, &name, &hierarchies, Stage::Making).expect("a cgroup");
    let limited = Limited::new(folders);
    let forks = || {
        let mut shell = Command::new("sh");
        let join = "for file; do echo 0 >$file || exit 2; done; sleep 0 && exit 0; exit 1";
        shell
            .args(["-c", join, "sh"])
            .args(limited.group.procs_files());
        shell.status().expect("a shell").code()
    };
    assert_eq!(forks(), Some(0));
    assert_eq!(
        read(limited.pid(), &hierarchies).limits,
        ResourceLimits::default()
    );
    set(&limits, &name, &hierarchies, Stage::Restored).expect("limits that are set");
    assert_eq!(read(limited.pid(), &hierarchies).limits, limits);
    if limits.pids_max.is_some() {
        assert_ne!(forks(), Some(0));
    }
}

fn name(of: &str) -> String {
    format!("test-limits-{of}-{}", std::process::id())
}

/// Which controllers of version 1 this machine has; others cannot be had here.
fn here() -> (Hierarchies, ResourceLimits) {
    let hierarchies = Hierarchies::detect().expect("mounts");
    let has = |controller| hierarchies.with(controller).is_some();
    let swap = hierarchies
        .with("memory")
        .is_some_and(|memory| memory.ours().join(SWAP_LIMIT_V1).exists());
    let limits = ResourceLimits {
        memory_max: has("memory").then_some(64 << 20),
        memory_high: None,
        swap_max: swap.then_some(1 << 20),
        cpu_max: has("cpu").then_some(CpuMax {
            quota_us: 150_000,
            period_us: 50_000,
        }),
        cpu_weight: has("cpu").then_some(50),
        pids_max: has("pids").then_some(77),
    };
    (hierarchies, limits)
}

#[test]
fn limits_that_are_set_on_the_real_kernel_limit_and_are_read_again() {
    let (hierarchies, limits) = here();
    let set_on = name("set");
    let folders = set_all(&limits, &set_on, &hierarchies).expect("limits that are set");
    let limited = Limited::new(folders);
    let found = read(limited.pid(), &hierarchies);
    assert_eq!(found.limits, limits);
    // A child of the limited cgroup has them too, and sets nothing itself.
    let below = limited.group.folders().iter();
    let below = Limited::new(below.map(|folder| folder.join("below")).collect());
    let found = read(below.pid(), &hierarchies);
    let weightless = ResourceLimits {
        cpu_weight: None,
        ..limits
    };
    assert_eq!(found.limits, weightless);
}

#[test]
fn an_unlimited_process_has_no_limits_and_nothing_is_made_for_it() {
    let hierarchies = Hierarchies::detect().expect("mounts");
    let folders = set_all(&ResourceLimits::default(), &name("none"), &hierarchies);
    assert!(folders.expect("nothing to be set").is_empty());
    let own = |hierarchy: &Hierarchy| hierarchy.ours().join(name("none"));
    let mut folders = hierarchies.group(&name("none")).folders().to_vec();
    folders.extend(hierarchies.with("cpu").map(own));
    let limited = Limited::new(folders);
    let found = read(limited.pid(), &hierarchies);
    assert_eq!(found.limits, ResourceLimits::default());
}

/// A folder that looks like version 2 with these files.
fn files(root: &Path, folder: &str, files: &[(&str, &str)]) -> PathBuf {
    let folder = root.join(folder);
    fs::create_dir_all(&folder).expect("a folder");
    for (name, text) in files {
        fs::write(folder.join(name), text).expect("a file");
    }
    folder
}

#[test]
fn the_strictest_limit_of_version_2_counts_and_what_is_not_carried_is_named() {
    let root = tempfile::tempdir().expect("a folder");
    let unified = Hierarchy {
        point: root.path().to_owned(),
        controllers: None,
    };
    let own = files(
        root.path(),
        "web.slice/redis.service",
        &[
            ("memory.max", "2000\n"),
            ("memory.high", "500\n"),
            ("memory.swap.max", "0\n"),
            ("cpu.max", "200000 100000\n"),
            ("cpu.weight", "300\n"),
            ("pids.max", "max\n"),
            ("io.max", "8:0 rbps=1000 wbps=max riops=max wiops=max\n"),
            ("memory.low", "0\n"),
            ("cpuset.cpus", "\n"),
        ],
    );
    let above = files(
        root.path(),
        "web.slice",
        &[
            ("memory.max", "1000\n"),
            ("memory.high", "700\n"),
            ("cpu.max", "10000 10000\n"),
            ("cpu.weight", "20\n"),
            ("pids.max", "40\n"),
            ("memory.low", "4096\n"),
        ],
    );
    let folders = [own.clone(), above.clone()];
    let mut limits = ResourceLimits::default();
    merge(&mut limits, &unified, &folders);
    let expected = ResourceLimits {
        memory_max: Some(1000),
        memory_high: Some(500),
        swap_max: Some(0),
        cpu_max: Some(CpuMax {
            quota_us: 10_000,
            period_us: 10_000,
        }),
        cpu_weight: Some(300),
        pids_max: Some(40),
    };
    assert_eq!(limits, expected);
    let left = left_behind(&unified, &folders);
    assert_eq!(left, [own.join("io.max"), above.join("memory.low")]);
}

/// A node that has version 2 alone, at this folder.
fn unified_at(point: &Path) -> Hierarchies {
    let point = point.display();
    Hierarchies::from_mountinfo(&format!("30 24 0:26 / {point} rw - cgroup2 cgroup2 rw\n"))
}

#[test]
fn limits_of_version_2_are_written_where_controllers_are_passed_on() {
    let root = tempfile::tempdir().expect("a folder");
    let hierarchies = unified_at(root.path());
    files(
        root.path(),
        "",
        &[("cgroup.controllers", "cpu memory pids\n")],
    );
    let limits = ResourceLimits {
        memory_max: Some(1000),
        memory_high: Some(900),
        swap_max: Some(0),
        cpu_max: Some(CpuMax {
            quota_us: 10_000,
            period_us: 20_000,
        }),
        cpu_weight: Some(300),
        pids_max: Some(40),
    };
    set_all(&limits, "id", &hierarchies).expect("limits that are set");
    let text = |path: &str| fs::read_to_string(root.path().join(path)).expect("a file");
    let written = [
        ("memory.max", "1000"),
        ("memory.high", "900"),
        ("memory.swap.max", "0"),
        ("cpu.max", "10000 20000"),
        ("cpu.weight", "300"),
        ("pids.max", "40"),
    ];
    for (file, value) in written {
        assert_eq!(text(&format!("pageferry/id/{file}")), value);
    }
    for above in ["", "pageferry/"] {
        // The last of the three: a real kernel collects them.
        assert_eq!(text(&format!("{above}cgroup.subtree_control")), "+cpu");
    }
}

#[test]
fn a_limit_that_no_controller_here_keeps_is_refused_by_name() {
    let root = tempfile::tempdir().expect("a folder");
    let hierarchies = unified_at(root.path());
    files(root.path(), "", &[("cgroup.controllers", "memory\n")]);
    let limits = ResourceLimits {
        pids_max: Some(40),
        ..ResourceLimits::default()
    };
    let error = set_all(&limits, "id", &hierarchies).expect_err("no pids");
    assert!(error.to_string().contains("controller pids"), "{error}");
}
