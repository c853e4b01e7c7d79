//! Parties: workloads of several members, each a container that is found, held, dumped and released
//! as it is alone. Here is what they have together.

use pageferry_proto::id::WorkloadName;
use pageferry_proto::wire::code::Failure;
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};

use super::Kind;
use crate::runtime::pod::Pod;
use crate::runtime::pod::together::Together;
use crate::runtime::podman::pod::PodmanPod;

/// What is known of a party at its source beside its members, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Party {
    /// A pod of podman.
    PodmanPod(PodmanPod),
    /// A pod of Kubernetes with several containers.
    Pod(Together),
}

/// What a name means at this node.
#[derive(Clone, Debug)]
pub struct Named {
    /// Of a workload of several members.
    pub party: Option<Party>,
    /// Its members, at least one; of what is no party, that alone.
    pub members: Vec<Kind>,
}

impl Named {
    /// What has this name, if it can move away from here. Blocks, while its engine answers.
    pub fn of(name: &WorkloadName) -> Result<Self, Failure> {
        match name {
            WorkloadName::PodmanPod(name) => {
                let (pod, members) = PodmanPod::find(name)?;
                Ok(Self {
                    party: Some(Party::PodmanPod(pod)),
                    members: members.into_iter().map(Kind::Podman).collect(),
                })
            }
            WorkloadName::Pod(uid) => {
                let containers = Pod::find(uid)?;
                Ok(Self {
                    party: Together::of(&containers).map(Party::Pod),
                    members: containers.into_iter().map(Kind::Pod).collect(),
                })
            }
            alone => Ok(Self {
                party: None,
                members: vec![Kind::of(alone)?],
            }),
        }
    }

    /// The pid of the root of its first member, in this node's pid namespace.
    pub fn root(&self) -> i32 {
        self.members.first().map_or(0, Kind::root)
    }
}

impl Party {
    /// Says of the members what they are to the party, and of the first what the target makes that
    /// of. Blocks, while its engine answers.
    pub fn describe(&self, members: &mut [WorkloadDescription]) -> Result<(), Failure> {
        match self {
            Self::PodmanPod(pod) => pod.describe(members),
            Self::Pod(pod) => {
                pod.describe(members);
                Ok(())
            }
        }
    }

    /// Whether its members share a namespace of that kind.
    pub fn shares(&self, kind: NamespaceKind) -> bool {
        match self {
            Self::PodmanPod(pod) => pod.shares(kind),
            Self::Pod(_) => Together::shares(kind),
        }
    }

    /// Checks once more what may have changed since it was found. Of frozen members.
    pub fn check_frozen(&self) -> Result<(), Failure> {
        match self {
            Self::PodmanPod(pod) => pod.check_frozen(),
            // Each container looks at what is its pod's.
            Self::Pod(_) => Ok(()),
        }
    }

    /// Whether its engine deletes its links when it has ended.
    pub const fn has_engine_network(&self) -> bool {
        match self {
            Self::PodmanPod(pod) => pod.has_network(),
            Self::Pod(_) => false,
        }
    }

    /// What a move takes from its clients, for people.
    pub fn notes(&self) -> Vec<String> {
        match self {
            Self::PodmanPod(pod) => pod.notes(),
            Self::Pod(_) => Vec::new(),
        }
    }

    /// It runs elsewhere, and its members are released: nothing else of it is to be left. Blocks.
    pub fn release(&self) {
        match self {
            Self::PodmanPod(pod) => pod.release(),
            // The kubelet removes what is left.
            Self::Pod(_) => {}
        }
    }
}
