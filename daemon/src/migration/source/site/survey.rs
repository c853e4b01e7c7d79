//! How a site begins: a workload surveyed, or found again from the journal.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pageferry_proto::id::MigrationId;
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::{Dumping, Site, SourceNode, check_trackable};
use crate::link::describe::describe as describe_network;
use crate::link::netlink::Netlink;
use crate::link::port::Port;
use crate::migration::source::state::{SiteState, encode_state};
use crate::migration::text::{chain, network_unfit};
use crate::pages::send::Sender;
use crate::pages::track::tree::Tree;
use crate::runtime::cgroup::Freezer;
use crate::runtime::mounts::Mounts;
use crate::runtime::process;
use crate::sys::namespace::{self, NamespaceKind};

/// A surveyed workload: nothing of it has been touched.
#[derive(Debug)]
pub struct Survey {
    /// For the target.
    pub description: WorkloadDescription,
    /// For the journal.
    pub state: DriverState,
    /// For the driver.
    pub site: Site,
}

/// What a survey, or a journal, says of a workload.
#[derive(Debug)]
struct Found {
    root: i32,
    own: Vec<NamespaceKind>,
    mounts: Option<Mounts>,
    freezer: Freezer,
    origin: Option<PathBuf>,
    ports: Vec<Port>,
    memory_bytes: u64,
    true_smaps: bool,
}

impl Site {
    /// Looks at the tree below `root` and says what the target must know, or why it cannot move.
    pub async fn survey(
        node: SourceNode,
        id: MigrationId,
        root: i32,
        policy: Policy,
        shared: &[PathBuf],
        true_smaps: bool,
        cancelled: watch::Receiver<bool>,
    ) -> Result<Survey, Failure> {
        let gone = |error: &dyn std::fmt::Display| {
            Failure::new(ErrorCode::WorkloadGone, format!("process {root}: {error}"))
        };
        let tree = block_in_place(|| Tree::read(root))
            .map_err(|error| Failure::new(error.code(), chain(&error)))?;
        let pids = tree.pids();
        let described = block_in_place(|| process::describe(root, &pids, shared))?;
        block_in_place(|| {
            pids.iter()
                .try_for_each(|pid| check_trackable(*pid, root, &node.support))
        })?;
        let mut description = described.description;
        description.criu_version = node.criu_version;
        let mut ports = Vec::new();
        if described.own.contains(&NamespaceKind::Net) {
            let net = namespace::open(root, NamespaceKind::Net).map_err(|error| gone(&error))?;
            let network = describe_network(&net)
                .await
                .map_err(|error| network_unfit(&error))?;
            description.links = network.links;
            description.routes = network.routes;
            ports = network.ports;
        }
        let (freezer, origin) = match node.freezers.holding(&pids) {
            Some(freezer) => (freezer, None),
            None => {
                let origin = node.freezers.current_of(root);
                (node.freezers.plan(&id.to_string()), origin)
            }
        };
        let state = SiteState {
            root,
            freezer: freezer.path().to_owned(),
            origin: origin.clone(),
            ports: ports
                .iter()
                .map(|port| (port.name().to_owned(), port.bridge().to_owned()))
                .collect(),
        };
        let memory_bytes = description
            .spaces
            .iter()
            .map(|space| space.memory_bytes)
            .sum();
        let found = Found {
            root,
            own: described.own,
            mounts: described.mounts,
            freezer,
            origin,
            ports,
            memory_bytes,
            true_smaps,
        };
        Ok(Survey {
            description,
            state: encode_state(&state)?,
            site: Self::untouched(node, id, policy, found, cancelled),
        })
    }

    /// A site for a migration that a dead daemon has left: it can be thawed or released.
    pub async fn recover(
        node: SourceNode,
        id: MigrationId,
        policy: Policy,
        state: &DriverState,
        cancelled: watch::Receiver<bool>,
    ) -> Result<Self, Failure> {
        let state: SiteState = serde_json::from_slice(state.as_bytes()).map_err(|error| {
            Failure::new(
                ErrorCode::Internal,
                format!("the journal of {id} is not readable: {error}"),
            )
        })?;
        let netlink = Netlink::open(None).map_err(|error| network_unfit(&error))?;
        let mut ports = Vec::new();
        for (name, bridge) in &state.ports {
            let port = Port::named(&netlink, name, bridge)
                .await
                .map_err(|error| network_unfit(&error))?;
            ports.extend(port);
        }
        let found = Found {
            root: state.root,
            own: Vec::new(),
            mounts: None,
            freezer: Freezer::at(state.freezer),
            origin: state.origin,
            ports,
            memory_bytes: 0,
            true_smaps: false,
        };
        Ok(Self::untouched(node, id, policy, found, cancelled))
    }

    fn untouched(
        node: SourceNode,
        id: MigrationId,
        policy: Policy,
        found: Found,
        cancelled: watch::Receiver<bool>,
    ) -> Self {
        Self {
            directory: node.migrations.join(id.to_string()),
            sender: Arc::new(Sender::new(node.workers)),
            node,
            policy,
            root: found.root,
            own: found.own,
            mounts: found.mounts,
            freezer: found.freezer,
            origin: found.origin,
            ports: found.ports,
            spaces: BTreeMap::new(),
            pending: BTreeMap::new(),
            scanned: Instant::now(),
            dumping: Dumping::No,
            restarts: 0,
            comparing: None,
            memory_bytes: found.memory_bytes,
            eager_bytes: 0,
            image_bytes: 0,
            frozen_in_criu: None,
            data: None,
            cancelled,
            sent: Arc::default(),
            true_smaps: found.true_smaps,
        }
    }
}
