//! The certificates by which the API server knows the webhook: made here, kept in a Secret, and
//! renewed in time.
//!
//! Whoever comes first makes them, all others read them. What the API server trusts is written
//! into the webhook's configuration: the new authority and, until it runs out, the one before it,
//! so that it does not matter who hears of a new one first. The authority's key is kept nowhere.
//! A Secret that a person has put there is used, and not renewed.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::ServerConfig;
use rustls::crypto::ring::{default_provider, sign::any_supported_type};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde_json::json;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::names::manager;

/// The certificate that is shown, as it is now.
#[derive(Debug, Default)]
pub struct Certificates {
    shown: RwLock<Option<Arc<CertifiedKey>>>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let shown = self.shown.read();
        shown.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Certificates {
    /// What a server speaks by. Until there is a certificate nobody gets past the handshake.
    ///
    /// # Errors
    /// If this build has no TLS.
    pub fn server(self: &Arc<Self>) -> Result<Arc<ServerConfig>> {
        let provider = Arc::new(default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choosing the versions of TLS")?;
        let resolver: Arc<dyn ResolvesServerCert> = Arc::<Self>::clone(self);
        let mut config = config.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn show(&self, kept: &Kept) -> Result<()> {
        let chain = CertificateDer::pem_slice_iter(&kept.certificate);
        let chain = chain.collect::<Result<Vec<_>, _>>().context("tls.crt")?;
        ensure!(!chain.is_empty(), "tls.crt has no certificate");
        let key = PrivateKeyDer::from_pem_slice(&kept.key).context("tls.key")?;
        let key = any_supported_type(&key).context("tls.key")?;
        let shown = Arc::new(CertifiedKey::new(chain, key));
        let mut place = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        *place = Some(shown);
        Ok(())
    }
}

/// Keeps them right, for ever. `namespace` is that of the webhook's Service.
pub async fn keep(client: Client, namespace: String, certificates: Arc<Certificates>) {
    let mut last = None;
    loop {
        let wait = match look(&client, &namespace, &certificates, &mut last).await {
            Ok(()) => EVERY,
            Err(error) => {
                warn!("the certificates of the webhook: {error:#}");
                RETRY
            }
        };
        sleep(wait).await;
    }
}

async fn look(
    client: &Client,
    namespace: &str,
    certificates: &Certificates,
    last: &mut Option<Kept>,
) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = secrets.get_opt(NAME).await;
    let found = found.with_context(|| format!("reading the Secret {NAME}"))?;
    let kept = match &found {
        Some(secret) if !is_due(secret, now()) => Kept::read(secret)?,
        _ => renew(&secrets, namespace, found.as_ref()).await?,
    };
    if last.as_ref() != Some(&kept) {
        certificates.show(&kept)?;
        *last = Some(kept.clone());
    }
    announce(client, &kept).await
}

/// Makes new ones. Who was beaten to it reads them the next time.
async fn renew(secrets: &Api<Secret>, namespace: &str, old: Option<&Secret>) -> Result<Kept> {
    let before = old.and_then(|old| Kept::read(old).ok());
    let kept = make(namespace, before.as_ref())?;
    let end = now().saturating_add(i64::try_from(LIFE.as_secs()).unwrap_or(i64::MAX));
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            annotations: Some(BTreeMap::from([(ENDS.to_owned(), end.to_string())])),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/part-of".to_owned(),
                "pageferry".to_owned(),
            )])),
            resource_version: old.and_then(ResourceExt::resource_version),
            ..ObjectMeta::default()
        },
        data: Some(kept.data()),
        type_: Some("kubernetes.io/tls".to_owned()),
        ..Secret::default()
    };
    let parameters = PostParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    let written = match old {
        None => secrets.create(&parameters, &secret).await,
        Some(_) => secrets.replace(NAME, &parameters, &secret).await,
    };
    written.with_context(|| format!("writing the Secret {NAME}"))?;
    info!(secret = NAME, "new certificates for the webhook");
    Ok(kept)
}

/// Tells the API server whom to trust.
async fn announce(client: &Client, kept: &Kept) -> Result<()> {
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let found = configurations.get_opt(CONFIGURATION).await;
    let found = found.with_context(|| format!("reading the configuration {CONFIGURATION}"))?;
    // Without it evictions are nobody's business here.
    let Some(found) = found else {
        return Ok(());
    };
    let webhooks = found.webhooks.iter().flatten();
    let right = |one: &ByteString| one.0 == kept.authority;
    let mut wrong = webhooks
        .clone()
        .filter(|one| !one.client_config.ca_bundle.as_ref().is_some_and(right));
    if wrong.next().is_none() {
        return Ok(());
    }
    let bundle = ByteString(kept.authority.clone());
    let webhooks: Vec<_> = webhooks
        .map(|one| json!({"name": one.name, "clientConfig": {"caBundle": bundle}}))
        .collect();
    let patch = json!({
        "metadata": {"resourceVersion": found.metadata.resource_version},
        "webhooks": webhooks,
    });
    let parameters = PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let patched = configurations
        .patch(CONFIGURATION, &parameters, &Patch::Strategic(patch))
        .await;
    patched.with_context(|| format!("writing the configuration {CONFIGURATION}"))?;
    info!("the API server knows the webhook by its certificate");
    Ok(())
}

/// What the Secret holds, in PEM.
#[derive(Clone, PartialEq, Eq)]
struct Kept {
    authority: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Kept {
    fn read(secret: &Secret) -> Result<Self> {
        let part = |name: &str| {
            let data = secret.data.as_ref();
            let found = data.and_then(|data| data.get(name));
            let found = found.with_context(|| format!("the Secret {NAME} has no {name}"))?;
            Ok::<_, anyhow::Error>(found.0.clone())
        };
        Ok(Self {
            authority: part("ca.crt")?,
            certificate: part("tls.crt")?,
            key: part("tls.key")?,
        })
    }

    fn data(&self) -> BTreeMap<String, ByteString> {
        let part = |name: &str, text: &[u8]| (name.to_owned(), ByteString(text.to_owned()));
        BTreeMap::from([
            part("ca.crt", &self.authority),
            part("tls.crt", &self.certificate),
            part("tls.key", &self.key),
        ])
    }
}

/// Whether it was made here, and lives no longer than a third of its time.
fn is_due(secret: &Secret, now: i64) -> bool {
    let Some(text) = secret.annotations().get(ENDS) else {
        return false;
    };
    let third = i64::try_from(LIFE.as_secs() / 3).unwrap_or(i64::MAX);
    text.parse::<i64>().is_ok_and(|end| end - now < third)
}

/// A new authority, and one certificate by it. Of the authorities before it the newest stays.
fn make(namespace: &str, before: Option<&Kept>) -> Result<Kept> {
    let authority_key = KeyPair::generate().context("making a key")?;
    let mut authority = parameters("pageferry-webhook-ca");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let signed = authority.self_signed(&authority_key);
    let mut bundle = signed.context("making an authority")?.pem().into_bytes();
    let older = before.and_then(|before| first(&before.authority));
    bundle.extend(older.unwrap_or_default());
    let key = KeyPair::generate().context("making a key")?;
    let mut server = parameters(NAME);
    let host = format!("{NAME}.{namespace}.svc");
    let host = Ia5String::try_from(host).context("the name of the webhook's Service")?;
    server.subject_alt_names = vec![SanType::DnsName(host)];
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.use_authority_key_identifier_extension = true;
    let issuer = Issuer::new(authority, authority_key);
    let certificate = server.signed_by(&key, &issuer);
    Ok(Kept {
        authority: bundle,
        certificate: certificate
            .context("making a certificate")?
            .pem()
            .into_bytes(),
        key: key.serialize_pem().into_bytes(),
    })
}

/// The first certificate of several.
fn first(bundle: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bundle).ok()?;
    let end = text.find(PEM_END)? + PEM_END.len();
    Some(format!("{}\n", &text[..end]).into_bytes())
}

fn parameters(name: &str) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (now - SKEW).into();
    params.not_after = (now + LIFE).into();
    params
}

fn now() -> i64 {
    Timestamp::now().as_second()
}

/// The Service, and the Secret.
const NAME: &str = "pageferry-webhook";
const CONFIGURATION: &str = "pageferry";
/// On the Secret: when its certificate ends, in seconds of Unix time.
const ENDS: &str = "pageferry.dev/ends";
const LIFE: Duration = Duration::from_secs(90 * 24 * 60 * 60);
const SKEW: Duration = Duration::from_secs(60 * 60);
const EVERY: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
const PEM_END: &str = "-----END CERTIFICATE-----";

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(kept: &Kept, ends: Option<i64>) -> Secret {
        let annotations = ends.map(|ends| BTreeMap::from([(ENDS.to_owned(), ends.to_string())]));
        Secret {
            metadata: ObjectMeta {
                annotations,
                ..ObjectMeta::default()
            },
            data: Some(kept.data()),
            ..Secret::default()
        }
    }

    #[test]
    fn a_new_one_is_trusted_beside_the_last() {
        let one = make("pageferry-system", None).expect("certificates");
        let two = make("pageferry-system", Some(&one)).expect("certificates");
        let three = make("pageferry-system", Some(&two)).expect("certificates");
        let count = |kept: &Kept| CertificateDer::pem_slice_iter(&kept.authority).count();
        assert_eq!([count(&one), count(&two), count(&three)], [1, 2, 2]);
        assert!(two.authority.ends_with(&one.authority));
        let certificates = Arc::new(Certificates::default());
        certificates.show(&three).expect("it can be shown");
        certificates.server().expect("a server");
    }

    #[test]
    fn what_a_person_has_put_there_stays() {
        let kept = make("pageferry-system", None).expect("certificates");
        assert!(Kept::read(&secret(&kept, None)).is_ok_and(|read| read == kept));
        assert!(!is_due(&secret(&kept, None), 1_000_000_000));
        let life = i64::try_from(LIFE.as_secs()).expect("seconds");
        assert!(!is_due(&secret(&kept, Some(life)), 0));
        assert!(is_due(&secret(&kept, Some(life)), life * 3 / 4));
    }
}
