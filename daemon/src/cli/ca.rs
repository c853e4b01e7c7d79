//! `pageferry ca`: a small authority for one cluster.
//!
//! ```text
//!   DIR/ca.pem, DIR/ca.key                     the authority; the key stays where it is
//!   DIR/NODE/{ca.pem, node.pem, node.key}      what goes to /etc/pageferry of that node
//! ```
//!
//! A certificate carries one DNS name, the node's, and is good for dialling and for being
//! dialled. Keys are ECDSA P-256 and readable by their owner only.
//!
//! Absent: revocation and renewal by itself. A certificate is renewed by issuing it again.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use pageferry_proto::id::NodeName;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{DnsName, InvalidDnsNameError};

/// The files of one certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Certificate of the authority.
    pub authority: PathBuf,
    /// The certificate that was made; the same file if it is the authority's own.
    pub certificate: PathBuf,
    /// The key to it.
    pub key: PathBuf,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file is there already.
    #[error("{} exists already: give --force to replace it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A folder cannot be made.
    #[error("cannot create folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The authority's files cannot be read.
    #[error("cannot read {}: run `pageferry ca init` first, or give its --dir", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The authority's files are not what `ca init` makes.
    #[error("{} is not an authority's", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What rcgen said.
        #[source]
        source: rcgen::Error,
    },
    /// The node's name cannot be in a certificate.
    #[error("node name {node} cannot be a DNS name in a certificate")]
    Name {
        /// The name.
        node: NodeName,
        /// Why.
        #[source]
        source: InvalidDnsNameError,
    },
    /// The certificate could not be made.
    #[error("cannot make a certificate for {subject}")]
    Make {
        /// Whose it was to be.
        subject: String,
        /// What rcgen said.
        #[source]
        source: rcgen::Error,
    },
}

/// Makes an authority in a folder, which is created if needed.
pub fn init(folder: &Path, force: bool) -> Result<Issued, CaError> {
    let certificate = folder.join(AUTHORITY_CERTIFICATE);
    let key = folder.join(AUTHORITY_KEY);
    refuse_to_overwrite(&[&certificate, &key], force)?;
    make_folder(folder)?;

    let refuse = |source| CaError::Make {
        subject: "the authority".to_owned(),
        source,
    };
    let pair = KeyPair::generate().map_err(refuse)?;
    let mut params = valid_for(AUTHORITY_LIFE);
    // Two authorities must not have one name: a certificate of the other would then be refused
    // for a wrong signature, which sends people looking for the wrong mistake.
    let name = authority_name(&params.key_identifier(&pair));
    params.distinguished_name.push(DnType::CommonName, name);
    // It signs nodes, and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let made = params.self_signed(&pair).map_err(refuse)?;

    write(&key, &pair.serialize_pem(), KEY_MODE)?;
    write(&certificate, &made.pem(), CERTIFICATE_MODE)?;
    Ok(Issued {
        authority: certificate.clone(),
        certificate,
        key,
    })
}

/// Makes a node's certificate with the authority in a folder, into a folder of its own there.
pub fn issue(folder: &Path, node: &NodeName, force: bool) -> Result<Issued, CaError> {
    let refuse_name = |source| CaError::Name {
        node: node.clone(),
        source,
    };
    DnsName::try_from(node.as_str()).map_err(refuse_name)?;
    let authority_path = folder.join(AUTHORITY_CERTIFICATE);
    let authority_pem = read(&authority_path)?;
    let issuer = issuer(folder, &authority_path, &authority_pem)?;

    let own = folder.join(node.as_str());
    let issued = Issued {
        authority: own.join(AUTHORITY_CERTIFICATE),
        certificate: own.join("node.pem"),
        key: own.join("node.key"),
    };
    refuse_to_overwrite(&[&issued.certificate, &issued.key], force)?;
    make_folder(&own)?;

    let refuse = |source| CaError::Make {
        subject: format!("node {node}"),
        source,
    };
    let pair = KeyPair::generate().map_err(refuse)?;
    let mut params = valid_for(NODE_LIFE);
    params
        .distinguished_name
        .push(DnType::CommonName, node.as_str());
    let name = Ia5String::try_from(node.as_str()).map_err(refuse)?;
    params.subject_alt_names = vec![SanType::DnsName(name)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let made = params.signed_by(&pair, &issuer).map_err(refuse)?;

    write(&issued.key, &pair.serialize_pem(), KEY_MODE)?;
    write(&issued.certificate, &made.pem(), CERTIFICATE_MODE)?;
    write(&issued.authority, &authority_pem, CERTIFICATE_MODE)?;
    Ok(issued)
}

fn issuer(
    folder: &Path,
    certificate_path: &Path,
    certificate: &str,
) -> Result<Issuer<'static, KeyPair>, CaError> {
    let key_path = folder.join(AUTHORITY_KEY);
    let refuse = |path: &Path, source| CaError::Authority {
        path: path.to_owned(),
        source,
    };
    let key = KeyPair::from_pem(&read(&key_path)?).map_err(|source| refuse(&key_path, source))?;
    Issuer::from_ca_cert_pem(certificate, key).map_err(|source| refuse(certificate_path, source))
}

fn authority_name(key: &[u8]) -> String {
    let short: String = key
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("pageferry authority {short}")
}

/// A certificate that is valid from a little before now, for clocks that are not the same.
fn valid_for(life: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + life).into();
    params
}

fn refuse_to_overwrite(paths: &[&Path], force: bool) -> Result<(), CaError> {
    match paths.iter().find(|path| !force && path.exists()) {
        None => Ok(()),
        Some(path) => Err(CaError::Exists {
            path: path.to_path_buf(),
        }),
    }
}

fn make_folder(path: &Path) -> Result<(), CaError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| CaError::Folder {
            path: path.to_owned(),
            source,
        })
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(|source| CaError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that has its mode from its first moment, and replaces an older one at once.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let refuse = |source| CaError::Write {
        path: path.to_owned(),
        source,
    };
    let temporary = path.with_extension("temporary");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refuse(error)),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .map_err(refuse)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(refuse)
}

const AUTHORITY_CERTIFICATE: &str = "ca.pem";
const AUTHORITY_KEY: &str = "ca.key";

const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long an authority lives: ten years.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * DAY.as_secs());

/// How long a node's certificate lives: one year.
const NODE_LIFE: Duration = Duration::from_secs(365 * DAY.as_secs());

/// How far a node's clock may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::net::tls::{Credentials, TlsError, TlsFiles};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn files(issued: Issued) -> TlsFiles {
        TlsFiles {
            authority: issued.authority,
            certificate: issued.certificate,
            key: issued.key,
        }
    }

    #[test]
    fn what_is_issued_is_accepted_for_its_node_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let authority = init(&folder.path().join("ca"), false).unwrap();
        assert_eq!(
            (mode(&authority.key), mode(&authority.certificate)),
            (0o600, 0o644)
        );
        let a: NodeName = "a".parse().unwrap();
        let issued = issue(&folder.path().join("ca"), &a, false).unwrap();
        assert_eq!(
            (mode(&issued.key), mode(&issued.certificate)),
            (0o600, 0o644)
        );
        let files = files(issued);
        Credentials::load(&files, &a).unwrap();
        let error = Credentials::load(&files, &"b".parse().unwrap()).unwrap_err();
        assert!(matches!(error, TlsError::Refused { .. }), "{error}");
    }

    #[test]
    fn nothing_is_overwritten_without_force() {
        let folder = tempfile::tempdir().unwrap();
        let a: NodeName = "a".parse().unwrap();
        let first = init(folder.path(), false).unwrap();
        let key = fs::read(&first.key).unwrap();
        let again = init(folder.path(), false).unwrap_err();
        assert!(matches!(again, CaError::Exists { .. }), "{again}");
        assert_eq!(fs::read(&first.key).unwrap(), key);

        issue(folder.path(), &a, false).unwrap();
        let again = issue(folder.path(), &a, false).unwrap_err();
        assert!(matches!(again, CaError::Exists { .. }), "{again}");
        let renewed = issue(folder.path(), &a, true).unwrap();
        Credentials::load(&files(renewed), &a).unwrap();
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_at_start() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        init(folder.path(), false).unwrap();
        let mut mixed = files(issue(folder.path(), &a, false).unwrap());
        mixed.key = issue(folder.path(), &b, false).unwrap().key;
        let error = Credentials::load(&mixed, &a).unwrap_err();
        assert!(matches!(error, TlsError::Key { .. }), "{error}");
    }

    #[test]
    fn a_key_that_everybody_can_read_is_refused_at_start() {
        let folder = tempfile::tempdir().unwrap();
        let a: NodeName = "a".parse().unwrap();
        init(folder.path(), false).unwrap();
        let files = files(issue(folder.path(), &a, false).unwrap());
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Credentials::load(&files, &a).unwrap_err();
        assert!(matches!(error, TlsError::Exposed { .. }), "{error}");
    }

    #[test]
    fn a_name_that_dns_does_not_have_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        init(folder.path(), false).unwrap();
        let error = issue(folder.path(), &"1-".parse().unwrap(), false).unwrap_err();
        assert!(matches!(error, CaError::Name { .. }), "{error}");
    }

    #[test]
    fn issuing_without_an_authority_says_how_to_make_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = issue(folder.path(), &"a".parse().unwrap(), false).unwrap_err();
        assert!(error.to_string().contains("pageferry ca init"), "{error}");
    }
}
