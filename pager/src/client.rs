//! The daemon's side of a pager: starting one, finding one again, and asking it.
//!
//! Invariants: dropping a client or losing the connection does not touch the pager; every question
//! ends in an answer or in [`ClientError::Lost`].

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageferry_proto::id::{MigrationId, SpaceId};
use pageferry_proto::page::PageIndex;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::Failure;
use pageferry_sys::fdpass::FDS_MAX;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

use crate::channel::{Channel, ChannelError};
use crate::marks::{FILL_LOST, FILLED, LOG, READY, RESTORE_LOST, SOCKET};
use crate::message::{
    Ask, Fault, FillReport, Namespace, Reply, Request, RestoreRequest, Restored, Status, Told,
};
use crate::plan::{self, PlanError};

/// How long a pager may take from its start to its socket.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs of one message.
const ARRIVED_RUNS_MAX: usize = 1024;

/// How a pager is started.
#[derive(Debug, Clone)]
pub struct Spawn {
    /// The program `pageferry-pager`.
    pub program: PathBuf,
    /// The migration's run directory: socket, log and markers go there. It must exist.
    pub directory: PathBuf,
    /// Only for whoever reads a list of processes.
    pub id: MigrationId,
    /// `cgroup.procs` files of cgroups the pager goes into: not the daemon's, so that it outlives
    /// the daemon's service.
    pub cgroup_procs: Vec<PathBuf>,
    /// The same for its watcher: others than the pager's, so that nothing takes both.
    pub watcher_cgroup_procs: Vec<PathBuf>,
}

/// A connection to a pager.
#[derive(Debug)]
pub struct PagerClient {
    channel: Arc<Channel>,
    asked: Arc<Mutex<Asked>>,
    id: AtomicU64,
    reader: tokio::task::JoinHandle<()>,
    /// What threads wait for, until somebody listens to that.
    wanted: Mutex<Option<mpsc::UnboundedReceiver<Vec<Wanted>>>>,
}

/// A page that threads wait for, and that has not come: its space, as the pager knows it.
pub type Wanted = (SpaceId, PageIndex);

/// What has not come of a space.
#[derive(Debug)]
pub struct Missing {
    /// Which, as the pager knows it.
    pub space: SpaceId,
    /// Where its pages are to go.
    pub store: OwnedFd,
    /// The pages.
    pub pages: PageSet,
}

/// What a pager tells unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// All memory is filled; the pager ends.
    Filled(FillReport),
    /// The restore failed while nobody asked. Unless `after_go`, nothing of the tree is left.
    Failed {
        /// Why.
        failure: Failure,
        /// Whether the tree had been let go.
        after_go: bool,
    },
    /// The connection is gone: the pager has ended or died; [`Remains`] tells which.
    Lost,
}

/// What a pager that cannot be connected to has left in its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remains {
    /// It did its work.
    Filled(FillReport),
    /// It died in the fill; the workload is frozen for good. The watcher's line.
    FillLost(String),
    /// It died before the tree was let go; nothing of the tree is left, or soon will be.
    RestoreLost(String),
    /// It never let a tree go: it was discarded, or died before it restored one.
    Nothing,
}

/// Why a pager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was started and did not get as far as its socket.
    #[error("{program} ended or hung before it could be talked to{said}")]
    NotReady {
        /// The program.
        program: PathBuf,
        /// The last line of its log, after a colon; empty if it has said nothing.
        said: String,
    },
    /// The socket failed.
    #[error("cannot talk to the pager")]
    Channel(#[source] ChannelError),
    /// A plan could not be written down.
    #[error("cannot write the plan")]
    Plan(#[source] PlanError),
    /// The pager is gone.
    #[error("the pager has closed the connection")]
    Lost,
    /// It has not answered yet.
    #[error("the pager has not answered within {0:?}")]
    Silent(Duration),
    /// It said no.
    #[error("{failure}")]
    Failed {
        /// Why.
        failure: Failure,
        /// Whether the tree had been let go.
        after_go: bool,
    },
    /// It answered something else than was asked.
    #[error("the pager answered {0:?} to another question")]
    Answer(Box<Reply>),
}

/// An answer, and what came with it.
type Answer = (Reply, Vec<OwnedFd>);

#[derive(Debug, Default)]
struct Asked {
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// The connection is gone: nobody answers any more.
    lost: bool,
}

impl PagerClient {
    /// Starts a pager and connects to it. It lives on when the daemon ends.
    pub async fn spawn(
        spawn: &Spawn,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Notice>), ClientError> {
        let start = |source| ClientError::Start {
            program: spawn.program.clone(),
            source,
        };
        let log = spawn.directory.join(LOG);
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(start)?;
        let mut child = Command::new(&spawn.program)
            .arg("--dir")
            .arg(&spawn.directory)
            .arg("--id")
            .arg(spawn.id.to_string())
            .args(flags("--cgroup-procs", &spawn.cgroup_procs))
            .args(flags("--watcher-cgroup-procs", &spawn.watcher_cgroup_procs))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(output)
            .process_group(0)
            .kill_on_drop(false)
            .spawn()
            .map(|child| Starting(Some(child)))
            .map_err(start)?;
        let mut line = String::new();
        let ready = async {
            match child.0.as_mut().and_then(|child| child.stdout.take()) {
                Some(stdout) => BufReader::new(stdout).read_line(&mut line).await.is_ok(),
                None => false,
            }
        };
        let ready = tokio::time::timeout(START_TIMEOUT, ready)
            .await
            .unwrap_or(false);
        if !ready || line.trim_end() != READY {
            return Err(ClientError::NotReady {
                program: spawn.program.clone(),
                said: last_line(&log),
            });
        }
        let connected = Self::connect(&spawn.directory)?;
        child.has_started();
        Ok(connected)
    }

    /// Connects to the pager of a directory: after a restart of the daemon.
    ///
    /// Fails with [`ClientError::Channel`] when there is none; see [`Remains::read`].
    pub fn connect(
        directory: &Path,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Notice>), ClientError> {
        let channel = Channel::connect(&directory.join(SOCKET)).map_err(ClientError::Channel)?;
        let channel = Arc::new(channel);
        let asked = Arc::new(Mutex::new(Asked::default()));
        let (notices, received) = mpsc::unbounded_channel();
        let (wants, wanted) = mpsc::unbounded_channel();
        let heard = (notices, wants);
        let reader = tokio::spawn(read(channel.clone(), asked.clone(), heard));
        let id = AtomicU64::new(1);
        Ok((
            Self {
                channel,
                asked,
                id,
                reader,
                wanted: Mutex::new(Some(wanted)),
            },
            received,
        ))
    }

    /// Hands over the store of a space: a file in which the offset of a page is its address.
    pub async fn space(&self, space: SpaceId, store: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.ask_ok(Request::Space { space: space.0 }, &[store])
            .await
    }

    /// Tells which pages are to be filled. Each space must have a store, and every space that CRIU
    /// will restore must be told, also one without pages.
    pub async fn plan(&self, plans: &[(SpaceId, &PageSet)]) -> Result<(), ClientError> {
        self.lists(plans, |spaces| Request::Plan { spaces }).await
    }

    /// Tells which of the planned pages are not in the stores yet. After [`PagerClient::plan`].
    pub async fn absent(&self, absent: &[(SpaceId, &PageSet)]) -> Result<(), ClientError> {
        self.lists(absent, |spaces| Request::Absent { spaces })
            .await
    }

    async fn lists(
        &self,
        lists: &[(SpaceId, &PageSet)],
        request: impl Fn(Vec<u32>) -> Request,
    ) -> Result<(), ClientError> {
        for part in lists.chunks(FDS_MAX) {
            let runs: Result<Vec<OwnedFd>, _> = part
                .iter()
                .map(|(_, pages)| plan::write_runs(pages))
                .collect();
            let runs = runs.map_err(ClientError::Plan)?;
            let fds: Vec<BorrowedFd<'_>> = runs.iter().map(AsFd::as_fd).collect();
            let spaces = part.iter().map(|(space, _)| space.0).collect();
            self.ask_ok(request(spaces), &fds).await?;
        }
        Ok(())
    }

    /// What threads wait for of that, from now on; none if somebody else has it.
    pub fn wanted(&self) -> Option<mpsc::UnboundedReceiver<Vec<Wanted>>> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.take()
    }

    /// Tells that pages are in the store that were not. Doing it again does no harm.
    pub async fn arrived(&self, space: SpaceId, pages: &PageSet) -> Result<(), ClientError> {
        for part in pages.runs().chunks(ARRIVED_RUNS_MAX) {
            let runs = part.iter();
            let runs = runs.map(|run| (space.0, run.start().0, run.count().0));
            let runs = runs.collect();
            self.ask_ok(Request::Arrived { runs }, &[]).await?;
        }
        Ok(())
    }

    /// What has not arrived yet of a tree that is restored: what whoever asks first must bring, and
    /// what one that was restarted must bring still. Threads that wait for any of it are told of
    /// again.
    pub async fn missing(&self) -> Result<Vec<Missing>, ClientError> {
        let mut all: Vec<Missing> = Vec::new();
        loop {
            let after = all.last().map(|last| last.space.0);
            let (reply, fds) = self.ask_for(Request::Missing { after }, &[]).await?;
            let Reply::Missing(spaces) = reply else {
                return Err(reply.into());
            };
            if spaces.is_empty() {
                return Ok(all);
            }
            if fds.len() != 2 * spaces.len() {
                return Err(ClientError::Answer(Box::new(Reply::Missing(spaces))));
            }
            let mut fds = fds.into_iter();
            for space in spaces {
                let (Some(store), Some(runs)) = (fds.next(), fds.next()) else {
                    break;
                };
                let pages = plan::read_runs(&File::from(runs)).map_err(ClientError::Plan)?;
                let space = SpaceId(space);
                all.push(Missing {
                    space,
                    store,
                    pages,
                });
            }
        }
    }

    /// Hands over the gate of the loopback that the tree will use: the pager shuts it for the
    /// restore, and opens it before the tree runs. Before [`PagerClient::restore`].
    pub async fn lo_gate(&self, gate: &[BorrowedFd<'_>; 2]) -> Result<(), ClientError> {
        self.ask_ok(Request::LoGate, gate).await
    }

    /// Starts CRIU, or the container runtime that will, for a [`PagerClient::restore`] with the
    /// same arguments, which then need not wait for that. The pid of what is CRIU or will be.
    pub async fn prepare(
        &self,
        request: RestoreRequest,
        namespaces: &[(Namespace, BorrowedFd<'_>)],
    ) -> Result<i32, ClientError> {
        let request = RestoreRequest {
            namespaces: namespaces.iter().map(|(kind, _)| *kind).collect(),
            ..request
        };
        let fds: Vec<_> = namespaces.iter().map(|(_, fd)| *fd).collect();
        match self.ask(Request::Prepare(Box::new(request)), &fds).await? {
            Reply::Prepared { criu_pid } => Ok(criu_pid),
            other => Err(other.into()),
        }
    }

    /// Restores the tree and holds it; answers when it is held. `namespaces` and `inherited` fill
    /// the fields of the request that name descriptors.
    pub async fn restore(
        &self,
        request: RestoreRequest,
        namespaces: &[(Namespace, BorrowedFd<'_>)],
        inherited: &[(String, BorrowedFd<'_>)],
    ) -> Result<Restored, ClientError> {
        let request = RestoreRequest {
            namespaces: namespaces.iter().map(|(kind, _)| *kind).collect(),
            inherit: inherited.iter().map(|(key, _)| key.clone()).collect(),
            ..request
        };
        let fds = namespaces.iter().map(|(_, fd)| *fd);
        let fds: Vec<_> = fds.chain(inherited.iter().map(|(_, fd)| *fd)).collect();
        match self.ask(Request::Restore(Box::new(request)), &fds).await? {
            Reply::Restored(restored) => Ok(restored),
            other => Err(other.into()),
        }
    }

    /// Has the held tree take its file locks; answers when it has all of them. It may have some
    /// when this fails.
    pub async fn lock(&self) -> Result<(), ClientError> {
        self.ask_ok(Request::Lock, &[]).await
    }

    /// Lets the tree run; answers when it does.
    pub async fn go(&self) -> Result<(), ClientError> {
        match self.ask(Request::Go, &[]).await? {
            Reply::Resumed => Ok(()),
            other => Err(other.into()),
        }
    }

    /// Undoes everything; answers when nothing of the tree is left. The pager ends then. Refused
    /// after [`PagerClient::go`].
    pub async fn discard(&self) -> Result<(), ClientError> {
        self.ask_ok(Request::Discard, &[]).await
    }

    /// How things stand.
    pub async fn status(&self) -> Result<Status, ClientError> {
        match self.ask(Request::Status, &[]).await? {
            Reply::Status(status) => Ok(status),
            other => Err(other.into()),
        }
    }

    /// Ends the conversation at once; questions that wait end in [`ClientError::Lost`]. The pager
    /// goes on.
    pub fn close(&self) {
        self.channel.shut();
    }

    async fn ask_ok(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        match self.ask(request, fds).await? {
            Reply::Ok => Ok(()),
            other => Err(other.into()),
        }
    }

    async fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        Ok(self.ask_for(request, fds).await?.0)
    }

    async fn ask_for(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, ClientError> {
        let id = self.id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            if asked.lost {
                return Err(ClientError::Lost);
            }
            asked.waiting.insert(id, answer);
        }
        match self.channel.send(&Ask { id, request }, fds).await {
            Err(ChannelError::Send(_)) => return Err(ClientError::Lost),
            sent => sent.map_err(ClientError::Channel)?,
        }
        answered.await.map_err(|_| ClientError::Lost)
    }
}

impl Drop for PagerClient {
    fn drop(&mut self) {
        self.close();
        self.reader.abort();
    }
}

impl From<Reply> for ClientError {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Failed(fault) => Self::Failed {
                failure: fault.failure(),
                after_go: fault.after_go,
            },
            other => Self::Answer(Box::new(other)),
        }
    }
}

impl Remains {
    /// What is left of a pager in its directory.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let read = |name: &str| match std::fs::read_to_string(directory.join(name)) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        if let Some(line) = read(FILL_LOST)? {
            return Ok(Self::FillLost(line));
        }
        if let Some(report) = read(FILLED)? {
            return Ok(Self::Filled(serde_json::from_str(&report)?));
        }
        Ok(read(RESTORE_LOST)?.map_or(Self::Nothing, Self::RestoreLost))
    }
}

/// A pager that nobody can talk to yet. Dropped, it is killed: it holds nothing.
#[derive(Debug)]
struct Starting(Option<Child>);

impl Starting {
    /// It lives on. Its status is collected, so that it does not stay a zombie of a long-lived
    /// daemon.
    fn has_started(mut self) {
        if let Some(mut child) = self.0.take() {
            tokio::spawn(async move { child.wait().await });
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // That it is gone already is as good.
            let _ = child.start_kill();
        }
    }
}

/// The flag before each file.
fn flags(flag: &str, files: &[PathBuf]) -> impl Iterator<Item = OsString> {
    let each = files
        .iter()
        .flat_map(move |file| [flag.into(), file.into()]);
    each.collect::<Vec<OsString>>().into_iter()
}

/// What the log says last, for whoever never sees the log.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    last.map_or_else(String::new, |line| format!(": {}", line.trim()))
}

async fn read(
    channel: Arc<Channel>,
    asked: Arc<Mutex<Asked>>,
    (notices, wants): (
        mpsc::UnboundedSender<Notice>,
        mpsc::UnboundedSender<Vec<Wanted>>,
    ),
) {
    let lock = || asked.lock().unwrap_or_else(PoisonError::into_inner);
    while let Ok(Some((told, fds))) = channel.receive::<Told>().await {
        let notice = match told {
            Told::Reply { id, reply } => {
                if let Some(answer) = lock().waiting.remove(&id) {
                    // Whoever asked may not wait any more.
                    let _ = answer.send((reply, fds));
                }
                continue;
            }
            Told::Wanted(pages) => {
                let wanted = pages.into_iter();
                let wanted = wanted.map(|(space, page)| (SpaceId(space), PageIndex(page)));
                // Where nothing is absent nobody listens, and nothing is wanted.
                let _ = wants.send(wanted.collect());
                continue;
            }
            Told::Filled(report) => Notice::Filled(report),
            Told::Failed(fault) => Notice::Failed {
                failure: Fault::failure(&fault),
                after_go: fault.after_go,
            },
        };
        let _ = notices.send(notice);
    }
    let mut asked = lock();
    asked.lost = true;
    asked.waiting.clear();
    let _ = notices.send(Notice::Lost);
}
