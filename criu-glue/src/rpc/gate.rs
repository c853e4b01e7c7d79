//! A gate: where a container runtime looks for CRIU, and finds somebody who asks us first.
//!
//! In a folder of its own a link `criu` leads to the program of `criu-gate`, and beside it is the
//! socket on which that reports ([`criu_gate`]). A runtime that has the folder alone in its `PATH`
//! asks for CRIU's version, and then for what it wants: the first is served at once, the other is
//! what [`Gate::asked`] returns. [`Asked::summon`] has CRIU come, which then waits as well, and
//! [`Summoned::pass`] lets it hear what it is asked for.
//!
//! Invariant: no CRIU is started for a runtime that has not asked yet: until it has, it may still
//! move what is to become CRIU to another cgroup.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criu_gate::{HELLO, Instructions, PROGRAM, SOCKET, TAR, TOOLS, Value};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::client::{Client, ClientRequest, Patch, PatchError};
use super::message::RequestType;
use super::packet::{Channel, Packet, Peer};
use super::{Conversation, SwrkConfig, TalkError, swrk};
use crate::sys;

/// A folder with a link and a socket.
#[derive(Debug)]
pub struct Gate {
    folder: PathBuf,
    listener: AsyncFd<OwnedFd>,
}

/// A runtime that has asked for something and is kept waiting.
#[derive(Debug)]
pub struct Asked {
    client: Client,
    request: ClientRequest,
    stand_in: StandIn,
    /// Where CRIU looks first for what it starts.
    tools: PathBuf,
}

/// A runtime that is kept waiting, and a CRIU that waits for its request.
#[derive(Debug)]
pub struct Summoned {
    conversation: Conversation,
    request: ClientRequest,
}

/// The process that is to become CRIU.
#[derive(Debug)]
struct StandIn {
    channel: Channel,
    peer: Peer,
}

/// Why nobody has asked, or no CRIU is there for whoever has.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    #[error("cannot make {path}")]
    Make {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot hear who comes to the gate")]
    Accept(#[source] io::Error),
    #[error("what came to the gate is not what a runtime starts")]
    Stranger,
    #[error("no container runtime asked criu for anything within {limit:?}")]
    Silent { limit: Duration },
    #[error("the container runtime has not asked for a dump that leaves its tree running")]
    Final,
    #[error("cannot speak with what is to become criu")]
    StandIn(#[source] TalkError),
    #[error("cannot speak with the container runtime")]
    Client(#[source] TalkError),
    #[error("cannot serve the container runtime's question for criu's version")]
    Version(#[source] TalkError),
    #[error("cannot change the container runtime's request")]
    Patch(#[from] PatchError),
}

impl Gate {
    /// Makes a gate in the empty or missing `folder`, with `program` for runtimes to start. Needs a
    /// tokio runtime with IO. The path of `folder` must be short: that of a socket has 107 bytes.
    ///
    /// # Errors
    /// [`GateError::Make`].
    pub fn bind(folder: &Path, program: &Path) -> Result<Self, GateError> {
        let made = |path: PathBuf| move |source| GateError::Make { path, source };
        fs::create_dir_all(folder).map_err(made(folder.to_owned()))?;
        let link = folder.join(PROGRAM);
        symlink(program, &link).map_err(made(link))?;
        let tools = folder.join(TOOLS);
        let tar = tools.join(TAR);
        let linked = fs::create_dir(&tools).and_then(|()| symlink(program, &tar));
        linked.map_err(made(tar))?;
        let path = folder.join(SOCKET);
        let listener = listener(&path).map_err(made(path))?;
        Ok(Self {
            folder: folder.to_owned(),
            listener,
        })
    }

    /// All of the `PATH` of a runtime: whoever found the real CRIU, because the link is broken or
    /// gone, would have it dump the workload without us, and end it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until a runtime asks for a dump or a restore. Questions for the version are passed to
    /// `criu` at once.
    ///
    /// # Errors
    /// [`GateError::Silent`] if nobody has within `limit`.
    pub async fn asked(&self, criu: &Path, limit: Duration) -> Result<Asked, GateError> {
        let asked = async {
            loop {
                let asked = self.next().await?;
                if is_work(asked.request.kind()) {
                    return Ok(asked);
                }
                let config = SwrkConfig::new(criu.to_owned(), PathBuf::new());
                let Summoned {
                    mut conversation,
                    request,
                } = asked.summon(config).await?;
                let version = GateError::Version;
                conversation.pass(request).await.map_err(version)?;
                let answered = conversation.conclude(limit, |_| true).await;
                answered.map_err(version)?;
            }
        };
        let asked = timeout(limit, asked).await;
        asked.unwrap_or(Err(GateError::Silent { limit }))
    }

    async fn next(&self) -> Result<Asked, GateError> {
        let accept = |listener: &OwnedFd| sys::accept(listener.as_fd());
        let accepted = self.listener.async_io(Interest::READABLE, accept).await;
        let socket = accepted.map_err(GateError::Accept)?;
        let peer = Peer::of(socket.as_fd()).map_err(GateError::Accept)?;
        let channel = Channel::new(socket).map_err(GateError::Accept)?;
        let received = channel.receive().await;
        let (mut hello, _) = received.map_err(GateError::StandIn)?;
        let socket = hello.descriptors.pop().filter(|_| hello.bytes == HELLO);
        let client = Client::new(socket.ok_or(GateError::Stranger)?).map_err(GateError::Client)?;
        let request = client.request(REQUEST_MAX).await;
        Ok(Asked {
            request: request.map_err(GateError::Client)?,
            client,
            stand_in: StandIn { channel, peer },
            tools: self.folder.join(TOOLS),
        })
    }
}

impl Asked {
    /// The process that asks.
    #[must_use]
    pub fn client_pid(&self) -> i32 {
        self.client.peer().pid()
    }

    /// The process that is to become CRIU, and is where the runtime has put it.
    #[must_use]
    pub fn criu_pid(&self) -> i32 {
        self.stand_in.peer.pid()
    }

    /// What it asks for.
    #[must_use]
    pub fn request(&self) -> &ClientRequest {
        &self.request
    }

    /// Whether the runtime still waits, and so does what is to become CRIU.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.client.channel.is_open() && self.stand_in.channel.is_open()
    }

    /// Answers with failure, for `why`, so that the runtime undoes what it has done so far.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when nobody hears it.
    pub async fn call_off(self, why: &str) -> Result<(), TalkError> {
        self.client.call_off(&self.request, why).await
    }

    /// Answers with success though nothing is dumped, for whoever is about what else the runtime
    /// and its callers do then. Of a dump that leaves its tree running only.
    ///
    /// # Errors
    /// [`GateError::Final`] if the tree would be thought dead, [`GateError::Client`] when nobody
    /// hears it.
    pub async fn pretend(self) -> Result<(), GateError> {
        let options = self.request.options();
        let is_dump = self.request.kind() == RequestType::Dump as i32;
        if !is_dump || options.and_then(|options| options.leave_running) != Some(true) {
            return Err(GateError::Final);
        }
        let said = self.client.pretend(&self.request).await;
        said.map_err(GateError::Client)
    }

    /// Has CRIU come, started as `config` says, and wait. Of `config` cgroups, output and inherited
    /// descriptors do not count: they are the runtime's.
    ///
    /// # Errors
    /// [`GateError::StandIn`] when what was to become CRIU has ended.
    pub async fn summon(self, config: SwrkConfig) -> Result<Summoned, GateError> {
        let StandIn { channel, peer } = self.stand_in;
        if config.urgent {
            sys::make_urgent(peer.pid());
        }
        let between = Conversation::between(self.client, peer);
        let (conversation, criu) = between.map_err(GateError::StandIn)?;
        let sent = channel.send(&instructions(config, criu, &self.tools)).await;
        sent.map_err(|error| GateError::StandIn(TalkError::Send(error)))?;
        Ok(Summoned {
            conversation,
            request: self.request,
        })
    }
}

impl Summoned {
    /// The conversation, of which CRIU knows nothing yet.
    #[must_use]
    pub fn conversation(&self) -> &Conversation {
        &self.conversation
    }

    /// Passes the request on with `patch`.
    ///
    /// # Errors
    /// [`GateError::Patch`], [`GateError::StandIn`] when CRIU has ended.
    pub async fn pass(mut self, patch: Patch) -> Result<Conversation, GateError> {
        if let Some(client) = self.conversation.client() {
            self.request.patch(patch, client.peer())?;
        }
        let passed = self.conversation.pass(self.request).await;
        passed.map_err(GateError::StandIn)?;
        Ok(self.conversation)
    }

    /// Answers with failure, for `why`, so that the runtime undoes what it has done so far. CRIU
    /// hears nothing and ends.
    ///
    /// # Errors
    /// [`TalkError::ClientClosed`] when nobody hears it.
    pub async fn call_off(self, why: &str) -> Result<(), TalkError> {
        self.conversation.refuse(&self.request, why).await
    }
}

/// What the stand-in is told.
fn instructions(config: SwrkConfig, socket: OwnedFd, tools: &Path) -> Packet {
    let mut instructions = Instructions {
        program: config.criu.clone(),
        namespaces: config.namespaces.len(),
        huge_pages: config.huge_pages,
        environment: Vec::new(),
    };
    let path = [tools.as_os_str(), OsStr::new(":"), &swrk::search_path()];
    let path = ("PATH".into(), path.into_iter().collect());
    let variables = std::iter::once(path).chain(config.variables());
    let text = |(name, value): (OsString, OsString)| (name, Value::Text(value));
    instructions.environment.extend(variables.map(text));
    let mut descriptors = vec![socket];
    descriptors.extend(config.namespaces);
    if let Some(view) = config.view {
        let feed = (crate::view::FEED_VARIABLE.into(), Value::Descriptor);
        instructions.environment.push(feed);
        descriptors.push(view.feed);
    }
    Packet {
        bytes: instructions.encode(),
        descriptors,
    }
}

fn is_work(kind: i32) -> bool {
    [RequestType::Dump, RequestType::Restore]
        .map(|kind| kind as i32)
        .contains(&kind)
}

fn listener(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(8)?)?;
    sys::register(listener)
}

/// How long a runtime may take from starting `criu` to asking it for something.
const REQUEST_MAX: Duration = Duration::from_secs(10);
