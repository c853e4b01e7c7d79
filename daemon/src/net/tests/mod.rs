//! Two endpoints on the loopback device: what peers may do to each other, and what they may not.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry_proto::id::{Generation, MigrationId, NodeName};
use pageferry_proto::wire::code::ErrorCode;
use tempfile::TempDir;
use tokio::time::timeout;

use super::endpoint::{Connection, DialError, Endpoint, EndpointConfig};
use super::lanes::{self, LanesError, Listener, SourceSession, TargetSession};
use super::tls::{Credentials, TlsFiles};
use crate::cli::ca;

mod peers;
mod sessions;
mod streams;

/// An authority of its own, and the nodes it vouches for.
pub(crate) struct Cluster {
    folder: TempDir,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        ca::init(folder.path(), false).unwrap();
        Self { folder }
    }

    fn credentials(&self, name: &str) -> Credentials {
        Credentials::load(&self.issue(name), &node(name)).unwrap()
    }

    fn issue(&self, name: &str) -> TlsFiles {
        let issued = ca::issue(self.folder.path(), &node(name), true).unwrap();
        TlsFiles {
            authority: issued.authority,
            certificate: issued.certificate,
            key: issued.key,
        }
    }

    /// An endpoint on a port of its own.
    fn endpoint(&self, name: &str, peers: &[(&str, SocketAddr)]) -> Endpoint {
        let peers: BTreeMap<_, _> = peers
            .iter()
            .map(|&(name, address)| (node(name), address))
            .collect();
        Endpoint::bind(EndpointConfig {
            listen: ANY_PORT.parse().unwrap(),
            credentials: self.credentials(name),
            peers,
        })
        .unwrap()
    }

    /// A source `a` and a target `b` that know each other.
    fn pair(&self) -> (Endpoint, Listener) {
        let nowhere = ANY_PORT.parse().unwrap();
        let target = Arc::new(self.endpoint("b", &[("a", nowhere)]));
        let source = self.endpoint("a", &[("b", target.listen())]);
        (source, Listener::start(target))
    }

    /// Both ends of a session.
    pub(crate) async fn session(
        &self,
        lanes: u8,
    ) -> (SourceSession, TargetSession, Endpoint, Listener) {
        let (source, mut listener) = self.pair();
        let peer = node("b");
        let dialled = lanes::dial(&source, &peer, MIGRATION, lanes);
        let (dialled, accepted) = within(async { tokio::join!(dialled, listener.next()) }).await;
        (dialled.unwrap(), accepted.unwrap(), source, listener)
    }
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

/// What should happen soon, and is a failure if it does not happen at all.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    timeout(DEADLINE, future).await.expect("nothing happened")
}

const ANY_PORT: &str = "127.0.0.1:0";
const MIGRATION: MigrationId = MigrationId::new([0x5a; 16]);

/// Above every limit in this module; reached only by a test that fails.
const DEADLINE: Duration = Duration::from_secs(60);
