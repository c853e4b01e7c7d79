//! Starting a workload: a process with a chosen pid and namespaces of its own, a child of nobody.
//!
//! The lab runs `lab launch` inside the node. That clones the workload's root, says `pid N`, waits
//! for `go` (meanwhile the lab connects the network namespace), lets it exec, and says `ready`. It
//! then ends, and the workload becomes process 1's child, as a service would be.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::unistd::{Gid, Uid, pipe2, setgid, setgroups, sethostname, setsid, setuid};
use serde::{Deserialize, Serialize};

use crate::lab::network::WorkloadLink;
use crate::lab::node::Node;
use crate::sys::{Cloned, clone_with_pid};

/// What to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// In the node's pid namespace.
    pub pid: i32,
    pub hostname: String,
    /// The program's absolute path and its arguments.
    pub arguments: Vec<String>,
    /// Also a pid and a mount namespace of its own, beside network, UTS and IPC.
    pub own_pid_mnt: bool,
    /// The user and group to become.
    pub uid: Option<u32>,
}

/// Starts a workload at `node` and opens its link.
pub fn launch(node: &Node, spec: &LaunchSpec, link: &WorkloadLink) -> Result<()> {
    let command = node.command("/usr/local/bin/lab")?.arg("launch");
    let mut launcher = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let result = converse(&mut launcher, node, spec, link);
    if result.is_err() {
        // It may wait for a word that never comes; its pipes closing would end it as well.
        let _ = launcher.kill();
    }
    launcher.wait().context("waiting for the launcher")?;
    result
}

fn converse(
    launcher: &mut Child,
    node: &Node,
    spec: &LaunchSpec,
    link: &WorkloadLink,
) -> Result<()> {
    let mut stdin = launcher
        .stdin
        .take()
        .expect("stdin was just asked to be a pipe");
    let stdout = launcher
        .stdout
        .take()
        .expect("stdout was just asked to be a pipe");
    let mut answers = BufReader::new(stdout).lines();
    let mut expect = |wanted: &str| -> Result<()> {
        let line = answers
            .next()
            .context("the launcher ended")?
            .context("hearing the launcher")?;
        ensure!(line == wanted, "{line}");
        Ok(())
    };
    writeln!(stdin, "{}", serde_json::to_string(spec)?).context("telling the launcher")?;
    expect(CLONED)?;
    let inner = node.network_of(spec.pid)?;
    link.create(node, &inner)?;
    link.open(node)?;
    writeln!(stdin, "go").context("telling the launcher")?;
    expect(STARTED)
}

/// The subcommand `lab launch`.
pub fn launcher() -> Result<()> {
    let mut words = std::io::stdin().lines();
    let mut hear = || {
        words
            .next()
            .context("the lab is gone")?
            .context("hearing the lab")
    };
    let spec: LaunchSpec = serde_json::from_str(&hear()?).context("parsing the launch")?;
    match clone_workload(&spec) {
        Ok((mut go, mut failure)) => {
            println!("{CLONED}");
            hear()?;
            go.write_all(b"g").context("releasing the workload")?;
            let mut text = String::new();
            failure
                .read_to_string(&mut text)
                .context("watching the workload start")?;
            println!("{}", if text.is_empty() { STARTED } else { &text });
        }
        Err(error) => println!("{error:#}"),
    }
    Ok(())
}

/// Returns the pipe that releases the child, and the one that ends when it has exec'ed or tells why
/// it has not.
fn clone_workload(spec: &LaunchSpec) -> Result<(std::fs::File, std::fs::File)> {
    let (go_read, go_write) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    let (failure_read, failure_write) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
    let mut flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    let mut pids = vec![spec.pid];
    if spec.own_pid_mnt {
        flags |= CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
        pids.insert(0, 1);
    }
    let flags = u64::try_from(flags.bits()).context("namespace flags are positive")?;
    let cloned = clone_with_pid(&pids, flags)
        .with_context(|| format!("starting process {} (is the pid taken?)", spec.pid))?;
    match cloned {
        Cloned::Parent(_) => Ok((go_write.into(), failure_read.into())),
        Cloned::Child => {
            drop((go_write, failure_read));
            let error = become_workload(spec, go_read).expect_err("exec returns only to fail");
            // Nobody is left to tell when even this fails.
            let _ = write!(std::fs::File::from(failure_write), "{error:#}");
            std::process::exit(1);
        }
    }
}

fn become_workload(spec: &LaunchSpec, go: OwnedFd) -> Result<()> {
    setsid().context("making a session")?;
    sethostname(&spec.hostname).context("setting the host name")?;
    let mut word = [0; 1];
    std::fs::File::from(go)
        .read_exact(&mut word)
        .context("the launcher is gone")?;
    if spec.own_pid_mnt {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("mounts")?;
        mount(
            Some("proc"),
            "/proc",
            Some("proc"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("mounting the workload's /proc")?;
    }
    if let Some(uid) = spec.uid {
        setgroups(&[]).context("dropping groups")?;
        setgid(Gid::from_raw(uid)).context("changing the group")?;
        setuid(Uid::from_raw(uid)).context("changing the user")?;
    }
    let Some((program, arguments)) = spec.arguments.split_first() else {
        bail!("nothing to start");
    };
    // Descriptors that CRIU can restore anywhere; whatever else is open closes on exec.
    let null = || OpenOptions::new().read(true).write(true).open("/dev/null");
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin")
        .current_dir("/");
    command.stdin(null()?).stdout(null()?).stderr(null()?);
    Err(command.exec()).with_context(|| format!("starting {program}"))
}

const CLONED: &str = "cloned";
const STARTED: &str = "ready";
