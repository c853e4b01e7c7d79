//! A workload that comes with all its members, and what is made around those of a party.
//!
//! Absent: what is made for one member ([`Arriving`]).

use std::path::Path;

use pageferry_proto::id::WorkloadName;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_sys::namespace::NamespaceKind;

use super::{Arriving, ArrivingPod};
use crate::runtime::podman;
use crate::runtime::podman::arrive::pod::Arriving as ArrivingPodmanPod;
pub use crate::runtime::podman::arrive::pod::Made as MadeAround;

/// All of a workload that comes.
#[derive(Clone, Debug)]
pub struct Coming {
    /// The first one first; never none.
    pub members: Vec<Arriving>,
    /// What they are in together, if that is made before them.
    pub around: Option<Around>,
}

/// What is made before the members of a party, and removed after them.
#[derive(Clone, Debug)]
pub enum Around {
    /// A pod of podman, with an infra container.
    PodmanPod(Box<ArrivingPodmanPod>),
}

impl Coming {
    /// Takes in hand what is offered under this name, if it is of a kind that can come here.
    pub fn begin(name: &WorkloadName, description: &WorkloadDescription) -> Result<Self, Failure> {
        if let WorkloadName::PodmanPod(pod) = name {
            let (pod, members) = ArrivingPodmanPod::begin(pod, description)?;
            return Ok(Self {
                members: members
                    .into_iter()
                    .map(|member| Arriving::Podman(Box::new(member)))
                    .collect(),
                around: Some(Around::PodmanPod(Box::new(pod))),
            });
        }
        if let WorkloadName::Pod(uid) = name {
            let members = ArrivingPod::begin_all(uid, description)?.into_iter();
            return Ok(Self {
                members: members.map(Box::new).map(Arriving::Pod).collect(),
                around: None,
            });
        }
        if !description.members.is_empty() {
            let text = format!("{name} is offered with several members, and has one here");
            return Err(Failure::new(ErrorCode::UnsupportedWorkload, text));
        }
        Ok(Self {
            members: vec![Arriving::begin(name, description)?],
            around: None,
        })
    }

    /// Compares what they need with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        if let Some(Around::PodmanPod(pod)) = &self.around {
            pod.check()?;
        }
        if let [only] = &self.members[..] {
            return only.check(description);
        }
        // What several of them have bound comes once.
        let copied = description.all_members().flat_map(|one| one.copied.iter());
        let copied: Vec<_> = copied.cloned().collect();
        for (arriving, member) in self.members.iter().zip(description.all_members()) {
            let member = WorkloadDescription {
                copied: copied.clone(),
                members: Vec::new(),
                ..member.clone()
            };
            arriving.check(&member).map_err(|failure| {
                let text = format!("{}: {}", member.member_name, failure.text());
                Failure::new(failure.code(), text)
            })?;
        }
        Ok(())
    }

    /// Namespaces that are made for them, in the order in which they are entered.
    pub fn namespaces(&self, description: &WorkloadDescription) -> Vec<NamespaceKind> {
        match (&self.around, &self.members[..]) {
            (None, [first, ..]) => first.namespaces(description),
            // They are those of what is around.
            (Some(_), _) | (None, []) => Vec::new(),
        }
    }
}

impl Around {
    /// If it has a network of its engine's: has that attach the links to the bridge `hold`, and
    /// answers with the bridge that they are to be on. What that needs is made in `directory`, the
    /// migration's. Blocks, while the engine answers.
    pub fn hold_network(&self, directory: &Path, hold: &str) -> Result<Option<String>, Failure> {
        match self {
            Self::PodmanPod(pod) => pod.hold_network(directory, hold),
        }
    }

    /// Makes it, and says so to its members. What takes it away again is in `directory`, the
    /// migration's. Blocks, while the engine works.
    pub fn make(&self, directory: &Path, members: &mut [Arriving]) -> Result<MadeAround, Failure> {
        match self {
            Self::PodmanPod(pod) => {
                let made = pod.make(directory)?;
                for member in members {
                    if let Arriving::Podman(member) = member {
                        member.join(&made);
                    }
                }
                Ok(made)
            }
        }
    }
}

/// Removes what was made around members of which nothing is left, and none of which has run.
/// Blocks.
pub fn sweep_around(directory: &Path) {
    podman::arrive::pod::sweep(directory);
}

/// The members run: what is around them is its engine's from now on.
pub fn runs_around(directory: &Path) {
    podman::arrive::pod::runs(directory);
}

/// Says what is left around members that may have run.
pub fn leave_around(directory: &Path) {
    podman::arrive::pod::leave(directory);
}
