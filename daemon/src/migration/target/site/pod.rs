//! The place of a pod: Kubernetes makes it, and until then nothing is here but what has come.
//!
//! Invariants: nothing is restored before the runtimes of all of the pod's containers wait, and
//! what waits is what comes needs; from the first one on until [`Site::let_go`] nobody reaches the
//! pod's addresses here.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::stat::fstat;
use pageferry_proto::id::PodUid;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::LinkDescription;
use pageferry_proto::wire::needs::ResourceLimits;
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::request::{CriuNamespaces, criu_namespaces};
use super::seat::Seat;
use super::{Network, Site};
use crate::link::loopback::LoGate;
use crate::link::route;
use crate::migration::text::internal;
use crate::runtime::kind::{Arriving, ArrivingPod, PodWaits};

/// How often it is looked whether the runtime of a container of a pod waits.
const POLL: Duration = Duration::from_millis(10);

/// How often it is looked whether it runs without that.
const COLD_POLL: Duration = Duration::from_millis(500);

/// What a pod needs here, and what it is joined to.
#[derive(Debug)]
pub(super) struct Pod {
    links: Vec<LinkDescription>,
    /// Of each container that waits, with the number of its seat.
    waits: Vec<(usize, PodWaits)>,
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
            waits: Vec::new(),
            names: (String::new(), String::new()),
        })
    }

    /// Fails if a container is in another sandbox than those before it: that of its pod was made
    /// anew.
    fn check_same(&self, waits: &PodWaits) -> Result<(), Failure> {
        let inode = |waits: &PodWaits| fstat(&waits.net).map(|stat| (stat.st_dev, stat.st_ino));
        let Some((_, first)) = self.waits.first() else {
            return Ok(());
        };
        match (inode(first), inode(waits)) {
            (Ok(first), Ok(other)) if first == other => Ok(()),
            (Err(error), _) | (_, Err(error)) => Err(internal(&error)),
            (Ok(_), Ok(_)) => Err(Failure::new(
                ErrorCode::RuntimeFailed,
                "the sandbox of the pod was made anew while its containers came",
            )),
        }
    }
}

impl Site {
    /// Waits until the runtimes of all containers of pod `uid` do, and joins what they are in. The
    /// kubelet has the next one started when one runs, so each but the last is said to.
    pub async fn expect(&mut self, uid: &PodUid) -> Result<(), Failure> {
        for seat in &mut self.seats {
            let directory = seat.directory.clone();
            fs::create_dir_all(&directory).map_err(|error| internal(&error))?;
            seat.comes()?.expect(uid, &directory)?;
        }
        let mut left: Vec<usize> = (0..self.seats.len()).collect();
        let mut gate = None;
        while !left.is_empty() {
            let number = self.next_container(&left, uid).await?;
            left.retain(|other| *other != number);
            self.join(number).await?;
            if gate.is_none() {
                gate = self.loopback_gate();
                self.await_frames().await;
            }
            let criu = self
                .seat_container((number, !left.is_empty()), gate.as_ref())
                .await?;
            if !left.is_empty() {
                self.seats[number].comes()?.pass(criu)?;
            }
            tracing::info!(migration = %self.id, pod = %uid, left = left.len(),
                "a container of the pod waits");
        }
        for seat in &mut self.seats {
            seat.comes()?.check_passed()?;
        }
        block_in_place(|| self.find_overlays())?;
        block_in_place(|| self.find_volumes())
    }

    /// Waits until the runtime of a container waits, of those that are `left`; the number of its
    /// seat.
    async fn next_container(&mut self, left: &[usize], uid: &PodUid) -> Result<usize, Failure> {
        let mut asked = Instant::now();
        loop {
            for number in left {
                if self.seats[*number].comes()?.look(uid)? {
                    return Ok(*number);
                }
            }
            tokio::time::sleep(POLL).await;
            // While a container of a pod is created its engine says nothing of any of them.
            if COLD_POLL <= asked.elapsed()
                && let [first, ..] = left
            {
                self.seats[*first].comes()?.check_not_cold(uid).await?;
                asked = Instant::now();
            }
        }
    }

    /// Joins what a container that waits is in: the first one that comes, for all of them.
    async fn join(&mut self, number: usize) -> Result<(), Failure> {
        let arriving = self.seats[number].comes()?;
        let waits = block_in_place(|| arriving.check_waiting())?;
        let here = self.pod.as_mut().ok_or_else(no_pod)?;
        here.check_same(&waits)?;
        if here.waits.is_empty() {
            here.names = namespace::names(&waits.uts).map_err(|error| internal(&error))?;
            let network = Network::in_sandbox(&waits.net, &here.links).await?;
            self.network = Some(network);
            let net = waits.net.try_clone().map_err(|error| internal(&error))?;
            self.namespaces.push((NamespaceKind::Net, net));
        }
        here.waits.push((number, waits));
        Ok(())
    }

    /// Has the runtime of a container that waits begin, and a CRIU in it wait; that.
    async fn seat_container(
        &mut self,
        (number, is_ahead): (usize, bool),
        gate: Option<&LoGate>,
    ) -> Result<i32, Failure> {
        let images = self.images().swap_remove(number);
        let seat = &mut self.seats[number];
        let mut arriving = seat.arriving.take().ok_or_else(no_pod)?;
        if let Some(container) = arriving.as_pod().filter(|_| is_ahead) {
            container.come_ahead();
        }
        seat.take(&self.node, arriving, ResourceLimits::default())?;
        let namespaces = criu_namespaces(&self.namespaces)?;
        let inside: (&CriuNamespaces<'_>, Option<&LoGate>) = (&namespaces, gate);
        seat.start_pager(&self.node, images, inside).await
    }

    /// Gives what is restored, and held, the names and the rank that its pod has here: CRIU has
    /// restored those of the source.
    pub(super) fn settle_pod(&self) -> Result<(), Failure> {
        let Some(Pod { waits, names, .. }) = &self.pod else {
            return Ok(());
        };
        let (_, first) = waits.first().ok_or_else(no_pod)?;
        let unfit = |what: &str, error: &dyn std::fmt::Display| {
            let text = format!("the {what} of the pod cannot be set: {error}");
            Failure::new(ErrorCode::NodeUnfit, text)
        };
        namespace::set_names(&first.uts, &names.0, &names.1)
            .map_err(|error| unfit("host name", &error))?;
        for (number, waits) in waits {
            let (Some(adj), Some(seat)) = (waits.oom_score_adj, self.seats.get(*number)) else {
                continue;
            };
            let pids = seat.freezer.processes();
            let pids = pids.map_err(|error| unfit("oom_score_adj", &error))?;
            for pid in pids.into_iter().filter(|pid| 0 < *pid) {
                let set = fs::write(format!("/proc/{pid}/oom_score_adj"), adj.to_string());
                if let Err(error) = set {
                    // Without CAP_SYS_RESOURCE none is lowered, by anybody.
                    tracing::warn!(pid, adj, %error, "oom_score_adj stays that of the source");
                }
            }
        }
        Ok(())
    }
}

impl Seat {
    /// The container of a pod that comes to it.
    fn comes(&mut self) -> Result<&mut ArrivingPod, Failure> {
        let arriving = self.arriving.as_mut();
        arriving.and_then(Arriving::as_pod).ok_or_else(no_pod)
    }
}

fn no_pod() -> Failure {
    Failure::new(
        ErrorCode::UnsupportedWorkload,
        "the migration is none of a pod that is to come here: nothing is expected for it",
    )
}
