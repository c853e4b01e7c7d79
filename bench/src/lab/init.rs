//! What runs inside the lab's namespaces: process 1 of a node, and holders of namespaces.
//!
//! Both read a JSON specification from standard input, make their namespaces, print `ready` and
//! then do nothing: process 1 reaps, a holder sleeps. All decisions were taken by whoever started
//! them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{chdir, pivot_root, sethostname};
use serde::{Deserialize, Serialize};

use super::cgroup::Hierarchy;
use super::pids;

/// What a node consists of.
#[derive(Debug, Serialize, Deserialize)]
pub struct InitSpec {
    pub hostname: String,
    /// Read-only layers of the root, topmost first.
    pub layers: Vec<PathBuf>,
    /// An empty folder of the host to mount things on, inside the node's mount namespace only.
    pub scratch: PathBuf,
    /// A folder of the host that every node has as [`SHARED`]: storage that nodes share.
    pub shared: PathBuf,
    pub hierarchies: Vec<Hierarchy>,
    /// Where this node begins to count pids. Nodes count in ranges of their own, so that threads of
    /// a workload find their ids free at the next node.
    pub pid_first: i32,
}

/// Which namespaces a holder makes and holds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct HoldSpec {
    pub net: bool,
    pub uts: bool,
    pub ipc: bool,
}

/// Where nodes see their common storage.
pub const SHARED: &str = "/srv/shared";

/// The line that says everything is made; any other line is an error.
pub const READY: &str = "ready";

/// Process 1 of a node. Does not return while the node lives.
pub fn node_init() -> Result<()> {
    let spec: InitSpec = read_spec()?;
    // Blocked, so that none is lost between reaping and waiting.
    let mut child_died = SigSet::empty();
    child_died.add(Signal::SIGCHLD);
    child_died.thread_block().context("blocking SIGCHLD")?;
    report(build_node(&spec))?;
    loop {
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status != WaitStatus::StillAlive
        ) {}
        child_died.wait().context("waiting for SIGCHLD")?;
    }
}

/// Holds namespaces until it is killed.
pub fn hold() -> Result<()> {
    let spec: HoldSpec = read_spec()?;
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWNET, spec.net);
    flags.set(CloneFlags::CLONE_NEWUTS, spec.uts);
    flags.set(CloneFlags::CLONE_NEWIPC, spec.ipc);
    report(unshare(flags).context("making namespaces"))?;
    loop {
        nix::unistd::pause();
    }
}

fn read_spec<T: for<'de> Deserialize<'de>>() -> Result<T> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("reading the specification")?;
    serde_json::from_str(&text).context("parsing the specification")
}

/// Tells the starter how it went and lets go of its pipes.
fn report(result: Result<()>) -> Result<()> {
    let line = match &result {
        Ok(()) => READY.to_owned(),
        Err(error) => format!("{error:#}").replace('\n', " "),
    };
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}").context("reporting")?;
    stdout.flush().context("reporting")?;
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    result
}

fn build_node(spec: &InitSpec) -> Result<()> {
    // The cgroup namespace's root is where this process is now: the node's own subtree.
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .context("making the node's namespaces")?;
    sethostname(&spec.hostname).context("setting the host name")?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("making mounts private")?;
    let root = mount_root(spec)?;
    mount_fresh("proc", &root.join("proc"), "", SYSTEM_FLAGS)?;
    mount_fresh("sysfs", &root.join("sys"), "", SYSTEM_FLAGS)?;
    mount_fresh(
        "tmpfs",
        &root.join("run"),
        "mode=755",
        MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
    )?;
    mount_fresh(
        "tmpfs",
        &root.join("tmp"),
        "mode=1777",
        MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
    )?;
    make_devices(&root.join("dev"))?;
    mount_cgroups(&root, &spec.hierarchies)?;
    let shared = root.join(SHARED.trim_start_matches('/'));
    fs::create_dir_all(&shared).context("creating the shared folder")?;
    mount(Some(&spec.shared), &shared, NONE, MsFlags::MS_BIND, NONE)
        .context("mounting the shared folder")?;
    enter_root(&root)?;
    // Both are of the pid namespace of whoever writes them.
    if pids::is_above(spec.pid_first) {
        fs::write("/proc/sys/kernel/pid_max", PID_MAX.to_string())
            .context("making room for pids")?;
    }
    fs::write("/proc/sys/kernel/ns_last_pid", spec.pid_first.to_string())
        .context("choosing where pids begin")
}

/// The most pids that 64-bit kernels have (`PID_MAX_LIMIT`).
const PID_MAX: u32 = 4 << 20;

fn mount_root(spec: &InitSpec) -> Result<PathBuf> {
    mount_fresh("tmpfs", &spec.scratch, "mode=755", MsFlags::empty())?;
    let [upper, work, root] = ["upper", "work", "root"].map(|name| spec.scratch.join(name));
    for folder in [&upper, &work, &root] {
        fs::create_dir(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let layers: Vec<String> = spec
        .layers
        .iter()
        .map(|l| l.display().to_string())
        .collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        layers.join(":"),
        upper.display(),
        work.display()
    );
    mount_fresh("overlay", &root, &options, MsFlags::empty())
        .context("this kernel must have overlay file systems (CONFIG_OVERLAY_FS)")?;
    Ok(root)
}

fn mount_fresh(kind: &str, on: &Path, options: &str, flags: MsFlags) -> Result<()> {
    mount(Some(kind), on, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} on {}", on.display()))
}

/// A private /dev: what programs expect of one, and the TUN device; no device of the host's disks.
fn make_devices(dev: &Path) -> Result<()> {
    mount_fresh("tmpfs", dev, "mode=755", MsFlags::MS_NOSUID)?;
    fs::create_dir(dev.join("net"))?;
    for (name, major, minor) in DEVICES {
        let path = dev.join(name);
        let all = Mode::from_bits_truncate(0o666);
        mknod(&path, SFlag::S_IFCHR, all, makedev(major, minor))
            .with_context(|| format!("creating the device {}", path.display()))?;
        // mknod applies the umask.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    for folder in ["pts", "shm"] {
        fs::create_dir(dev.join(folder))?;
    }
    let pts_flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_fresh(
        "devpts",
        &dev.join("pts"),
        "newinstance,ptmxmode=0666,mode=620",
        pts_flags,
    )?;
    let shm_flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount_fresh("tmpfs", &dev.join("shm"), "mode=1777", shm_flags)?;
    for (name, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, dev.join(name))?;
    }
    Ok(())
}

fn mount_cgroups(root: &Path, hierarchies: &[Hierarchy]) -> Result<()> {
    let base = root.join("sys/fs/cgroup");
    let only_v2 = hierarchies.iter().all(Hierarchy::is_v2);
    if only_v2 {
        return mount_fresh("cgroup2", &base, "", SYSTEM_FLAGS);
    }
    mount_fresh("tmpfs", &base, "mode=755", SYSTEM_FLAGS)?;
    for hierarchy in hierarchies {
        let folder = base.join(hierarchy.folder_name());
        fs::create_dir(&folder)?;
        let kind = if hierarchy.is_v2() {
            "cgroup2"
        } else {
            "cgroup"
        };
        mount_fresh(kind, &folder, &hierarchy.controllers, SYSTEM_FLAGS)?;
    }
    Ok(())
}

fn enter_root(root: &Path) -> Result<()> {
    chdir(root).context("entering the new root")?;
    // With both arguments the same the old root lands on top of the new one, and is taken away.
    pivot_root(".", ".").context("changing the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("detaching the host's root")?;
    chdir("/").context("entering the new root")
}

const NONE: Option<&str> = None;
const SYSTEM_FLAGS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const DEVICES: [(&str, u64, u64); 7] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
    ("net/tun", 10, 200),
];
