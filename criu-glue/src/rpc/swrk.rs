//! A `criu swrk` process and the conversation with it.
//!
//! One worker serves one chain of requests: any number of `version` and `feature_check`, then at
//! most one `dump`, `restore` or `check`. While it works it may send notifications and *waits* for
//! each to be answered; holding an answer back is therefore a gate. [`Event::Response`] is the
//! last thing it says.
//!
//! Invariants: the worker never outlives its usefulness unnoticed. Dropping [`Swrk`] closes our
//! end of the socket; CRIU then fails at its next notification, and the runtime reaps it. Where a
//! dump stood at that moment decides who runs, so a caller that must not lose the tree freezes it
//! by cgroup first.
//!
//! Both sides must see the same pid namespace: CRIU opens `/proc/OUR-PID/fd/N`.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials, recv,
    recvmsg, send, setsockopt, shutdown, socketpair, sockopt,
};
use nix::unistd::Pid;
use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::event::Event;
use super::message::{CriuRequest, CriuResponse, RequestType};
use crate::options::Request;
use crate::sys::{self, ChildSetup, FailedStep};
use crate::view::{ALONE_VARIABLE, FEED_VARIABLE, FREEZER_VARIABLE, REAPER_VARIABLE};

/// How a worker is started.
#[derive(Debug)]
pub struct SwrkConfig {
    /// The binary; looked up in `PATH` when it has no slash.
    pub criu: PathBuf,
    /// Namespaces entered before `exec`, in this order. Not pid: setns moves only children.
    pub namespaces: Vec<OwnedFd>,
    /// `cgroup.procs` files (`tasks` for v1) the worker joins first, taken verbatim.
    pub cgroup_procs: Vec<PathBuf>,
    /// The view through which the worker sees memory; for dumps only.
    pub view: Option<ViewFds>,
    /// The view library, as above, for a restore whose root is no init and has to adopt orphans
    /// from the beginning: processes of sessions whose leaders are dead.
    pub reaper: Option<PathBuf>,
    /// Where stdout and stderr go (appended): what CRIU says before its log is open.
    pub output: PathBuf,
    /// Environment besides `PATH`; nothing else of ours is passed on.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors the worker keeps, at the numbers they have here.
    pub inherited: Vec<OwnedFd>,
    /// Off for lazy restores, see [`crate::image::pagemap`]: the worker and the tasks it makes run
    /// without huge pages until CRIU gives each task its own setting back.
    pub huge_pages: bool,
    /// Whether CRIU may stop tasks by hardware breakpoints. They are perf events, and the kernel
    /// waits for all CPUs when the first one on the machine comes into being: 10 to 20 ms, in the
    /// freeze of a dump and between `post-restore` and the first instruction of a restored task.
    /// Without them CRIU stops tasks at system calls, as it does on machines that have none.
    pub breakpoints: bool,
    /// Whether it goes before everything that is not real-time, if the kernel permits (needs
    /// CAP_SYS_NICE): a workload stands still while it works. CRIU gives each task it restores
    /// the nice value the task had.
    pub urgent: bool,
}

/// The preload library and the memory it is fed through.
#[derive(Debug)]
pub struct ViewFds {
    /// `libcriu_view.so`, as seen in the mount namespace the worker is started in.
    pub library: PathBuf,
    /// The freezer cgroup that holds the tree, if the dump is told of one: without it CRIU waits
    /// for ever for a task that job control has stopped and the v1 freezer has frozen.
    pub freezer: Option<PathBuf>,
    /// Whether a process that outlives CRIU traces for it. Without one a CRIU that dies in a dump
    /// may take the tasks with it.
    pub tracer: bool,
    pub feed: OwnedFd,
}

/// A running worker.
#[derive(Debug)]
pub struct Swrk {
    socket: AsyncFd<OwnedFd>,
    child: tokio::process::Child,
    pid: i32,
    /// Descriptors CRIU opens through our `/proc` entry.
    held: Vec<OwnedFd>,
    notified: bool,
    /// Who sent the last packet.
    speaker: Option<i32>,
}

/// Why a worker could not be started or talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwrkError {
    #[error("cannot create the socket to criu")]
    Socket(#[source] io::Error),
    #[error("cannot open {path} for criu's output")]
    Output {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("path {path} contains a zero byte")]
    ZeroByte { path: PathBuf },
    #[error("cannot put criu into the cgroup of {path}")]
    Cgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot enter namespace number {index} for criu")]
    Namespace {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("cannot pass descriptor number {index} to criu")]
    Inherit {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("cannot turn huge pages off for criu")]
    HugePages(#[source] io::Error),
    #[error("cannot start {criu}")]
    Exec {
        criu: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot send to criu")]
    Send(#[source] io::Error),
    #[error("cannot receive from criu")]
    Receive(#[source] io::Error),
    #[error("criu sent a packet of {length} bytes, more than {PACKET_MAX}")]
    PacketTooLong { length: usize },
    #[error("cannot decode a packet from criu")]
    Decode(#[source] prost::DecodeError),
    #[error("criu sent a notification without a name")]
    NamelessNotification,
    #[error("there is no notification to answer")]
    NothingToAnswer,
    #[error("a notification waits for its answer")]
    AnswerOwed,
    #[error("criu ended the conversation")]
    Closed,
    #[error("cannot wait for criu")]
    Wait(#[source] io::Error),
    #[error("cannot kill criu")]
    Kill(#[source] Errno),
}

impl SwrkConfig {
    /// A worker in our own namespaces and cgroups that sees everything as it is.
    #[must_use]
    pub fn new(criu: PathBuf, output: PathBuf) -> Self {
        Self {
            criu,
            output,
            namespaces: Vec::new(),
            cgroup_procs: Vec::new(),
            view: None,
            reaper: None,
            env: Vec::new(),
            inherited: Vec::new(),
            huge_pages: true,
            breakpoints: false,
            urgent: false,
        }
    }
}

impl Swrk {
    /// Starts a worker. Needs a tokio runtime with IO.
    ///
    /// # Errors
    /// The step that failed; no process is left then.
    pub fn spawn(config: SwrkConfig) -> Result<Self, SwrkError> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .map_err(|e| SwrkError::Socket(e.into()))?;
        // CRIU expects to block on its end; the flag belongs to each end alone.
        nix::fcntl::fcntl(
            &theirs,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )
        .map_err(|e| SwrkError::Socket(e.into()))?;
        // The kernel writes beside each packet who has sent it.
        setsockopt(&ours, sockopt::PassCred, &true).map_err(|e| SwrkError::Socket(e.into()))?;
        let command = command(&config, theirs.as_raw_fd())?;
        let child = start(command, config, theirs)?;
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .unwrap_or_default();
        let socket = sys::register(ours).map_err(SwrkError::Socket)?;
        Ok(Self {
            socket,
            child,
            pid,
            held: Vec::new(),
            notified: false,
            speaker: None,
        })
    }

    /// The worker's process id in our pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The process that sent what was received last, in our pid namespace; not the worker itself if
    /// what was started as `criu` has started another program for it.
    #[must_use]
    pub fn speaker(&self) -> Option<i32> {
        self.speaker
    }

    /// Says when the kernel may kill the worker for want of memory, from -1000 (never) to 1000. A
    /// tree that is restored inherits it, unless its own was another than 0: `prepare_proc_misc` in
    /// CRIU's `cr-restore.c` passes 0 over.
    ///
    /// # Errors
    /// What the kernel says; less than before needs `CAP_SYS_RESOURCE`.
    pub fn set_oom_score_adj(&self, adjustment: i16) -> io::Result<()> {
        let path = format!("/proc/{}/oom_score_adj", self.pid);
        std::fs::write(path, adjustment.to_string())
    }

    /// Sends a request. The descriptors it names stay open until the worker is dropped.
    ///
    /// # Errors
    /// [`SwrkError::Send`] when the worker is gone, [`SwrkError::AnswerOwed`] out of order.
    pub async fn request(&mut self, request: Request) -> Result<(), SwrkError> {
        if self.notified {
            return Err(SwrkError::AnswerOwed);
        }
        self.held.extend(request.held);
        self.send(&request.message).await
    }

    /// Waits for what the worker says next. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`SwrkError::Closed`] when the worker ended without a response.
    pub async fn next(&mut self) -> Result<Event, SwrkError> {
        let (packet, speaker) = self.receive().await?;
        self.speaker = speaker;
        let response = CriuResponse::decode(&packet[..]).map_err(SwrkError::Decode)?;
        if response.kind != RequestType::Notify as i32 {
            return Ok(Event::Response(response.into()));
        }
        let notify = response.notify.unwrap_or_default();
        let script = notify.script.ok_or(SwrkError::NamelessNotification)?;
        self.notified = true;
        Ok(Event::Notify {
            script: script.into(),
            pid: notify.pid,
        })
    }

    /// Answers the notification that waits. `false` makes CRIU give up, where it still can.
    ///
    /// # Errors
    /// [`SwrkError::NothingToAnswer`] when none waits, [`SwrkError::Send`] when CRIU is gone.
    pub async fn answer(&mut self, success: bool) -> Result<(), SwrkError> {
        if !self.notified {
            return Err(SwrkError::NothingToAnswer);
        }
        self.send(&CriuRequest {
            kind: RequestType::Notify as i32,
            notify_success: Some(success),
            ..CriuRequest::default()
        })
        .await?;
        self.notified = false;
        Ok(())
    }

    /// Whether the other end is open: the worker lives, or its tracer does and has let go of
    /// nothing yet. While a notification waits, nothing else comes from there.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked = recv(self.socket.as_raw_fd(), &mut [0], flags);
        peeked == Err(Errno::EAGAIN) || peeked.is_ok_and(|length| length > 0)
    }

    /// Waits for the worker's end.
    ///
    /// # Errors
    /// [`SwrkError::Wait`] if the kernel does not tell.
    pub async fn wait(&mut self) -> Result<ExitStatus, SwrkError> {
        self.child.wait().await.map_err(SwrkError::Wait)
    }

    /// Closes the conversation without dropping: CRIU sees the end of file.
    pub fn close(&mut self) {
        // Fails only when the worker is gone already, which is what was asked for.
        let _ = shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// Kills the worker. Tasks it holds by ptrace go on, unless a freezer cgroup holds them.
    ///
    /// # Errors
    /// [`SwrkError::Kill`]; a worker that has ended already is no error.
    pub fn kill(&mut self) -> Result<(), SwrkError> {
        // A child that was waited for has no id any more: its number may belong to another.
        if self.child.id().is_none() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(SwrkError::Kill(error)),
        }
    }

    async fn send(&self, message: &CriuRequest) -> Result<(), SwrkError> {
        let bytes = message.encode_to_vec();
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |socket| {
                send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from)
            })
            .await;
        sent.map(drop).map_err(SwrkError::Send)
    }

    /// The next packet, and who has sent it.
    async fn receive(&self) -> Result<(Vec<u8>, Option<i32>), SwrkError> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        let received = self
            .socket
            .async_io(Interest::READABLE, |socket| {
                // With MSG_TRUNC the kernel tells the packet's true length.
                let length = recv(socket.as_raw_fd(), &mut [], peek)?;
                if length > PACKET_MAX {
                    return Ok(Err(SwrkError::PacketTooLong { length }));
                }
                let mut packet = vec![0; length];
                let speaker = receive_from(socket.as_raw_fd(), &mut packet)?;
                Ok(Ok((packet, speaker)))
            })
            .await;
        match received {
            Ok(Ok((packet, _))) if packet.is_empty() => Err(SwrkError::Closed),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(SwrkError::Closed),
            Err(error) => Err(SwrkError::Receive(error)),
        }
    }
}

/// Fills `packet` with the next one; who has sent it.
fn receive_from(socket: i32, packet: &mut [u8]) -> Result<Option<i32>, Errno> {
    let mut control = nix::cmsg_space!(UnixCredentials);
    let mut parts = [io::IoSliceMut::new(packet)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut control), MsgFlags::empty())?;
    let sender = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
        _ => None,
    });
    Ok(sender)
}

fn command(config: &SwrkConfig, socket: i32) -> Result<Command, SwrkError> {
    let output = File::options()
        .create(true)
        .append(true)
        .open(&config.output);
    let output = output
        .and_then(|file| Ok((file.try_clone()?, file)))
        .map_err(|source| SwrkError::Output {
            path: config.output.clone(),
            source,
        })?;
    let mut command = Command::new(&config.criu);
    command
        .args(["--no-default-config", "swrk", &socket.to_string()])
        .env_clear()
        .env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
        )
        .envs(config.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(output.0)
        .stderr(output.1);
    if !config.breakpoints {
        command.env("CRIU_FAULT", NO_BREAKPOINTS);
    }
    if let Some(view) = &config.view {
        command.env("LD_PRELOAD", &view.library);
        command.env(FEED_VARIABLE, view.feed.as_raw_fd().to_string());
        if let Some(freezer) = &view.freezer {
            command.env(FREEZER_VARIABLE, freezer);
        }
        if !view.tracer {
            command.env(ALONE_VARIABLE, "");
        }
    } else if let Some(library) = &config.reaper {
        command.env("LD_PRELOAD", library);
        command.env(REAPER_VARIABLE, "");
    }
    Ok(command)
}

fn start(
    command: Command,
    config: SwrkConfig,
    socket: OwnedFd,
) -> Result<tokio::process::Child, SwrkError> {
    let mut inherited = config.inherited;
    inherited.push(socket);
    inherited.extend(config.view.map(|view| view.feed));
    let setup = ChildSetup {
        cgroup_procs: config
            .cgroup_procs
            .iter()
            .map(|path| c_path(path))
            .collect::<Result<_, _>>()?,
        namespaces: config.namespaces,
        inherited,
        huge_pages: config.huge_pages,
        urgent: config.urgent,
    };
    sys::spawn(command, setup).map_err(|(step, source)| match step {
        FailedStep::Cgroup(index) => SwrkError::Cgroup {
            path: config.cgroup_procs[index].clone(),
            source,
        },
        FailedStep::Namespace(index) => SwrkError::Namespace { index, source },
        FailedStep::Inherit(index) => SwrkError::Inherit { index, source },
        FailedStep::HugePages => SwrkError::HugePages(source),
        FailedStep::Exec => SwrkError::Exec {
            criu: config.criu.clone(),
            source,
        },
    })
}

fn c_path(path: &Path) -> Result<CString, SwrkError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| SwrkError::ZeroByte {
        path: path.to_owned(),
    })
}

/// Longest packet taken from CRIU, in bytes. Notifications and answers are some hundred.
const PACKET_MAX: usize = 1 << 20; // 1 MiB

/// The "fault" of CRIU that there are no breakpoints: `FI_NO_BREAKPOINTS`, the same number since
/// CRIU 3.
const NO_BREAKPOINTS: &str = "130";

/// For a daemon started without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
