//! The lanes of a migration: its connections, taken together.
//!
//! ```text
//!   source                                               target
//!   dial() ── lane 0: Hello ─────────────────────────►  Listener::next() ─► TargetSession
//!          ◄───────── Welcome ───────────────────────
//!          ── lane 1…: Hello, Welcome ───────────────►  joins the session of lane 0
//!          ══ lane 0, first stream: control ════════►
//!          ══ any lane, data streams ═══════════════►  DataReceiver::next()
//! ```
//!
//! Invariants:
//! - A session is its lanes: when one breaks, all are closed and the session is lost. What was
//!   held stays held, and a new session sends what is missing; nothing is worth saving here.
//! - At a target, a migration has at most one session. A newer lane 0 of the same node takes
//!   its place; another node cannot.
//! - A lane whose greeting is not done within the time of a handshake is dropped.
//!
//! Absent: dialling again, and everything that is said after the greeting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use pageferry_proto::id::{MigrationId, NodeName};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{Hello, Message, SourceMessage, TargetMessage, Welcome};
use pageferry_proto::wire::version::{Version, VersionError};
use quinn::ConnectionError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::control::{ControlReceiver, ControlSender, Greeting, ReceiveError, SendError, greeting};
use super::endpoint::{Connection, DialError, Endpoint, HANDSHAKE_TIME_MAX, closed_by_peer};
use super::stream::{DataSender, DataStream, ReadStreamError};

/// A migration's lanes at the source.
#[derive(Debug)]
pub struct SourceSession {
    /// The version both nodes speak.
    pub version: Version,
    /// To the target.
    pub sender: ControlSender<SourceMessage>,
    /// From the target.
    pub receiver: ControlReceiver<TargetMessage>,
    /// Opens data streams.
    pub data: DataSender,
    /// The connections; dropping it closes them.
    pub lanes: Lanes,
}

/// A migration's lanes at the target.
#[derive(Debug)]
pub struct TargetSession {
    /// The source node.
    pub peer: NodeName,
    /// The migration.
    pub migration: MigrationId,
    /// The version both nodes speak.
    pub version: Version,
    /// To the source.
    pub sender: ControlSender<TargetMessage>,
    /// From the source.
    pub receiver: ControlReceiver<SourceMessage>,
    /// What arrives on any of the lanes.
    pub data: DataReceiver,
    /// The connections; dropping it closes them.
    pub lanes: Lanes,
}

/// The connections of a session. Dropping it closes them all.
#[derive(Debug)]
pub struct Lanes {
    shared: Arc<Shared>,
}

/// The data streams of all lanes of a session, in the order in which they arrived.
#[derive(Debug)]
pub struct DataReceiver {
    streams: mpsc::Receiver<DataStream>,
}

/// Greets the lanes that peers dial, and makes sessions of them.
#[derive(Debug)]
pub struct Listener {
    sessions: mpsc::Receiver<TargetSession>,
    greeter: JoinHandle<()>,
}

/// What the network did, over all lanes of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneStats {
    /// Lanes there are.
    pub lanes: usize,
    /// Longest smoothed round trip.
    pub rtt: Duration,
    /// Datagram payload of the path, the smallest.
    pub mtu: u16,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets of those that were declared lost.
    pub lost_packets: u64,
}

/// Why there is no session with a target.
#[derive(Debug, thiserror::Error)]
pub enum LanesError {
    /// A lane could not be dialled.
    #[error("cannot dial lane {lane}")]
    Dial {
        /// The lane, from 0.
        lane: u32,
        /// Why.
        #[source]
        source: DialError,
    },
    /// The target closed the lane before it welcomed it.
    #[error("node {peer} refused lane {lane}: {code}")]
    Refused {
        /// The target.
        peer: NodeName,
        /// The lane, from 0.
        lane: u32,
        /// Its reason.
        code: ErrorCode,
    },
    /// The lane broke before it was welcomed. A certificate that the target does not accept
    /// shows here.
    #[error("lane {lane} to node {peer} broke before it was welcomed")]
    Broken {
        /// The target.
        peer: NodeName,
        /// The lane, from 0.
        lane: u32,
        /// How.
        #[source]
        source: ConnectionError,
    },
    /// The target said nothing.
    #[error("node {peer} did not answer on lane {lane} within {HANDSHAKE_TIME_MAX:?}")]
    Timeout {
        /// The target.
        peer: NodeName,
        /// The lane, from 0.
        lane: u32,
    },
    /// The greeting could not be sent or read.
    #[error("greeting on lane {lane} to node {peer} failed")]
    Greeting {
        /// The target.
        peer: NodeName,
        /// The lane, from 0.
        lane: u32,
        /// Why.
        #[source]
        source: GreetingError,
    },
}

/// Why a greeting is not one.
#[derive(Debug, thiserror::Error)]
pub enum GreetingError {
    /// No stream for it.
    #[error("no stream for the greeting")]
    Stream(#[source] ConnectionError),
    /// It could not be sent.
    #[error("cannot send greeting")]
    Send(#[source] SendError),
    /// It could not be read.
    #[error("cannot read greeting")]
    Receive(#[source] ReceiveError),
    /// The stream ended, or began with something else.
    #[error("lane does not begin with a greeting")]
    Missing,
    /// The other node is too old or too new.
    #[error("no common version")]
    Version(#[source] VersionError),
    /// A lane that its session has already, or does not count on.
    #[error("lane {lane} of {lanes} has no place in migration {migration}")]
    Place {
        /// The migration.
        migration: MigrationId,
        /// The lane.
        lane: u32,
        /// How many the source said there are.
        lanes: u32,
    },
    /// A further lane of a migration that has no session, or one with another node.
    #[error("no session of migration {0} with this node")]
    Unknown(MigrationId),
}

impl LanesError {
    /// The reason as the rest of the program knows it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Dial { source, .. } => match source {
                DialError::UnknownPeer(_) => ErrorCode::PeerUnknown,
                DialError::Timeout { .. } => ErrorCode::Timeout,
                DialError::Name(..)
                | DialError::Socket { .. }
                | DialError::Connect { .. }
                | DialError::Handshake { .. } => ErrorCode::PeerLost,
            },
            Self::Refused { code, .. } => *code,
            Self::Broken { .. } => ErrorCode::PeerLost,
            Self::Timeout { .. } => ErrorCode::Timeout,
            Self::Greeting { source, .. } => source.code(),
        }
    }
}

impl GreetingError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Stream(_) | Self::Send(_) => ErrorCode::PeerLost,
            Self::Receive(ReceiveError::Read(_)) => ErrorCode::PeerLost,
            Self::Receive(_) | Self::Missing => ErrorCode::Malformed,
            Self::Version(_) => ErrorCode::Version,
            Self::Place { .. } => ErrorCode::Unexpected,
            Self::Unknown(_) => ErrorCode::MigrationUnknown,
        }
    }
}

/// Dials all lanes of a migration, at least one, and greets the target on each.
pub async fn dial(
    endpoint: &Endpoint,
    peer: &NodeName,
    migration: MigrationId,
    lanes: u8,
) -> Result<SourceSession, LanesError> {
    let lanes = u32::from(lanes.max(1));
    let shared = Arc::new(Shared::new(peer.clone(), lanes));
    let session = Lanes {
        shared: Arc::clone(&shared),
    };
    let mut connections = Vec::with_capacity(lanes as usize);
    let mut control = None;
    for lane in 0..lanes {
        let hello = Hello {
            version: Version::CURRENT.number(),
            migration,
            lane,
            lanes,
        };
        let dialled = endpoint.dial(peer).await;
        let connection = dialled.map_err(|source| LanesError::Dial { lane, source })?;
        let greeted = timeout(HANDSHAKE_TIME_MAX, say_hello(&connection, hello)).await;
        let (streams, welcome) = greeted
            .map_err(|_| LanesError::Timeout {
                peer: peer.clone(),
                lane,
            })?
            .map_err(|source| lane_error(&connection, lane, source))?;
        // The stream of a further lane stays open and unused: closing it says nothing.
        control.get_or_insert((streams, welcome));
        connections.push(connection.inner.clone());
        let closed = watch_lane(Arc::clone(&shared), connection.inner.clone());
        shared.add(lane, connection);
        tokio::spawn(closed);
    }
    let ((sender, receiver), welcome) = control.expect("there is at least one lane");
    Ok(SourceSession {
        version: welcome.version,
        sender: sender.into_role(),
        receiver: receiver.into_role(),
        data: DataSender::new(&connections, migration),
        lanes: session,
    })
}

async fn say_hello(
    connection: &Connection,
    hello: Hello,
) -> Result<(Greeting, Welcome), GreetingError> {
    let (sender, receiver) = connection
        .inner
        .open_bi()
        .await
        .map_err(GreetingError::Stream)?;
    let (mut sender, mut receiver) = greeting(sender, receiver);
    sender
        .send(Message::Hello(hello))
        .await
        .map_err(GreetingError::Send)?;
    match receiver.next().await.map_err(GreetingError::Receive)? {
        Some(Message::Welcome(welcome)) => Ok(((sender, receiver), welcome)),
        Some(Message::Hello(_) | Message::Source(_) | Message::Target(_)) | None => {
            Err(GreetingError::Missing)
        }
    }
}

/// A greeting that failed because the lane did says so by the lane's own reason.
fn lane_error(connection: &Connection, lane: u32, source: GreetingError) -> LanesError {
    let peer = connection.peer().clone();
    match connection.inner.close_reason() {
        None => LanesError::Greeting { peer, lane, source },
        Some(source) => match closed_by_peer(&source) {
            Some(code) => LanesError::Refused { peer, lane, code },
            None => LanesError::Broken { peer, lane, source },
        },
    }
}

impl Lanes {
    /// The other node.
    pub fn peer(&self) -> &NodeName {
        &self.shared.peer
    }

    /// Waits until the session is lost: one of its lanes broke, or either side closed it. Says
    /// the peer's reason, if it gave one.
    pub async fn lost(&self) -> ErrorCode {
        let mut lost = self.shared.lost.subscribe();
        let reason = lost.wait_for(Option::is_some).await;
        let reason = reason.map(|reason| *reason);
        reason.ok().flatten().unwrap_or(ErrorCode::PeerLost)
    }

    /// Closes all lanes. What was not yet delivered is lost: finish the control sender first.
    pub fn close(&self, code: ErrorCode) {
        self.shared.end(code);
    }

    /// What the network did so far.
    pub fn stats(&self) -> LaneStats {
        let connections = self.shared.connections();
        let mut stats = LaneStats {
            lanes: connections.len(),
            mtu: u16::MAX,
            ..LaneStats::default()
        };
        for (_, connection) in connections.iter() {
            let path = connection.inner.stats().path;
            stats.rtt = stats.rtt.max(path.rtt);
            stats.mtu = stats.mtu.min(path.current_mtu);
            stats.sent_packets += path.sent_packets;
            stats.lost_packets += path.lost_packets;
        }
        stats
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close(ErrorCode::PeerLost);
    }
}

impl DataReceiver {
    /// The next stream of any lane; `None` when the session is lost. Cancelling loses nothing.
    ///
    /// Streams may be read at the same time or one after the other: flow control leaves room
    /// for each, so one that nobody reads yet does not hold up the one that is read.
    pub async fn next(&mut self) -> Option<DataStream> {
        self.streams.recv().await
    }
}

impl Listener {
    /// Begins to greet what connects to the endpoint. Must be called within a tokio runtime.
    pub fn start(endpoint: Arc<Endpoint>) -> Self {
        let (sender, sessions) = mpsc::channel(SESSIONS_WAITING_MAX);
        let greeter = tokio::spawn(async move {
            let known = Arc::new(Sessions::default());
            while let Some(connection) = endpoint.accept().await {
                let known = Arc::clone(&known);
                let sender = sender.clone();
                // As many at once as the endpoint lets connections in.
                tokio::spawn(async move { known.admit(connection, &sender).await });
            }
        });
        Self { sessions, greeter }
    }

    /// The next session that a source has opened; `None` when the endpoint is closed.
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<TargetSession> {
        self.sessions.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.greeter.abort();
    }
}

/// The sessions that are alive, for further lanes to find.
#[derive(Debug, Default)]
struct Sessions {
    by_migration: Mutex<HashMap<MigrationId, Entry>>,
}

#[derive(Clone, Debug)]
struct Entry {
    shared: Weak<Shared>,
    streams: mpsc::WeakSender<DataStream>,
}

impl Sessions {
    /// Greets a connection and gives it its place; closes it if it has none.
    async fn admit(&self, connection: Connection, sessions: &mpsc::Sender<TargetSession>) {
        let greeted = timeout(HANDSHAKE_TIME_MAX, hear_hello(&connection)).await;
        let placed = match greeted {
            Err(_) => {
                tracing::warn!(peer = %connection.peer(), "dropped a lane that said nothing");
                return connection.close(ErrorCode::Timeout);
            }
            Ok(Err(error)) => Err(error),
            Ok(Ok((streams, hello))) => self.place(&connection, streams, &hello).await,
        };
        match placed {
            Err(error) => {
                tracing::warn!(peer = %connection.peer(), "refused a lane: {error}");
                connection.close(error.code());
            }
            Ok(Place::Joined {
                shared,
                streams,
                lane,
                migration,
            }) => {
                serve_lane(shared, streams, connection, lane, migration);
            }
            Ok(Place::Opened { session, streams }) => {
                let migration = session.migration;
                let shared = Arc::clone(&session.lanes.shared);
                serve_lane(shared, streams, connection, 0, migration);
                // Fails only when nobody listens any more; dropping the session closes it.
                drop(sessions.send(*session).await);
            }
        }
    }

    async fn place(
        &self,
        connection: &Connection,
        (mut sender, receiver): Greeting,
        hello: &Hello,
    ) -> Result<Place, GreetingError> {
        let version = Version::agreed(hello.version).map_err(GreetingError::Version)?;
        let joined = match hello.lane {
            0 => None,
            1.. => Some(self.join(connection.peer(), hello)?),
        };
        let welcome = Message::Welcome(Welcome { version });
        if let Some((shared, streams)) = joined {
            sender.send(welcome).await.map_err(GreetingError::Send)?;
            return Ok(Place::Joined {
                shared,
                streams,
                lane: hello.lane,
                migration: hello.migration,
            });
        }
        let peer = connection.peer().clone();
        let shared = Arc::new(Shared::new(peer.clone(), hello.lanes));
        let (streams, data) = mpsc::channel(STREAMS_WAITING_MAX);
        // Before the welcome: the source dials the next lane as soon as it has it.
        self.open(hello.migration, &shared, &streams)?;
        sender.send(welcome).await.map_err(GreetingError::Send)?;
        let session = Box::new(TargetSession {
            peer,
            migration: hello.migration,
            version,
            sender: sender.into_role(),
            receiver: receiver.into_role(),
            data: DataReceiver { streams: data },
            lanes: Lanes { shared },
        });
        Ok(Place::Opened { session, streams })
    }

    /// The session that a further lane belongs to.
    fn join(&self, peer: &NodeName, hello: &Hello) -> Result<Joined, GreetingError> {
        let unknown = GreetingError::Unknown(hello.migration);
        let known = self.lock();
        let entry = known.get(&hello.migration);
        let alive =
            entry.and_then(|entry| Some((entry.shared.upgrade()?, entry.streams.upgrade()?)));
        let Some((shared, streams)) = alive.filter(|(shared, _)| &shared.peer == peer) else {
            return Err(unknown);
        };
        if shared.lanes != hello.lanes || shared.has(hello.lane) {
            return Err(GreetingError::Place {
                migration: hello.migration,
                lane: hello.lane,
                lanes: hello.lanes,
            });
        }
        Ok((shared, streams))
    }

    /// Makes a session findable, in place of an older one of the same node.
    fn open(
        &self,
        migration: MigrationId,
        shared: &Arc<Shared>,
        streams: &mpsc::Sender<DataStream>,
    ) -> Result<(), GreetingError> {
        let mut known = self.lock();
        known.retain(|_, entry| 0 < entry.shared.strong_count());
        let entry = Entry {
            shared: Arc::downgrade(shared),
            streams: streams.downgrade(),
        };
        if let Some(older) = known
            .get(&migration)
            .and_then(|entry| entry.shared.upgrade())
        {
            if older.peer != shared.peer {
                return Err(GreetingError::Unknown(migration));
            }
            older.end(ErrorCode::Superseded);
        }
        known.insert(migration, entry);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Entry>> {
        // A map of weak handles is whole after every statement, whoever panicked.
        self.by_migration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

type Joined = (Arc<Shared>, mpsc::Sender<DataStream>);

enum Place {
    Joined {
        shared: Arc<Shared>,
        streams: mpsc::Sender<DataStream>,
        lane: u32,
        migration: MigrationId,
    },
    Opened {
        session: Box<TargetSession>,
        streams: mpsc::Sender<DataStream>,
    },
}

async fn hear_hello(connection: &Connection) -> Result<(Greeting, Hello), GreetingError> {
    let (sender, receiver) = connection
        .inner
        .accept_bi()
        .await
        .map_err(GreetingError::Stream)?;
    let (sender, mut receiver) = greeting(sender, receiver);
    match receiver.next().await.map_err(GreetingError::Receive)? {
        Some(Message::Hello(hello)) => Ok(((sender, receiver), hello)),
        Some(Message::Welcome(_) | Message::Source(_) | Message::Target(_)) | None => {
            Err(GreetingError::Missing)
        }
    }
}

/// Takes a lane into its session and hands on its data streams until it breaks.
fn serve_lane(
    shared: Arc<Shared>,
    streams: mpsc::Sender<DataStream>,
    connection: Connection,
    lane: u32,
    migration: MigrationId,
) {
    let inner = connection.inner.clone();
    shared.add(lane, connection);
    tokio::spawn(watch_lane(Arc::clone(&shared), inner.clone()));
    tokio::spawn(async move {
        if let Err(error) = forward_streams(&inner, &streams, migration).await {
            tracing::warn!(%migration, lane, "closing the session: {error}");
            shared.end(ErrorCode::Malformed);
        }
    });
}

async fn forward_streams(
    connection: &quinn::Connection,
    streams: &mpsc::Sender<DataStream>,
    migration: MigrationId,
) -> Result<(), ReadStreamError> {
    // That the lane broke is for its watcher to tell.
    while let Ok(stream) = connection.accept_uni().await {
        match DataStream::open(stream, migration).await {
            Ok(stream) => {
                if streams.send(stream).await.is_err() {
                    return Ok(());
                }
            }
            // A sender that gave up before it began; what is missing is sent again.
            Err(ReadStreamError::Read(_) | ReadStreamError::Early(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends the session when the lane does.
async fn watch_lane(shared: Arc<Shared>, connection: quinn::Connection) {
    let reason = connection.closed().await;
    shared.end(closed_by_peer(&reason).unwrap_or(ErrorCode::PeerLost));
}

/// What all parts of a session know of each other.
#[derive(Debug)]
struct Shared {
    peer: NodeName,
    /// How many lanes the source said there are.
    lanes: u32,
    connections: Mutex<Vec<(u32, Connection)>>,
    /// Why the session ended.
    lost: watch::Sender<Option<ErrorCode>>,
}

impl Shared {
    fn new(peer: NodeName, lanes: u32) -> Self {
        Self {
            peer,
            lanes,
            connections: Mutex::default(),
            lost: watch::Sender::new(None),
        }
    }

    /// Adds a lane, or closes it if the session has ended meanwhile.
    fn add(&self, lane: u32, connection: Connection) {
        let mut connections = self.connections();
        match *self.lost.borrow() {
            Some(code) => connection.close(code),
            None => connections.push((lane, connection)),
        }
    }

    fn has(&self, lane: u32) -> bool {
        self.connections().iter().any(|&(known, _)| known == lane)
    }

    /// Closes all lanes; the first reason is the one that counts.
    fn end(&self, code: ErrorCode) {
        let mut connections = self.connections();
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert(code);
            first
        });
        for (_, connection) in connections.drain(..) {
            connection.close(code);
        }
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<(u32, Connection)>> {
        // A list of connections is whole after every statement, whoever panicked.
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sessions that nobody has asked for yet. Their lanes wait, and cost a window each at most.
const SESSIONS_WAITING_MAX: usize = 8;

/// Streams of a session that nobody has asked for yet. They stay in the lanes' windows.
const STREAMS_WAITING_MAX: usize = 16;
