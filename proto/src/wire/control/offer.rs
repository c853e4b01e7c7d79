//! What a migration is offered with, in the schema's form.

use std::time::Duration;

use super::{ControlError, Offer, at_most, generation, micros, missing};
use crate::migration::policy::{Policy, ROUNDS_LIMIT};
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
            }),
            description: Some((&offer.description).into()),
            network: offer.network.as_ref().map(ToString::to_string),
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
        Ok(Self {
            version: Version::chosen(offer.version).map_err(ControlError::Version)?,
            workload: offer.workload.parse().map_err(name("offer.workload"))?,
            generation: generation("offer.generation", offer.generation)?,
            policy: Policy {
                downtime_max: Duration::from_micros(policy.downtime_max_us),
                rounds_max,
                timeout: Duration::from_micros(policy.timeout_us),
                verify: policy.verify,
                force_eager: policy.force_eager,
                frozen_max: policy.frozen_max_us.map(Duration::from_micros),
            },
            description: description.try_into()?,
            network: network.map_err(name("offer.network"))?,
        })
    }
}
