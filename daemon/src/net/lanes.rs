//! The lanes of a migration: its connections, taken together.
//!
//! ```text
//!   source                                               target
//!   dial() ── lane 0: Hello ─────────────────────────►  Listener::next() ─► TargetSession
//!          ◄───────── Welcome ───────────────────────
//!          ── lane 1…: Hello, Welcome ───────────────►  joins the session of lane 0
//!          ══ lane 0, first stream: control ════════►
//!          ══ any lane, data streams ═══════════════►  DataReceiver::next()
//!          ══ one more lane, if wanted: urgent ones ═►
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

mod listener;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageferry_proto::id::{MigrationId, NodeName};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{Hello, Message, SourceMessage, TargetMessage, Welcome};
use pageferry_proto::wire::version::{Version, VersionError};
use quinn::ConnectionError;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::control::{ControlReceiver, ControlSender, Greeting, ReceiveError, SendError, greeting};
use super::endpoint::{
    Connection, DialError, Endpoint, HANDSHAKE_TIME_MAX, closed_by_peer, untrusted,
};
use super::stream::{DataSender, DataStream};
pub use listener::Listener;

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
        if self.untrusted().is_some() {
            return ErrorCode::PeerUntrusted;
        }
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

impl LanesError {
    /// Which certificate was refused, and why, if that is what went wrong.
    pub fn untrusted(&self) -> Option<String> {
        match self {
            Self::Dial { source, .. } => source.untrusted(),
            // TLS 1.3: whoever dials is done before its own certificate is judged.
            Self::Broken { peer, source, .. } => untrusted(peer, None, source),
            Self::Refused { .. } | Self::Timeout { .. } | Self::Greeting { .. } => None,
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
    dial_all(endpoint, peer, migration, (lanes, false)).await
}

/// The same, and one more lane for what is urgent.
pub async fn dial_with_urgent(
    endpoint: &Endpoint,
    peer: &NodeName,
    migration: MigrationId,
    lanes: u8,
) -> Result<SourceSession, LanesError> {
    dial_all(endpoint, peer, migration, (lanes, true)).await
}

async fn dial_all(
    endpoint: &Endpoint,
    peer: &NodeName,
    migration: MigrationId,
    (lanes, urgent): (u8, bool),
) -> Result<SourceSession, LanesError> {
    let lanes = u32::from(lanes.max(1)) + u32::from(urgent);
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
        data: {
            let last = connections.split_last().filter(|_| urgent);
            let (urgent, others) = last.unzip();
            DataSender::new(others.unwrap_or(&connections), urgent, migration)
        },
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
