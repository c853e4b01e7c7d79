//! The place of a pod: Kubernetes makes it, and until then nothing is here but what has come.
//!
//! Invariants: nothing is restored before the runtime of the pod's container waits, and what waits
//! is what comes needs; from then on until [`Site::let_go`] nobody reaches the pod's addresses
//! here.

use std::fs;
use std::time::{Duration, Instant};

use pageferry_proto::id::PodUid;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::LinkDescription;
use pageferry_proto::wire::needs::ResourceLimits;
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::{Network, Site};
use crate::link::route;
use crate::migration::text::internal;
use crate::runtime::kind::{Arriving, PodWaits};

/// How often it is looked whether the runtime of a pod's container waits.
const POLL: Duration = Duration::from_millis(10);

/// How often it is looked whether it runs without that.
const COLD_POLL: Duration = Duration::from_millis(500);

/// What a pod needs here, and what it is joined to.
#[derive(Debug)]
pub(super) struct Pod {
    links: Vec<LinkDescription>,
    waits: Option<PodWaits>,
    /// The names of the sandbox.
    names: (String, String),
}

impl Pod {
    /// One that has these links at its source, if what others know it by can be kept.
    pub(super) fn of(links: &[LinkDescription]) -> Result<Self, Failure> {
        if let Some(ip) = route::unled(links) {
            let text = format!("the pod has the address {ip}, and those of IPv6 do not move yet");
            return Err(Failure::new(ErrorCode::NetworkUnfit, text));
        }
        Ok(Self {
            links: links.to_vec(),
            waits: None,
            names: (String::new(), String::new()),
        })
    }
}

impl Site {
    /// Waits until the runtime of the container of pod `uid` does, and joins what that is in.
    pub async fn expect(&mut self, uid: &PodUid) -> Result<(), Failure> {
        let directory = self.directory.clone();
        fs::create_dir_all(&directory).map_err(|error| internal(&error))?;
        let seat = self.seats.first_mut().ok_or_else(no_pod)?;
        let pod = seat.arriving.as_mut().and_then(Arriving::as_pod);
        let pod = pod.ok_or_else(no_pod)?;
        pod.expect(uid, &directory)?;
        let mut asked = Instant::now();
        while !pod.look(uid)? {
            tokio::time::sleep(POLL).await;
            if COLD_POLL <= asked.elapsed() {
                pod.check_not_cold(uid).await?;
                asked = Instant::now();
            }
        }
        let waits = block_in_place(|| pod.check_waiting())?;
        let here = self.pod.as_mut().ok_or_else(no_pod)?;
        here.names = namespace::names(&waits.uts).map_err(|error| internal(&error))?;
        let network = Network::in_sandbox(&waits.net, &here.links).await?;
        self.network = Some(network);
        let net = waits.net.try_clone().map_err(|error| internal(&error))?;
        self.namespaces.push((NamespaceKind::Net, net));
        here.waits = Some(waits);
        let seat = self.seats.first_mut().ok_or_else(no_pod)?;
        let arriving = seat.arriving.take().ok_or_else(no_pod)?;
        seat.take(&self.node, arriving, ResourceLimits::default())?;
        self.start_pagers().await?;
        block_in_place(|| self.find_overlays())?;
        block_in_place(|| self.find_volumes())?;
        tracing::info!(migration = %self.id, pod = %uid, "the pod's container waits");
        Ok(())
    }

    /// Gives what is restored, and held, the names and the rank that its pod has here: CRIU has
    /// restored those of the source.
    pub(super) fn settle_pod(&self) -> Result<(), Failure> {
        let Some(Pod { waits, names, .. }) = &self.pod else {
            return Ok(());
        };
        let Some(waits) = waits else {
            return Err(no_pod());
        };
        let unfit = |what: &str, error: &dyn std::fmt::Display| {
            let text = format!("the {what} of the pod cannot be set: {error}");
            Failure::new(ErrorCode::NodeUnfit, text)
        };
        namespace::set_names(&waits.uts, &names.0, &names.1)
            .map_err(|error| unfit("host name", &error))?;
        let Some(adj) = waits.oom_score_adj else {
            return Ok(());
        };
        let pids = self.seats.iter().map(|seat| seat.freezer.processes());
        let pids = pids.collect::<Result<Vec<_>, _>>();
        let pids = pids.map_err(|error| unfit("oom_score_adj", &error))?;
        for pid in pids.into_iter().flatten() {
            if pid <= 0 {
                continue;
            }
            let set = fs::write(format!("/proc/{pid}/oom_score_adj"), adj.to_string());
            if let Err(error) = set {
                // Without CAP_SYS_RESOURCE none is lowered, by anybody.
                tracing::warn!(pid, adj, %error, "oom_score_adj stays that of the source");
            }
        }
        Ok(())
    }
}

fn no_pod() -> Failure {
    Failure::new(
        ErrorCode::UnsupportedWorkload,
        "the migration is none of a pod that is to come here: nothing is expected for it",
    )
}
