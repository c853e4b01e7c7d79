//! What a migration is offered with, in the schema's form.

use std::time::Duration;

use super::{ControlError, Offer, at_most, generation, micros, missing};
use crate::id::{WorkloadKind, WorkloadName};
use crate::migration::policy::{Mode, OnTimeout, Policy, ROUNDS_LIMIT};
use crate::wire::description::WorkloadDescription;
use crate::wire::schema;
use crate::wire::version::Version;

impl From<&Offer> for schema::Offer {
    fn from(offer: &Offer) -> Self {
        Self {
            version: offer.version.number(),
            workload: offer.workload.to_string(),
            generation: offer.generation.number(),
            policy: Some(schema::Policy {
                downtime_max_us: micros(offer.policy.downtime_max),
                rounds_max: offer.policy.rounds_max,
                timeout_us: micros(offer.policy.timeout),
                verify: offer.policy.verify,
                force_eager: offer.policy.force_eager,
                frozen_max_us: offer.policy.frozen_max.map(micros),
                mode: offer.policy.mode.number().cast_signed(),
                on_timeout: offer.policy.on_timeout.number().cast_signed(),
                downtime_bound_us: offer.policy.downtime_bound.map(micros),
            }),
            description: Some((&offer.description).into()),
            network: offer.network.as_ref().map(ToString::to_string),
            spans: offer.spans,
        }
    }
}

impl TryFrom<schema::Offer> for Offer {
    type Error = ControlError;

    fn try_from(offer: schema::Offer) -> Result<Self, ControlError> {
        let policy = offer.policy.ok_or(missing("offer.policy"))?;
        let description = offer.description.ok_or(missing("offer.description"))?;
        let rounds_max = at_most("offer.policy.rounds_max", policy.rounds_max, ROUNDS_LIMIT)?;
        if rounds_max == 0 {
            return Err(ControlError::Invalid {
                field: "offer.policy.rounds_max",
                value: 0,
            });
        }
        let name = |field| move |source| ControlError::Name { field, source };
        let network = offer.network.map(|name| name.parse()).transpose();
        let workload: WorkloadName = offer.workload.parse().map_err(name("offer.workload"))?;
        let description = WorkloadDescription::try_from(description)?;
        check_party(&workload, &description)?;
        let policy = policy_of(&policy, rounds_max)?;
        Ok(Self {
            version: Version::chosen(offer.version).map_err(ControlError::Version)?,
            workload,
            generation: generation("offer.generation", offer.generation)?,
            policy,
            description,
            network: network.map_err(name("offer.network"))?,
            spans: offer.spans,
        })
    }
}

fn policy_of(policy: &schema::Policy, rounds_max: u32) -> Result<Policy, ControlError> {
    let invalid = |field, value: i64| ControlError::Invalid { field, value };
    let mode = Mode::from_number(policy.mode.cast_unsigned())
        .ok_or_else(|| invalid("offer.policy.mode", policy.mode.into()))?;
    let on_timeout = OnTimeout::from_number(policy.on_timeout.cast_unsigned())
        .ok_or_else(|| invalid("offer.policy.on_timeout", policy.on_timeout.into()))?;
    let policy = Policy {
        downtime_max: Duration::from_micros(policy.downtime_max_us),
        rounds_max,
        timeout: Duration::from_micros(policy.timeout_us),
        verify: policy.verify,
        force_eager: policy.force_eager,
        frozen_max: policy.frozen_max_us.map(Duration::from_micros),
        mode,
        on_timeout,
        downtime_bound: policy.downtime_bound_us.map(Duration::from_micros),
    };
    match policy.check() {
        Ok(()) => Ok(policy),
        Err(_) => Err(invalid("offer.policy.verify", policy.verify.into())),
    }
}

/// A pod of podman is a party, and one of Kubernetes that has several containers; nothing else is.
fn check_party(
    workload: &WorkloadName,
    description: &WorkloadDescription,
) -> Result<(), ControlError> {
    let container = description.container.as_ref();
    let has_pod = container.is_some_and(|container| container.podman_pod.is_some());
    if (workload.kind() == WorkloadKind::PodmanPod) != has_pod {
        return Err(missing("container.podman_pod"));
    }
    let is_named = !description.member_name.is_empty();
    let has_others = !description.members.is_empty();
    let fits = match workload.kind() {
        WorkloadKind::PodmanPod => is_named,
        WorkloadKind::Pod => is_named == has_others,
        _ => !is_named && !has_others,
    };
    match fits {
        true => Ok(()),
        false => Err(missing("description.member_name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(number: u32, name: &str) -> schema::WorkloadDescription {
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

    /// Whether a workload may be offered so: with a name for its first member, and others.
    fn fits(workload: &str, name: &str, others: &[&str]) -> bool {
        let others = (1..).zip(others);
        let wire = schema::WorkloadDescription {
            boot_id: vec![7; 16],
            members: others
                .map(|(number, name)| description(number, name))
                .collect(),
            ..description(0, name)
        };
        let description = wire.try_into().expect("a description");
        check_party(&workload.parse().expect("a name"), &description).is_ok()
    }

    // clause: M-1
    #[test]
    fn a_pod_is_a_party_if_it_has_several_containers() {
        let pod = "pod/0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e";
        assert!(fits(pod, "", &[]) && fits(pod, "web", &["db"]));
        assert!(!fits(pod, "web", &[]));
        assert!(fits("runc/web", "", &[]));
        assert!(!fits("runc/web", "web", &["db"]) && !fits("runc/web", "web", &[]));
        // It says what the target makes the pod of.
        assert!(!fits("podman-pod/shop", "web", &["db"]));
    }
}
