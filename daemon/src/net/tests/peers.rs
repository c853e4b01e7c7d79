//! Who may connect.

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, TransportErrorCode};

use super::*;
use crate::net::endpoint::untrusted;

#[tokio::test]
async fn a_peer_is_known_by_its_certificate() {
    let cluster = Cluster::new();
    let (source, target, ..) = cluster.session(1).await;
    assert_eq!(target.peer, node("a"));
    assert_eq!(source.lanes.peer(), &node("b"));
    assert_eq!(target.migration, MIGRATION);
}

#[tokio::test]
async fn a_node_of_another_authority_is_refused_by_the_dialler() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let target = theirs.endpoint("b", &[("a", ANY_PORT.parse().unwrap())]);
    let source = ours.endpoint("a", &[("b", target.listen())]);
    let error = within(source.dial(&node("b"))).await.unwrap_err();
    let DialError::Handshake { source: error, .. } = error else {
        panic!("{error}");
    };
    assert!(is_alert(&error, UNKNOWN_CA), "{error}");
    let dialled = within(lanes::dial(&source, &node("b"), MIGRATION, 1)).await;
    let error = dialled.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PeerUntrusted, "{error}");
    let text = error.untrusted().unwrap();
    assert!(text.contains("the certificate of node b at"), "{text}");
}

#[tokio::test]
async fn a_dialler_of_another_authority_is_refused_by_the_target() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    // The dialler trusts our authority, and shows a certificate of theirs.
    let stranger = theirs.credentials("a");
    let stranger_files = TlsFiles {
        authority: ours.folder.path().join("ca.pem"),
        certificate: theirs.folder.path().join("a/node.pem"),
        key: theirs.folder.path().join("a/node.key"),
    };
    assert_eq!(stranger.node(), &node("a"));
    // It would be told so at its own start…
    let refused = Credentials::load(&stranger_files, &node("a"));
    assert!(refused.is_err());
    // …so it does not ask.
    let target = Arc::new(ours.endpoint("b", &[("a", ANY_PORT.parse().unwrap())]));
    let _listener = Listener::start(Arc::clone(&target));
    let client = unchecked_client(&stranger_files, &[ALPN]);
    let dialler = quinn::Endpoint::client(ANY_PORT.parse().unwrap()).unwrap();
    let error = match within(dialler.connect_with(client, target.listen(), "b").unwrap()).await {
        // TLS 1.3: the client is done before the server has judged it.
        Ok(connection) => within(connection.closed()).await,
        Err(error) => error,
    };
    assert!(is_alert(&error, UNKNOWN_CA), "{error}");
    let text = untrusted(&node("b"), None, &error).unwrap();
    assert!(
        text.starts_with("node b does not accept this node's certificate"),
        "{text}"
    );
    assert!(text.contains("another authority"), "{text}");
}

#[tokio::test]
async fn a_node_that_is_not_the_one_that_was_dialled_is_refused() {
    let cluster = Cluster::new();
    let target = cluster.endpoint("c", &[("a", ANY_PORT.parse().unwrap())]);
    let source = cluster.endpoint("a", &[("b", target.listen())]);
    let error = within(source.dial(&node("b"))).await.unwrap_err();
    let DialError::Handshake { source: error, .. } = error else {
        panic!("{error}");
    };
    assert!(is_alert(&error, BAD_CERTIFICATE), "{error}");
    let dialled = within(lanes::dial(&source, &node("b"), MIGRATION, 1)).await;
    assert_eq!(dialled.unwrap_err().code(), ErrorCode::PeerUntrusted);
}

#[tokio::test]
async fn a_node_that_is_not_a_configured_peer_is_refused_with_a_code() {
    let cluster = Cluster::new();
    let target = Arc::new(cluster.endpoint("b", &[("a", ANY_PORT.parse().unwrap())]));
    let _listener = Listener::start(Arc::clone(&target));
    let stranger = cluster.endpoint("c", &[("b", target.listen())]);
    let peer = node("b");
    let dialled = lanes::dial(&stranger, &peer, MIGRATION, 1);
    let error = within(dialled).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PeerUnknown, "{error}");
    assert!(
        matches!(error, LanesError::Refused { lane: 0, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_node_that_is_not_configured_is_not_dialled() {
    let cluster = Cluster::new();
    let source = cluster.endpoint("a", &[]);
    let error = within(source.dial(&node("b"))).await.unwrap_err();
    assert!(matches!(error, DialError::UnknownPeer(_)), "{error}");
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let cluster = Cluster::new();
    let target = Arc::new(cluster.endpoint("b", &[("a", ANY_PORT.parse().unwrap())]));
    let _listener = Listener::start(Arc::clone(&target));
    cluster.credentials("a");
    let files = TlsFiles {
        authority: cluster.folder.path().join("a/ca.pem"),
        certificate: cluster.folder.path().join("a/node.pem"),
        key: cluster.folder.path().join("a/node.key"),
    };
    let client = unchecked_client(&files, &[b"pageferry/0"]);
    let dialler = quinn::Endpoint::client(ANY_PORT.parse().unwrap()).unwrap();
    let connecting = dialler.connect_with(client, target.listen(), "b").unwrap();
    let error = within(connecting).await.unwrap_err();
    assert!(is_alert(&error, NO_APPLICATION_PROTOCOL), "{error}");
    // That is no matter of trust.
    assert_eq!(untrusted(&node("b"), None, &error), None);
}

#[tokio::test]
async fn a_dialler_that_greets_too_late_is_dropped() {
    let cluster = Cluster::new();
    let (source, _listener) = cluster.pair();
    let connection = within(source.dial(&node("b"))).await.unwrap();
    let reason = within(connection.closed()).await;
    assert_eq!(
        super::super::endpoint::closed_by_peer(&reason),
        Some(ErrorCode::Timeout)
    );
}

/// A client that is sure of itself, whatever the files say.
fn unchecked_client(files: &TlsFiles, protocols: &[&[u8]]) -> quinn::ClientConfig {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&files.authority).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(&files.certificate).unwrap()],
            PrivateKeyDer::from_pem_file(&files.key).unwrap(),
        )
        .unwrap();
    tls.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

fn is_alert(error: &ConnectionError, alert: u8) -> bool {
    let code = TransportErrorCode::crypto(alert);
    match error {
        ConnectionError::TransportError(error) => error.code == code,
        ConnectionError::ConnectionClosed(close) => close.error_code == code,
        _ => false,
    }
}

const ALPN: &[u8] = pageferry_proto::wire::version::ALPN;

// RFC 8446, section 6.
const BAD_CERTIFICATE: u8 = 42;
const UNKNOWN_CA: u8 = 48;
const NO_APPLICATION_PROTOCOL: u8 = 120;
