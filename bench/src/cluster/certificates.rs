//! The authority of a cluster, and who it vouches for.
//!
//! It lives as long as its lab: the key is written nowhere, and certificates are good for a day.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};

/// Who a certificate speaks for.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The user, as Kubernetes understands it.
    pub name: &'a str,
    /// The group, if any.
    pub group: Option<&'a str>,
    /// Where it serves, if it does.
    pub addresses: &'a [Ipv4Addr],
    pub hosts: &'a [&'a str],
}

impl<'a> Subject<'a> {
    /// One that only asks.
    pub fn client(name: &'a str, group: Option<&'a str>) -> Self {
        Self {
            name,
            group,
            addresses: &[],
            hosts: &[],
        }
    }
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

impl Identity {
    /// Writes `NAME.pem` and `NAME.key` into a folder.
    pub fn write(&self, folder: &Path, name: &str) -> Result<()> {
        write(&folder.join(format!("{name}.pem")), &self.certificate)?;
        write(&folder.join(format!("{name}.key")), &self.key)
    }
}

/// Signs certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate: String,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate().context("making the key of the cluster's authority")?;
        let mut params = parameters("pageferry-lab", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let made = params.self_signed(&key);
        let certificate = made.context("making the cluster's authority")?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    pub fn issue(&self, subject: &Subject<'_>) -> Result<Identity> {
        let name = subject.name;
        self.try_issue(subject)
            .with_context(|| format!("making a certificate for {name}"))
    }

    fn try_issue(&self, subject: &Subject<'_>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = parameters(subject.name, subject.group);
        let address = |address: &Ipv4Addr| SanType::IpAddress(IpAddr::V4(*address));
        params.subject_alt_names = subject.addresses.iter().map(address).collect();
        for host in subject.hosts {
            let host = Ia5String::try_from(*host)?;
            params.subject_alt_names.push(SanType::DnsName(host));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        Ok(Identity {
            certificate: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// A pair of keys without a certificate, in PEM: the public one, and the private one.
pub fn key_pair() -> Result<(String, String)> {
    let key = KeyPair::generate().context("making a pair of keys")?;
    Ok((key.public_key_pem(), key.serialize_pem()))
}

fn parameters(name: &str, group: Option<&str>) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
    }
    params.not_before = (now - SKEW).into();
    params.not_after = (now + LIFE).into();
    params
}

/// What a client needs to reach the API server at `server`; the paths are those that it sees.
pub fn kubeconfig(server: &str, folder: &Path, name: &str) -> Value {
    let path = |file: String| folder.join(file).display().to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {
            "server": server, "certificate-authority": path("ca.pem".to_owned()),
        }}],
        "users": [{"name": name, "user": {
            "client-certificate": path(format!("{name}.pem")),
            "client-key": path(format!("{name}.key")),
        }}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
        "current-context": "lab",
    })
}

/// Writes a file that only root reads.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let folder = path.parent().context("a file has a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| options.open(path))
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing {}", path.display()))
}

const LIFE: Duration = Duration::from_secs(24 * 60 * 60);
const SKEW: Duration = Duration::from_secs(60 * 60);
