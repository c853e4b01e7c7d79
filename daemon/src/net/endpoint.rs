//! One node's place on the network: a socket that peers dial, and sockets that dial peers.
//!
//! Invariants:
//! - A [`Connection`] is to a node whose certificate was verified and whose name is in the
//!   configuration. On the accepting side that holds when [`Endpoint::accept`] returns it. On
//!   the dialling side TLS 1.3 is done before the other node has judged *our* certificate, so
//!   a dialler is sure only when the peer has answered something.
//! - Every dialled connection has a UDP socket of its own, and with it a task of its own that
//!   reads it: two lanes keep two processors busy.
//! - Strangers cost little: handshakes in progress and open connections are counted, and what
//!   is above the limit is refused before any cryptography.
//!
//! Absent: what is said on a connection ([`super::lanes`]), and dialling again: the source's
//! machine decides when that is worth it.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::id::NodeName;
use pageferry_proto::wire::code::ErrorCode;
use quinn::{
    ClientConfig, ConnectError, ConnectionError, ServerConfig, TokioRuntime, TransportErrorCode,
    VarInt,
};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::tls::{self, Credentials, PeerNameError, TlsError};
use super::{socket, tuning};

/// What an endpoint is made of.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Address to listen on; port 0 takes any.
    pub listen: SocketAddr,
    /// Who we are.
    pub credentials: Credentials,
    /// Who may connect, and where each is dialled.
    pub peers: BTreeMap<NodeName, SocketAddr>,
}

/// A node's listening socket and its right to dial.
#[derive(Debug)]
pub struct Endpoint {
    node: NodeName,
    listener: quinn::Endpoint,
    listen: SocketAddr,
    client: ClientConfig,
    peers: Arc<BTreeMap<NodeName, SocketAddr>>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    acceptor: JoinHandle<()>,
}

/// A connection to a node whose name is known. Closed with [`ErrorCode::PeerLost`] on drop,
/// if nobody closed it before.
#[derive(Debug)]
pub struct Connection {
    pub(super) inner: quinn::Connection,
    peer: NodeName,
    /// Counts against [`CONNECTIONS_MAX`]; none on a connection we dialled.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Why an endpoint cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is taken, not ours, or not allowed.
    #[error("cannot bind UDP {listen}")]
    Socket {
        /// The address.
        listen: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket could not be made part of the runtime.
    #[error("cannot start QUIC on {listen}")]
    Start {
        /// The address.
        listen: SocketAddr,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name is not in the configuration.
    #[error("node {0} is not among the configured peers")]
    UnknownPeer(NodeName),
    /// The name cannot be in a certificate.
    #[error("cannot ask for a certificate of {0}")]
    Name(NodeName, #[source] TlsError),
    /// No socket to dial from.
    #[error("cannot open a UDP socket on {local} to dial node {peer}")]
    Socket {
        /// The node.
        peer: NodeName,
        /// The local address.
        local: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QUIC refused to start.
    #[error("cannot dial node {peer} at {address}")]
    Connect {
        /// The node.
        peer: NodeName,
        /// Its address.
        address: SocketAddr,
        /// What quinn said.
        #[source]
        source: ConnectError,
    },
    /// The handshake failed: nobody there, a wrong certificate, another protocol.
    #[error("handshake with node {peer} at {address} failed")]
    Handshake {
        /// The node.
        peer: NodeName,
        /// Its address.
        address: SocketAddr,
        /// What quinn or the peer said.
        #[source]
        source: ConnectionError,
    },
    /// Nothing came back in time.
    #[error("node {peer} at {address} did not finish the handshake within {HANDSHAKE_TIME_MAX:?}")]
    Timeout {
        /// The node.
        peer: NodeName,
        /// Its address.
        address: SocketAddr,
    },
}

impl DialError {
    /// Which certificate was refused, and why, if that is what went wrong.
    pub fn untrusted(&self) -> Option<String> {
        match self {
            Self::Handshake {
                peer,
                address,
                source,
            } => untrusted(peer, Some(*address), source),
            Self::UnknownPeer(_)
            | Self::Name(..)
            | Self::Socket { .. }
            | Self::Connect { .. }
            | Self::Timeout { .. } => None,
        }
    }
}

/// Which certificate was refused, and why, if that ended the connection with `peer`.
pub(super) fn untrusted(
    peer: &NodeName,
    address: Option<SocketAddr>,
    error: &ConnectionError,
) -> Option<String> {
    let alert = |code: TransportErrorCode| {
        let alert = u64::from(code).checked_sub(CRYPTO_ERRORS)?;
        CERTIFICATE_ALERTS
            .iter()
            .find(|(number, _)| u64::from(*number) == alert)
            .map(|(_, meaning)| *meaning)
    };
    let peer = match address {
        Some(address) => format!("node {peer} at {address}"),
        None => format!("node {peer}"),
    };
    match error {
        ConnectionError::TransportError(error) => {
            let meaning = alert(error.code)?;
            let reason = match error.reason.as_str() {
                "" => meaning,
                reason => reason,
            };
            Some(format!(
                "the certificate of {peer} is not accepted here: {reason}"
            ))
        }
        ConnectionError::ConnectionClosed(close) => {
            let meaning = alert(close.error_code)?;
            Some(format!(
                "{peer} does not accept this node's certificate: {meaning}"
            ))
        }
        ConnectionError::VersionMismatch
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::TimedOut
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => None,
    }
}

impl Endpoint {
    /// Listens, and begins to accept. Must be called within a tokio runtime.
    pub fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        let EndpointConfig {
            listen,
            credentials,
            peers,
        } = config;
        let mut server = ServerConfig::with_crypto(credentials.server());
        server.transport_config(tuning::accepting());
        // A node's address does not change under a migration, and a stolen connection should
        // not be able to move.
        server.migration(false);
        server.max_incoming(HANDSHAKES_MAX);
        let resets = credentials.resets();
        let mut client = ClientConfig::new(credentials.client());
        client.transport_config(tuning::dialling());

        let socket = socket::bind(listen).map_err(|source| BindError::Socket { listen, source })?;
        let start = |source| BindError::Start { listen, source };
        let listener = quinn::Endpoint::new_with_abstract_socket(
            tuning::listening_endpoint(resets),
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(start)?;
        let listen = listener.local_addr().map_err(start)?;

        let peers = Arc::new(peers);
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        let acceptor = tokio::spawn(accept_all(listener.clone(), Arc::clone(&peers), sender));
        Ok(Self {
            node: credentials.node().clone(),
            listener,
            listen,
            client,
            peers,
            accepted: Mutex::new(accepted),
            acceptor,
        })
    }

    /// This node.
    pub const fn node(&self) -> &NodeName {
        &self.node
    }

    /// The address peers dial, with the port that was taken.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// The configured peers.
    pub fn peers(&self) -> impl Iterator<Item = &NodeName> {
        self.peers.keys()
    }

    /// Where a configured peer is met.
    pub fn address(&self, peer: &NodeName) -> Option<IpAddr> {
        self.peers.get(peer).map(SocketAddr::ip)
    }

    /// Connects to a configured peer, from a socket of its own.
    pub async fn dial(&self, peer: &NodeName) -> Result<Connection, DialError> {
        let address = *self
            .peers
            .get(peer)
            .ok_or_else(|| DialError::UnknownPeer(peer.clone()))?;
        tls::server_name(peer).map_err(|source| DialError::Name(peer.clone(), source))?;
        let local = tuning::dial_from(self.listen.ip(), address.ip());
        let unusable = |source| DialError::Socket {
            peer: peer.clone(),
            local,
            source,
        };
        let socket = socket::bind(local).map_err(unusable)?;
        let dialler = quinn::Endpoint::new_with_abstract_socket(
            tuning::endpoint(),
            None,
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(unusable)?;
        let connecting = dialler
            .connect_with(self.client.clone(), address, peer.as_str())
            .map_err(|source| DialError::Connect {
                peer: peer.clone(),
                address,
                source,
            })?;
        let handshake = timeout(HANDSHAKE_TIME_MAX, connecting).await;
        let connected = handshake.map_err(|_| DialError::Timeout {
            peer: peer.clone(),
            address,
        })?;
        let inner = connected.map_err(|source| DialError::Handshake {
            peer: peer.clone(),
            address,
            source,
        })?;
        Ok(Connection {
            inner,
            peer: peer.clone(),
            _permit: None,
        })
    }

    /// The next peer that connected; `None` when the endpoint is closed. May be dropped at any
    /// await without losing a connection.
    pub async fn accept(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    /// Closes the listener and every connection accepted by it, and waits until the peers
    /// were told. Dialled connections are closed by dropping them.
    pub async fn close(self) {
        self.acceptor.abort();
        let code = ErrorCode::Restarted;
        self.listener
            .close(close_code(code), code.name().as_bytes());
        // Bounded by QUIC's own draining period, three probe timeouts.
        self.listener.wait_idle().await;
    }
}

impl Connection {
    /// The node at the other end, as its certificate says.
    pub fn peer(&self) -> &NodeName {
        &self.peer
    }

    /// Ends the connection; the peer sees the code. What was not yet delivered is lost.
    pub fn close(&self, code: ErrorCode) {
        self.inner.close(close_code(code), code.name().as_bytes());
    }

    /// Waits until the connection has ended, for whatever reason.
    pub async fn closed(&self) -> ConnectionError {
        self.inner.closed().await
    }

    /// The smoothed round trip of the path.
    pub fn rtt(&self) -> Duration {
        self.inner.rtt()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Without effect if it is closed already.
        self.close(ErrorCode::PeerLost);
    }
}

/// A code as QUIC carries it, in a close, a reset or a stop.
pub(super) fn close_code(code: ErrorCode) -> VarInt {
    VarInt::from_u32(code.wire())
}

/// Why the other side closed the connection, if it was its program that did.
pub(super) fn closed_by_peer(error: &ConnectionError) -> Option<ErrorCode> {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let value = u32::try_from(close.error_code.into_inner()).ok()?;
            ErrorCode::from_wire(value)
        }
        ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::TimedOut
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => None,
    }
}

/// Takes what dials us, and hands on what may.
async fn accept_all(
    listener: quinn::Endpoint,
    peers: Arc<BTreeMap<NodeName, SocketAddr>>,
    accepted: mpsc::Sender<Connection>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(incoming) = listener.accept().await {
        let from = incoming.remote_address();
        let Ok(handshake) = Arc::clone(&handshakes).try_acquire_owned() else {
            tracing::debug!(%from, "refused: too many handshakes in progress");
            incoming.refuse();
            continue;
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::debug!(%from, "refused: too many connections");
            incoming.refuse();
            continue;
        };
        let peers = Arc::clone(&peers);
        let accepted = accepted.clone();
        tokio::spawn(async move {
            match admit(incoming, &peers, permit).await {
                // Fails only while we are closing.
                Ok(connection) => drop(accepted.send(connection).await),
                Err(error) => report_refusal(from, &error),
            }
            drop(handshake);
        });
    }
}

/// Why somebody who dialled us was turned away.
#[derive(Debug, thiserror::Error)]
enum AdmitError {
    #[error("handshake did not finish within {HANDSHAKE_TIME_MAX:?}")]
    Timeout,
    #[error("handshake failed")]
    Handshake(#[source] ConnectionError),
    #[error("certificate names no node")]
    Name(#[source] PeerNameError),
    #[error("node {0} is not among the configured peers")]
    NotAllowed(NodeName),
}

async fn admit(
    incoming: quinn::Incoming,
    peers: &BTreeMap<NodeName, SocketAddr>,
    permit: OwnedSemaphorePermit,
) -> Result<Connection, AdmitError> {
    let inner = timeout(HANDSHAKE_TIME_MAX, incoming)
        .await
        .map_err(|_| AdmitError::Timeout)?
        .map_err(AdmitError::Handshake)?;
    let refuse = || {
        let code = ErrorCode::PeerUnknown;
        inner.close(close_code(code), code.name().as_bytes());
    };
    let peer = tls::peer_name(&inner).map_err(|error| {
        refuse();
        AdmitError::Name(error)
    })?;
    if !peers.contains_key(&peer) {
        refuse();
        return Err(AdmitError::NotAllowed(peer));
    }
    Ok(Connection {
        inner,
        peer,
        _permit: Some(permit),
    })
}

/// A stranger is not worth a warning, or anybody could fill the log; somebody with one of our
/// certificates is.
fn report_refusal(from: SocketAddr, error: &AdmitError) {
    match error {
        AdmitError::Timeout => tracing::debug!(%from, "refused a connection: {error}"),
        AdmitError::Handshake(source) => {
            tracing::debug!(%from, "refused a connection: {error}: {source}");
        }
        AdmitError::Name(source) => tracing::warn!(%from, "refused a connection: {source}"),
        AdmitError::NotAllowed(_) => tracing::warn!(%from, "refused a connection: {error}"),
    }
}

/// What QUIC adds to the number of a TLS alert (RFC 9001, section 4.8).
const CRYPTO_ERRORS: u64 = 0x100;

/// The alerts of TLS about certificates (RFC 8446, section 6.2), as people call them.
const CERTIFICATE_ALERTS: [(u8, &str); 8] = [
    (42, "it is not for this name, or not one (bad certificate)"),
    (43, "it is of a kind that is not supported"),
    (44, "it is revoked"),
    (45, "it is expired, or not valid yet"),
    (46, "it is not acceptable (certificate unknown)"),
    (48, "it is of another authority (unknown CA)"),
    (49, "it gives no access"),
    (116, "none was shown"),
];

/// Longest handshake, either way. On a healthy path it takes two round trips and a millisecond.
pub(super) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);

/// Handshakes in progress. Each costs a signature, about 0.1 ms, and some kilobytes.
const HANDSHAKES_MAX: usize = 32;

/// Accepted connections open at once: eight incoming migrations with four lanes, dialled twice.
const CONNECTIONS_MAX: usize = 64;

/// Admitted connections that nobody has asked for yet.
const ACCEPTED_MAX: usize = 16;
