//! Commands inside namespaces other than the lab's own.
//!
//! A pid namespace can only be entered by being born in it, the others by the child between fork
//! and exec; cgroups before the cgroup namespace, the mount namespace last (it changes the root).

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;

use crate::sys;

/// Descriptors of the namespaces of a running process.
#[derive(Debug)]
pub struct Namespaces {
    pub net: OwnedFd,
    pub mnt: OwnedFd,
    pub pid: OwnedFd,
    pub uts: OwnedFd,
    pub ipc: OwnedFd,
    pub cgroup: OwnedFd,
}

impl Namespaces {
    /// Opens those of a process, named by its folder in some /proc.
    pub fn open(process: &Path) -> Result<Self> {
        let open = |name: &str| -> Result<OwnedFd> {
            let path = process.join("ns").join(name);
            let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            Ok(file.into())
        };
        Ok(Self {
            net: open("net")?,
            mnt: open("mnt")?,
            pid: open("pid")?,
            uts: open("uts")?,
            ipc: open("ipc")?,
            cgroup: open("cgroup")?,
        })
    }
}

/// A command to be run inside namespaces.
#[derive(Debug)]
pub struct Inside {
    command: Command,
    program: String,
    pid: PidNamespace,
    /// Entered by the child, in this order.
    others: Vec<OwnedFd>,
    mnt: Option<OwnedFd>,
    cgroups: Vec<PathBuf>,
    inherited: Vec<OwnedFd>,
}

#[derive(Debug)]
enum PidNamespace {
    Same,
    New,
    Of(OwnedFd),
}

impl Inside {
    /// A command that enters nothing yet, with a clean environment.
    pub fn new(program: &str) -> Self {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", NODE_PATH)
            .env("HOME", "/root")
            .env("LC_ALL", "C.UTF-8");
        if let Some(terminal) = std::env::var_os("TERM") {
            command.env("TERM", terminal);
        }
        Self {
            command,
            program: program.to_owned(),
            pid: PidNamespace::Same,
            others: Vec::new(),
            mnt: None,
            cgroups: Vec::new(),
            inherited: Vec::new(),
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts the command as a member of these cgroups (folders of the host).
    pub fn cgroups(mut self, folders: &[PathBuf]) -> Self {
        self.cgroups = folders.to_vec();
        self
    }

    /// Enters the pid and mount namespaces: the command then sees the node's files and processes.
    pub fn root(mut self, namespaces: &Namespaces) -> Result<Self> {
        self.pid = PidNamespace::Of(duplicate(&namespaces.pid)?);
        self.mnt = Some(duplicate(&namespaces.mnt)?);
        Ok(self)
    }

    /// Makes the command process 1 of a pid namespace of its own.
    pub fn new_pid_namespace(mut self) -> Self {
        self.pid = PidNamespace::New;
        self
    }

    /// Enters one more namespace (network, UTS, IPC or cgroup).
    pub fn enter(mut self, namespace: impl AsFd) -> Result<Self> {
        self.others.push(duplicate(namespace)?);
        Ok(self)
    }

    /// Hands a descriptor down; returns the path by which the command can open it. Only for
    /// commands that also enter the pid namespace of the root they see.
    pub fn inherit(&mut self, fd: impl AsFd) -> Result<String> {
        let copy = duplicate(fd)?;
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        self.inherited.push(copy);
        Ok(path)
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self
    }

    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.command.stdout(stdout);
        self
    }

    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.command.stderr(stderr);
        self
    }

    pub fn spawn(self) -> Result<Child> {
        let Self {
            mut command,
            program,
            pid,
            others,
            mnt,
            cgroups,
            inherited,
        } = self;
        let membership = open_procs(&cgroups)?;
        sys::before_exec(&mut command, move || {
            for file in &membership {
                (&*file).write_all(b"0")?;
            }
            for namespace in &others {
                setns(namespace, CloneFlags::empty())?;
            }
            if let Some(mnt) = &mnt {
                setns(mnt, CloneFlags::CLONE_NEWNS)?;
                nix::unistd::chdir("/")?;
            }
            // Whatever the lab's own starter left open must not reach a node: CRIU could not dump
            // it.
            sys::close_on_exec_from(3)?;
            // The lab's own threads block the signals that end it; a program started by them does
            // not.
            SigSet::empty().thread_set_mask()?;
            for fd in &inherited {
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
        let child = match pid {
            PidNamespace::Same => command.spawn(),
            PidNamespace::New => on_thread(|| {
                unshare(CloneFlags::CLONE_NEWPID)?;
                command.spawn()
            }),
            PidNamespace::Of(pid) => on_thread(|| {
                setns(&pid, CloneFlags::CLONE_NEWPID)?;
                command.spawn()
            }),
        };
        child.with_context(|| format!("starting {program}"))
    }

    /// Runs the command to its end, with its output collected and no input.
    pub fn output(self) -> Result<Output> {
        let program = self.program.clone();
        let child = self
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .wait_with_output()
            .with_context(|| format!("waiting for {program}"))
    }

    /// Runs the command to its end; what it printed when it succeeded, an error otherwise.
    pub fn run(self) -> Result<String> {
        let program = self.program.clone();
        checked(&program, &self.output()?)
    }

    /// As [`Inside::run`], with `input` on the command's standard input.
    pub fn run_with_input(self, input: &str) -> Result<String> {
        let program = self.program.clone();
        let mut child = self
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stdin = child
            .stdin
            .take()
            .expect("stdin was just asked to be a pipe");
        stdin
            .write_all(input.as_bytes())
            .with_context(|| format!("writing to {program}"))?;
        drop(stdin);
        checked(&program, &child.wait_with_output()?)
    }
}

fn checked(program: &str, output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{program}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim_end(),
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn open_procs(cgroups: &[PathBuf]) -> Result<Vec<File>> {
    let open = |folder: &PathBuf| {
        let path = folder.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    };
    cgroups.iter().map(open).collect()
}

/// A copy that closes on exec.
fn duplicate(fd: impl AsFd) -> Result<OwnedFd> {
    fd.as_fd()
        .try_clone_to_owned()
        .context("duplicating a descriptor")
}

/// The pid namespace of children is a property of the thread, so a thread of its own forks.
fn on_thread(spawn: impl FnOnce() -> io::Result<Child> + Send) -> io::Result<Child> {
    std::thread::scope(|scope| match scope.spawn(spawn).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Runs `work` on a thread of its own inside a network namespace: sockets it opens stay there.
pub fn in_network<T: Send>(net: impl AsFd, work: impl FnOnce() -> T + Send) -> Result<T> {
    let net = duplicate(net)?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || -> Result<T> {
            setns(&net, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
            Ok(work())
        });
        match inside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

const NODE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
