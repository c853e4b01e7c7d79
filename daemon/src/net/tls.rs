//! Who a node is, and how it proves it: TLS 1.3 with certificates on both sides.
//!
//! Every node holds three files: the certificate of the cluster's own authority, a certificate
//! issued by it whose one DNS name is the node's name, and the key to it. `pageferry ca` makes
//! them; any other authority that issues the same shape will do.
//!
//! Invariants:
//! - A node that starts has a certificate that its peers will accept: [`Credentials::load`]
//!   verifies its own certificate the way a peer would, for both roles, so that a wrong or
//!   expired file is an error at start and not a failed migration.
//! - The name of a peer comes from its verified certificate, never from what it says.
//! - A session is never resumed: a handshake costs about a millisecond once per lane, and a
//!   ticket would outlive the certificate that earned it.
//!
//! Absent: revocation. Certificates live for a year; a node that must be shut out sooner is
//! removed from its peers' configuration, which is checked after every handshake.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::ring::hmac;
use pageferry_proto::id::NodeName;
use pageferry_proto::wire::version::ALPN;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CipherSuite, RootCertStore};

/// Where a node keeps its part of the cluster's trust. All three are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate of the authority that every peer's certificate must come from.
    pub authority: PathBuf,
    /// The node's certificate, followed by intermediates if there are any.
    pub certificate: PathBuf,
    /// The key to it, readable by its owner (and, at most, its group).
    pub key: PathBuf,
}

/// What a node proves itself with, and what it accepts from others. Cheap to clone.
#[derive(Clone)]
pub struct Credentials {
    node: NodeName,
    server: Arc<QuicServerConfig>,
    client: Arc<QuicClientConfig>,
    reset_seed: [u8; 32],
}

/// Why a node cannot prove itself.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file is not PEM, or holds nothing of the kind that is needed.
    #[error("{} holds no usable PEM {wanted}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for in it.
        wanted: &'static str,
        /// What the parser said.
        #[source]
        source: pem::Error,
    },
    /// The key can be read by everybody on this machine.
    #[error("{} is readable by everybody (mode {mode:04o}): chmod 600 it", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The authority's certificate cannot be one.
    #[error("{} is not the certificate of an authority", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What rustls said.
        #[source]
        source: rustls::Error,
    },
    /// Our own certificate would be refused by every peer.
    #[error("{} would be refused by the peers of node {node}", path.display())]
    Refused {
        /// The certificate file.
        path: PathBuf,
        /// The name it must be good for.
        node: NodeName,
        /// Why: wrong name, wrong authority, expired…
        #[source]
        source: rustls::Error,
    },
    /// The certificate and the key do not belong together.
    #[error("{} is not the key to {}", key.display(), certificate.display())]
    Key {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
        /// What rustls said.
        #[source]
        source: rustls::Error,
    },
    /// A node name that is legal here cannot be a name in a certificate.
    #[error("node name {node} cannot be a DNS name in a certificate")]
    Name {
        /// The name.
        node: NodeName,
        /// What the parser said.
        #[source]
        source: InvalidDnsNameError,
    },
    /// The provider and the versions we ask for do not fit together, or QUIC misses a suite.
    #[error("the TLS library refuses TLS 1.3 with its own ring provider")]
    Provider(#[source] rustls::Error),
}

/// Why a verified certificate does not name a node.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerNameError {
    /// The connection carries no certificate; cannot happen with our verifiers.
    #[error("the peer showed no certificate")]
    Missing,
    /// The certificate holds more or less than one DNS name.
    #[error("the peer's certificate holds {0} DNS names instead of one")]
    Count(usize),
    /// The one DNS name is not a node's.
    #[error("the peer's certificate is for {0:?}, which is no node name")]
    Form(String),
}

/// What a listening endpoint makes its reset tokens and connection ids of.
pub(super) struct Resets {
    pub(super) tokens: Arc<hmac::Key>,
    pub(super) connection_ids: u64,
}

impl Credentials {
    /// Reads the files, and makes sure that peers will accept what is in them.
    pub fn load(files: &TlsFiles, node: &NodeName) -> Result<Self, TlsError> {
        let provider = Arc::new(provider());
        let roots = Arc::new(read_authority(&files.authority)?);
        let chain = read_chain(&files.certificate)?;
        let key = read_key(&files.key)?;
        let verifiers = Verifiers::new(&roots, &provider, &files.authority)?;
        verifiers.check_own(&chain, node, &files.certificate, Duration::ZERO)?;
        if verifiers
            .check_own(&chain, node, &files.certificate, EXPIRY_NOTICE)
            .is_err()
        {
            tracing::warn!(
                certificate = %files.certificate.display(),
                "this node's certificate or its authority's expires within 30 days"
            );
        }
        // One way: neither tokens nor connection ids say anything about the key.
        let mut reset_seed = [0; 32];
        let label = hmac::Key::new(hmac::HMAC_SHA256, b"pageferry stateless resets");
        reset_seed.copy_from_slice(hmac::sign(&label, key.secret_der()).as_ref());
        let mismatch = |source| TlsError::Key {
            key: files.key.clone(),
            certificate: files.certificate.clone(),
            source,
        };

        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Provider)?
            .with_client_cert_verifier(verifiers.of_clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(mismatch)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;

        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Provider)?
            .with_webpki_verifier(verifiers.of_servers)
            .with_client_auth_cert(chain, key)
            .map_err(mismatch)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();

        let no_suite = |_| TlsError::Provider(rustls::Error::General("no QUIC suite".to_owned()));
        Ok(Self {
            node: node.clone(),
            server: Arc::new(QuicServerConfig::try_from(server).map_err(no_suite)?),
            client: Arc::new(QuicClientConfig::try_from(client).map_err(no_suite)?),
            reset_seed,
        })
    }

    /// The node these credentials are of.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// What a listening endpoint shows and asks for.
    pub(super) fn server(&self) -> Arc<QuicServerConfig> {
        Arc::clone(&self.server)
    }

    /// Secrets that are the same after a restart: a listener that was restarted tells peers at once
    /// that it does not know their connections (RFC 9000 section 10.3), instead of letting them
    /// wait for the idle timeout with a workload in the freezer.
    pub(super) fn resets(&self) -> Resets {
        Resets {
            tokens: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.reset_seed[..16])),
            connection_ids: u64::from_le_bytes(
                *self.reset_seed[16..]
                    .first_chunk()
                    .expect("a digest has 32 bytes"),
            ),
        }
    }

    /// What a dialling endpoint shows and asks for.
    pub(super) fn client(&self) -> Arc<QuicClientConfig> {
        Arc::clone(&self.client)
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// The node at the other end, from the certificate that the handshake verified.
///
/// A certificate with several names is refused: which of them is meant would be a guess.
pub(super) fn peer_name(connection: &quinn::Connection) -> Result<NodeName, PeerNameError> {
    let identity = connection.peer_identity().ok_or(PeerNameError::Missing)?;
    let chain = identity
        .downcast::<Vec<CertificateDer<'static>>>()
        .map_err(|_| PeerNameError::Missing)?;
    certificate_name(chain.first().ok_or(PeerNameError::Missing)?)
}

fn certificate_name(certificate: &CertificateDer<'_>) -> Result<NodeName, PeerNameError> {
    // It was parsed by the verifier before, by the same library.
    let parsed =
        webpki::EndEntityCert::try_from(certificate).map_err(|_| PeerNameError::Missing)?;
    let names: Vec<&str> = parsed.valid_dns_names().collect();
    match names.as_slice() {
        [name] => name
            .parse()
            .map_err(|_| PeerNameError::Form((*name).to_owned())),
        other => Err(PeerNameError::Count(other.len())),
    }
}

/// The name a certificate must carry for this node.
pub(super) fn server_name(node: &NodeName) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(node.as_str().to_owned()).map_err(|source| TlsError::Name {
        node: node.clone(),
        source,
    })
}

struct Verifiers {
    of_clients: Arc<dyn ClientCertVerifier>,
    of_servers: Arc<WebPkiServerVerifier>,
}

impl Verifiers {
    fn new(
        roots: &Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
        path: &Path,
    ) -> Result<Self, TlsError> {
        let refuse = |source: rustls::server::VerifierBuilderError| TlsError::Authority {
            path: path.to_owned(),
            source: rustls::Error::General(source.to_string()),
        };
        let roots = || Arc::clone(roots);
        let provider = || Arc::clone(provider);
        Ok(Self {
            of_clients: WebPkiClientVerifier::builder_with_provider(roots(), provider())
                .build()
                .map_err(refuse)?,
            of_servers: WebPkiServerVerifier::builder_with_provider(roots(), provider())
                .build()
                .map_err(refuse)?,
        })
    }

    /// Verifies our own certificate as a peer would in `ahead` from now.
    fn check_own(
        &self,
        chain: &[CertificateDer<'_>],
        node: &NodeName,
        path: &Path,
        ahead: Duration,
    ) -> Result<(), TlsError> {
        let refuse = |source| TlsError::Refused {
            path: path.to_owned(),
            node: node.clone(),
            source,
        };
        let Some((own, intermediates)) = chain.split_first() else {
            return Err(refuse(rustls::Error::NoCertificatesPresented));
        };
        let then = UnixTime::since_unix_epoch(Duration::from_secs(
            UnixTime::now().as_secs().saturating_add(ahead.as_secs()),
        ));
        let name = server_name(node)?;
        self.of_servers
            .verify_server_cert(own, intermediates, &name, &[], then)
            .map_err(refuse)?;
        self.of_clients
            .verify_client_cert(own, intermediates, then)
            .map_err(refuse)?;
        Ok(())
    }
}

/// Ring, with AES-128-GCM first: the lanes are bound by the processor, and on a machine with
/// AES instructions the 128-bit key costs a tenth less time per byte than the 256-bit one.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    let preferred = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != preferred);
    provider
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_authority(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_chain(path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority {
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(roots)
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refuse = |source| TlsError::Pem {
        path: path.to_owned(),
        wanted: "certificate",
        source,
    };
    let bytes = read(path)?;
    let chain = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(refuse)?;
    if chain.is_empty() {
        return Err(refuse(pem::Error::NoItemsFound));
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    let metadata = std::fs::metadata(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o7777;
    // The group may read it: that is how secrets are mounted into containers.
    if mode & 0o007 != 0 {
        return Err(TlsError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|source| TlsError::Pem {
        path: path.to_owned(),
        wanted: "private key",
        source,
    })
}

/// How long before its end a certificate is reported at start.
const EXPIRY_NOTICE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
