//! The containers of a pod together: they are in the network, IPC and UTS namespaces of its
//! sandbox, and each is a member of a party.
//!
//! Absent: what is done to one of them ([`super::Pod`]); one process tree for all of them, which is
//! refused where the first of them is looked at.

use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};

use super::Pod;

/// A pod of several containers at its source, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Together {
    /// What the pod calls its containers, in the order of the members.
    names: Vec<String>,
}

impl Together {
    /// If there are several.
    pub fn of(containers: &[Pod]) -> Option<Self> {
        let names = containers.iter().map(|one| one.name.clone());
        (1 < containers.len()).then(|| Self {
            names: names.collect(),
        })
    }

    /// Says which member is called what.
    pub fn describe(&self, members: &mut [WorkloadDescription]) {
        for (member, name) in members.iter_mut().zip(&self.names) {
            member.member_name.clone_from(name);
        }
    }

    /// Whether they share a namespace of that kind.
    pub const fn shares(kind: NamespaceKind) -> bool {
        match kind {
            NamespaceKind::Net | NamespaceKind::Ipc | NamespaceKind::Uts => true,
            NamespaceKind::Pid | NamespaceKind::Mount => false,
        }
    }
}
