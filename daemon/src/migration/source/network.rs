//! The workload's network, as its source sees it: the ports through which it is reached, and what
//! its sockets are at.
//!
//! Invariants: ports are closed before the cgroup is frozen and opened after it is thawed; they are
//! deleted before the frozen copy dies. A look changes nothing. Without a network namespace of its
//! own a workload has no ports, and its connections are the node's.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use pageferry_cgroup::freezer::Freezer;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};

use super::lo::Loopback;
use super::member::Trees;
use super::parking::{self, Parking};
use super::waits::Waits;
use super::workload::Workload;
use crate::link::announce::announce;
use crate::link::describe::describe;
use crate::link::netlink::Netlink;
use crate::link::park::Means;
use crate::link::port::Port;
use crate::link::route;
use crate::migration::text::{internal, network_unfit};
use crate::runtime::kind::Kind;
use crate::runtime::loopback::Connections;
use crate::runtime::passing::{Observer, Passing};

/// How others reach a workload, and what is on its way to them.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) ports: Ports,
    pub(super) sockets: Sockets,
    pub(super) lo: Loopback,
    pub(super) parking: Parking,
}

/// This node's ends of its links.
#[derive(Debug)]
pub(super) struct Ports(Vec<Port>);

/// Looks at the workload's sockets, from when the tree is tracked.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Looks for states that pass.
    observer: Option<Observer>,
    /// Those of the tree's network namespace, if that is its own.
    connections: Option<Connections>,
    /// The cgroups of all trees, whose processes may be at either end of a connection.
    freezers: Vec<Freezer>,
}

impl Network {
    /// One of which nothing is observed yet.
    pub(super) fn new(ports: Vec<Port>) -> Self {
        Self {
            ports: Ports(ports),
            sockets: Sockets::default(),
            lo: Loopback::default(),
            parking: Parking::default(),
        }
    }

    /// Makes what keeps frames in a freeze.
    pub(super) async fn park(&mut self, means: Means, workload: &Workload) -> Result<(), Failure> {
        self.parking.make(means, workload, &self.ports.0).await
    }

    /// The workload stays, and runs: it has what was kept for it, and is reached again.
    pub(super) async fn reopen(&mut self, untrack: bool) -> Result<(), Failure> {
        self.parking.stop();
        let Some(gate) = self.ports.gate(&self.parking)? else {
            return Ok(());
        };
        let opened = gate.open_all().await;
        let delivered = gate.parking.deliver();
        let mut cleared = Ok(());
        // One that keeps nothing may be that of a daemon that has died.
        if untrack || self.parking.is_nothing() {
            cleared = parking::clear(gate.ports).await;
        }
        if untrack {
            self.parking.end();
        }
        delivered.and(opened).and(cleared)
    }

    /// It runs at the target: its links are taken away, so that whatever the dying sockets say
    /// reaches nobody; or they are shut, and what still comes by them is sent on.
    /// An engine takes its own away.
    pub(super) async fn leave(&mut self, tree: &Workload, is_engines: bool) -> Result<(), Failure> {
        match self.parking.relay(tree, is_engines) {
            true => Ok(()),
            false => self.take_away(is_engines).await,
        }
    }

    /// Waits until what still comes need not be sent on, and takes links away that have waited for
    /// that.
    pub(super) async fn relayed(&mut self, tree: &Workload, is_engines: bool) {
        if self.parking.relayed().await {
            if let Err(failure) = self.take_away(is_engines).await {
                tracing::warn!(root = tree.root(), %failure, "a link is left");
            }
            self.parking.end();
        }
    }

    async fn take_away(&self, is_engines: bool) -> Result<(), Failure> {
        let Some(gate) = self.ports.gate(&self.parking)? else {
            return Ok(());
        };
        match is_engines {
            true => gate.shut().await,
            false => gate.delete().await,
        }
    }

    /// It runs at the target, which is met at `peer`: of a pod, this node's neighbours still look
    /// for its addresses here, and are led there. Not done, they are found by others alone.
    pub(super) async fn lead_away(&self, workload: &Workload, peer: Option<IpAddr>) {
        let Kind::Pod(_) = &workload.kind else { return };
        let led = async {
            let peer = peer.ok_or_else(|| {
                let text = "where the target is met is not in this node's configuration any more";
                Failure::new(ErrorCode::PeerUnknown, text)
            })?;
            let net = namespace::open(workload.root(), NamespaceKind::Net);
            let net = net.map_err(|error| internal(&error))?;
            workload.check_root()?;
            let network = describe(&net).await;
            let network = network.map_err(|error| network_unfit(&error))?;
            let led = route::lead_away(&network, peer).await;
            led.map_err(|error| network_unfit(&error))
        };
        match tokio::time::timeout(LEAD_MAX, led).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => tracing::warn!(root = workload.root(), %failure,
                "this node does not lead to the addresses of a pod that has moved"),
            Err(_) => tracing::warn!(
                root = workload.root(),
                "the kernel takes no routes to a pod that has moved"
            ),
        }
    }
}

/// How long the kernel may take to take some routes.
const LEAD_MAX: Duration = Duration::from_secs(5);

impl Sockets {
    /// Opens what looks at them, before the first freeze has to wait for it.
    pub(super) fn observe(&mut self, trees: Trees<'_>) -> Result<(), Failure> {
        let (workload, root) = (trees.first(), trees.root());
        self.freezers = trees.freezers();
        let net = workload.own.contains(&NamespaceKind::Net);
        if net {
            self.connections = Some(Connections::of(root)?);
        }
        let net = net.then(|| namespace::open(root, NamespaceKind::Net));
        let observer = net
            .transpose()
            .and_then(|net| Observer::open(net.as_ref().map(AsFd::as_fd)));
        self.observer = Some(observer.map_err(|error| unlisted(root, &error))?);
        Ok(())
    }

    /// Those of a network namespace of its own, once they are observed.
    pub(super) fn connections(&self) -> Option<Connections> {
        self.connections.clone()
    }

    /// The cgroups of all trees, once they are observed.
    pub(super) fn freezers(&self) -> Vec<Freezer> {
        self.freezers.clone()
    }

    /// What passes the tree's loopback cannot be held back in a freeze, for that reason.
    pub(super) fn ungated(&mut self, why: &str) {
        if let Some(connections) = &mut self.connections {
            connections.ungated(why);
        }
    }

    /// A passing state they are in; first one that needs the other side.
    pub(super) fn look(&mut self, trees: Trees<'_>) -> Result<Option<Passing>, Failure> {
        let pids = trees.pids()?;
        let Some(observer) = &mut self.observer else {
            return Err(Failure::new(
                ErrorCode::Internal,
                "a freeze of a workload that is not tracked",
            ));
        };
        // For less time than it takes to make room for another task.
        let found = observer.look(&pids);
        let found = found.map_err(|error| unlisted(trees.root(), &error))?;
        Ok(found.into_iter().min_by_key(|p| p.state.passes_alone()))
    }
}

impl Ports {
    /// What opens and closes them; none if there are none.
    pub(super) fn gate<'a>(&'a self, parking: &'a Parking) -> Result<Option<Gate<'a>>, Failure> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let netlink = Netlink::open(None).map_err(|error| network_unfit(&error))?;
        let ports = &self.0;
        Ok(Some(Gate {
            ports,
            parking,
            netlink,
        }))
    }

    /// Says where the workload's addresses are, if it has any of its own. A target that failed late
    /// has said otherwise, and bridges believe it until the workload sends something.
    pub(super) async fn announce(&self, workload: &Workload) -> Result<(), Failure> {
        if self.0.is_empty() {
            return Ok(());
        }
        let net = namespace::open(workload.root(), NamespaceKind::Net);
        let net = net.map_err(|error| internal(&error))?;
        workload.check_root()?;
        let network = describe(&net)
            .await
            .map_err(|error| network_unfit(&error))?;
        announce(net.as_fd(), &network.links).map_err(|error| network_unfit(&error))
    }
}

/// Ports, and the way to the kernel's side of them, which is opened before it is in a hurry.
#[derive(Debug)]
pub(super) struct Gate<'a> {
    ports: &'a [Port],
    parking: &'a Parking,
    netlink: Netlink,
}

impl Gate<'_> {
    /// From here on nothing new arrives: it is kept.
    pub(super) async fn close(&self, waits: &Waits) -> Result<(), Failure> {
        for port in self.closed() {
            let closed = waits.on(Wait::Ports, port.close(&self.netlink)).await?;
            closed.map_err(|error| network_unfit(&error))?;
        }
        self.parking.close()
    }

    /// The ports that are closed, since what comes by them cannot be kept otherwise.
    fn closed(&self) -> &[Port] {
        match self.parking.is_whole() {
            true => &[],
            false => self.ports,
        }
    }

    /// Opens them again, for another moment to freeze.
    pub(super) async fn reopen(&self, waits: &Waits) -> Result<(), Failure> {
        self.parking.stop();
        for port in self.closed() {
            let opened = waits.on(Wait::Ports, port.open(&self.netlink)).await?;
            opened.map_err(|error| network_unfit(&error))?;
        }
        self.parking.deliver()
    }

    /// Opens all that can be opened, whatever becomes of the others.
    pub(super) async fn open_all(&self) -> Result<(), Failure> {
        let opened = Port::open_all(self.ports, &self.netlink).await;
        opened.map_err(|error| network_unfit(&error))
    }

    /// Sees to it that they are closed, for whoever deletes them: whatever a dying socket says
    /// reaches nobody.
    pub(super) async fn shut(&self) -> Result<(), Failure> {
        for port in self.ports {
            let closed = port.shut(&self.netlink).await;
            closed.map_err(|error| network_unfit(&error))?;
        }
        Ok(())
    }

    /// Deletes them: whatever a dying socket says reaches nobody.
    pub(super) async fn delete(&self) -> Result<(), Failure> {
        for port in self.ports {
            let deleted = port.delete(&self.netlink).await;
            deleted.map_err(|error| network_unfit(&error))?;
        }
        Ok(())
    }
}

fn unlisted(root: i32, error: &io::Error) -> Failure {
    let text = format!("the sockets of process {root} cannot be listed: {error}");
    Failure::new(ErrorCode::NodeUnfit, text)
}
