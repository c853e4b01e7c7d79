//! What is described of a party: a workload of several members, each with a description of its own.
//!
//! The first member's description has the others within, in their order, and all that the party has
//! once: its network, its processor, its kernel. A workload that is no party has one member and no
//! name, and the bytes of its description are those of before there were parties.

use std::collections::BTreeSet;

use crate::id::MEMBERS_MAX;
use crate::wire::control::{ControlError, missing, short};
use crate::wire::copied::COPIED_PATHS_MAX;
use crate::wire::description::{NAME_BYTES_MAX, WorkloadDescription};
use crate::wire::schema;

/// Longest name of a member, in bytes: what engines take for a container's.
pub const MEMBER_NAME_BYTES_MAX: usize = 2 * NAME_BYTES_MAX;

impl WorkloadDescription {
    /// All members, this one first.
    pub fn all_members(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.members)
    }
}

/// The members after the first, without what the first has for all.
pub(super) fn members_to_wire(members: &[WorkloadDescription]) -> Vec<schema::WorkloadDescription> {
    let without = |member| schema::WorkloadDescription {
        boot_id: Vec::new(),
        ..schema::WorkloadDescription::from(member)
    };
    members.iter().map(without).collect()
}

/// The members after the first one, which is of the boot `boot_id`.
pub(super) fn members_from_wire(
    wire: Vec<schema::WorkloadDescription>,
    boot_id: &[u8],
) -> Result<Vec<WorkloadDescription>, ControlError> {
    short("description.members", wire.len(), MEMBERS_MAX - 1)?;
    let invalid = |field| ControlError::Invalid { field, value: 1 };
    let member = |wire: schema::WorkloadDescription| {
        if !wire.members.is_empty() {
            return Err(invalid("member.members"));
        }
        if !wire.links.is_empty() || !wire.routes.is_empty() {
            return Err(invalid("member.links"));
        }
        if !wire.boot_id.is_empty() || wire.cpu.is_some() {
            return Err(invalid("member.boot_id"));
        }
        WorkloadDescription::try_from(schema::WorkloadDescription {
            boot_id: boot_id.to_vec(),
            ..wire
        })
    };
    wire.into_iter().map(member).collect()
}

/// Whether what is said of members fits together. Of a description that is a member's own, its
/// party says more.
pub(super) fn check(description: &WorkloadDescription) -> Result<(), ControlError> {
    let name = "description.member_name";
    short(name, description.member_name.len(), MEMBER_NAME_BYTES_MAX)?;
    if description.members.is_empty() {
        return Ok(());
    }
    let mut names = BTreeSet::new();
    for (number, member) in description.all_members().enumerate() {
        if member.member_name.is_empty() || !names.insert(&*member.member_name) {
            return Err(missing("description.member_name"));
        }
        let others = member
            .spaces
            .iter()
            .find(|space| space.vpid.member() != number);
        if let Some(space) = others {
            return Err(ControlError::Invalid {
                field: "space.vpid",
                value: space.vpid.0.into(),
            });
        }
        let has_pod = |member: &WorkloadDescription| {
            let container = member.container.as_ref();
            container.is_some_and(|container| container.podman_pod.is_some())
        };
        if 0 < number && has_pod(member) {
            return Err(ControlError::Invalid {
                field: "container.podman_pod",
                value: i64::try_from(number).unwrap_or(i64::MAX),
            });
        }
    }
    let copied = description.all_members().map(|member| member.copied.len());
    short("description.copied", copied.sum(), COPIED_PATHS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(number: u32, name: &str) -> schema::WorkloadDescription {
        schema::WorkloadDescription {
            root_pid: 7,
            spaces: vec![schema::Space {
                vpid: number << 24 | 1,
                ..schema::Space::default()
            }],
            needs: Some(schema::Needs::default()),
            member_name: name.to_owned(),
            ..schema::WorkloadDescription::default()
        }
    }

    fn read(
        change: impl FnOnce(&mut schema::WorkloadDescription),
    ) -> Result<WorkloadDescription, ControlError> {
        let mut party = schema::WorkloadDescription {
            boot_id: vec![7; 16],
            members: vec![member(1, "web"), member(2, "cache")],
            ..member(0, "db")
        };
        change(&mut party);
        party.try_into()
    }

    // clause: M-1
    #[test]
    fn a_party_is_read_as_it_was_written() {
        let party = read(|_| ()).unwrap();
        let names = party.all_members().map(|member| &*member.member_name);
        assert!(names.eq(["db", "web", "cache"]));
        assert!(party.all_members().all(|member| member.boot_id == [7; 16]));
        let wire = schema::WorkloadDescription::from(&party);
        assert!(wire.members.iter().all(|member| member.boot_id.is_empty()));
        assert_eq!(WorkloadDescription::try_from(wire), Ok(party));
    }

    // clause: M-1
    // clause: M-4
    #[test]
    fn members_that_do_not_fit_together_are_refused() {
        read(|party| party.members[1].member_name = "db".to_owned()).unwrap_err();
        read(|party| party.member_name.clear()).unwrap_err();
        read(|party| party.member_name = "a".repeat(MEMBER_NAME_BYTES_MAX + 1)).unwrap_err();
        read(|party| party.members[0].spaces[0].vpid = 1).unwrap_err();
        read(|party| party.members.swap(0, 1)).unwrap_err();
        read(|party| party.members[0].members = vec![member(1, "deep")]).unwrap_err();
        read(|party| party.members[0].boot_id = vec![7; 16]).unwrap_err();
        read(|party| party.members[0].routes = vec![schema::Route::default()]).unwrap_err();
        let folder = schema::CopiedPath {
            path: "/data".to_owned(),
            ..schema::CopiedPath::default()
        };
        let half = vec![folder; COPIED_PATHS_MAX / 2];
        let both = |party: &mut schema::WorkloadDescription| {
            party.copied.clone_from(&half);
            party.members[1].copied.clone_from(&half);
        };
        read(both).unwrap();
        read(|party| {
            both(party);
            party.members[0].copied = half[..1].to_vec();
        })
        .unwrap_err();
        let many = |count: u32| {
            read(|party| {
                let members = (1..=count).map(|number| member(number, &number.to_string()));
                party.members = members.collect();
            })
        };
        let most = u32::try_from(MEMBERS_MAX).unwrap() - 1;
        many(most).unwrap();
        many(most + 1).unwrap_err();
    }
}
