//! Who leads, by a Lease.
//!
//! That two lead at the same time costs work and nothing else: what is decided is written with
//! compare-and-swap. Clocks of other machines are not believed: a lease has run out when it has not
//! changed for its time by our own clock.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

/// A lease that is wanted, or held.
pub struct Leadership {
    leases: Api<Lease>,
    identity: String,
    /// The lease as it was last seen to change, and when.
    seen: Option<(Option<String>, Instant)>,
}

impl std::fmt::Debug for Leadership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Leadership");
        shown
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Leadership {
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            identity,
            seen: None,
        }
    }

    /// Waits until it is ours.
    pub async fn acquire(&mut self) {
        loop {
            match timeout(CALL_TIME, self.try_hold()).await {
                Ok(Ok(true)) => {
                    info!(identity = self.identity, "leads");
                    return;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(%error, "the lease cannot be had"),
                Err(_) => warn!("the API server does not answer about the lease"),
            }
            sleep(EVERY).await;
        }
    }

    /// Keeps it; returns when it is lost.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < GIVE_UP {
            sleep(EVERY).await;
            match timeout(CALL_TIME, self.try_hold()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => break,
                Ok(Err(error)) => warn!(%error, "the lease cannot be renewed"),
                Err(_) => warn!("the API server does not answer about the lease"),
            }
        }
    }

    async fn try_hold(&mut self) -> Result<bool, kube::Error> {
        let Some(lease) = self.leases.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.to_owned()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(None)),
            };
            let made = self.leases.create(&PostParams::default(), &lease).await;
            return unless_beaten(made);
        };
        let version = lease.resource_version();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
            self.seen = Some((version, Instant::now()));
        }
        let spec = lease.spec.as_ref();
        let holder = spec
            .and_then(|spec| spec.holder_identity.clone())
            .unwrap_or_default();
        let unchanged = self.seen.as_ref().map(|(_, since)| since.elapsed());
        let run_out = unchanged.is_some_and(|time| RUNS_OUT <= time) || holder.is_empty();
        if holder != self.identity && !run_out {
            return Ok(false);
        }
        let mut next = lease.clone();
        next.spec = Some(self.spec(spec));
        let replaced = self
            .leases
            .replace(NAME, &PostParams::default(), &next)
            .await;
        unless_beaten(replaced)
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let ours = before.filter(|one| one.holder_identity.as_ref() == Some(&self.identity));
        let changes = before.and_then(|one| one.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(RUNS_OUT.as_secs()).ok(),
            acquire_time: ours.map_or_else(|| now.clone(), |one| one.acquire_time.clone()),
            renew_time: now.clone(),
            lease_transitions: Some(match ours {
                Some(_) => changes,
                None => changes.saturating_add(1),
            }),
            ..LeaseSpec::default()
        }
    }
}

/// Another one was faster.
fn unless_beaten(done: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match done {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

const NAME: &str = "pageferry-controller";
const EVERY: Duration = Duration::from_secs(2);
const CALL_TIME: Duration = Duration::from_secs(3);
const GIVE_UP: Duration = Duration::from_secs(10);
const RUNS_OUT: Duration = Duration::from_secs(15);
