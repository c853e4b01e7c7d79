//! Messages from the schema's form: all validation is here.

use super::{
    ControlError, FINAL_LOCKS_MAX, FINAL_STREAMS_MAX, Final, Hello, LANES_MAX, Message,
    ROUND_PARCELS_MAX, RoundEnd, SourceMessage, TargetMessage, Welcome, at_most, failure,
    generation, round, short,
};
use crate::id::{Generation, Incarnation, MigrationId};
use crate::page::PageCount;
use crate::wire::code::Failure;
use crate::wire::copied::COPIED_PATHS_MAX;
use crate::wire::schema;
use crate::wire::schema::envelope::Message as Wire;
use crate::wire::version::{Version, VersionError};

impl TryFrom<Wire> for Message {
    type Error = ControlError;

    // One arm for each message there is.
    #[allow(clippy::too_many_lines)]
    fn try_from(wire: Wire) -> Result<Self, ControlError> {
        use {SourceMessage as Source, TargetMessage as Target};
        Ok(match wire {
            Wire::Hello(hello) => Self::Hello(hello.try_into()?),
            Wire::Welcome(welcome) => Self::Welcome(Welcome {
                version: Version::chosen(welcome.version).map_err(ControlError::Version)?,
            }),
            Wire::Abort(abort) => {
                let failure = failure("abort.failure", abort.failure)?;
                let generation = generation("abort.generation", abort.generation)?;
                Source::Abort {
                    generation,
                    failure,
                }
                .into()
            }
            Wire::Draining(draining) => {
                let generation = generation("draining.generation", draining.generation)?;
                Source::Draining { generation }.into()
            }
            Wire::SourceDrainLost(lost) => {
                let (generation, failure) = drain_lost(lost)?;
                Source::DrainLost {
                    generation,
                    failure,
                }
                .into()
            }
            Wire::Final(end) => Source::Final(end.try_into()?).into(),
            Wire::Go(go) => Source::Go {
                generation: generation("go.generation", go.generation)?,
            }
            .into(),
            Wire::Offer(offer) => Source::Offer(Box::new(offer.try_into()?)).into(),
            Wire::Query(query) => {
                let generation = generation("query.generation", query.generation)?;
                Source::Query { generation }.into()
            }
            Wire::RoundEnd(end) => Source::RoundEnd(end.try_into()?).into(),
            Wire::Settled(settled) => {
                let generation = generation("settled.generation", settled.generation)?;
                Source::Settled { generation }.into()
            }
            Wire::Accepted(accepted) => {
                short("accepted.kept", accepted.kept.len(), COPIED_PATHS_MAX)?;
                Target::Accepted {
                    incarnation: Incarnation(accepted.incarnation),
                    kept: accepted.kept,
                    parks: accepted.parks,
                    drains: accepted.drains,
                }
                .into()
            }
            Wire::Declined(declined) => {
                Target::Declined(failure("declined.failure", declined.failure)?).into()
            }
            Wire::Failed(failed) => {
                Target::Failed(failure("failed.failure", failed.failure)?).into()
            }
            Wire::TargetDrainLost(lost) => {
                let (generation, failure) = drain_lost(lost)?;
                Target::DrainLost {
                    generation,
                    failure,
                }
                .into()
            }
            Wire::Fetch(fetch) => Target::Fetch(fetch.try_into()?).into(),
            Wire::Filled(filled) => {
                let generation = generation("filled.generation", filled.generation)?;
                Target::Filled { generation }.into()
            }
            Wire::FinalHeld(held) => {
                let generation = generation("final_held.generation", held.generation)?;
                Target::FinalHeld { generation }.into()
            }
            Wire::Forgotten(forgotten) => {
                let generation = generation("forgotten.generation", forgotten.generation)?;
                Target::Forgotten { generation }.into()
            }
            Wire::Ready(ready) => {
                let generation = generation("ready.generation", ready.generation)?;
                Target::Ready {
                    generation,
                    incarnation: Incarnation(ready.incarnation),
                }
                .into()
            }
            Wire::Refused(refused) => {
                let why = |wire| failure("refused.failure", Some(wire));
                Target::Refused {
                    generation: generation("refused.generation", refused.generation)?,
                    failure: refused.failure.map(why).transpose()?,
                }
                .into()
            }
            Wire::RoundHeld(held) => Target::RoundHeld {
                round: round("round_held.round", held.round)?,
            }
            .into(),
            Wire::Started(started) => {
                let generation = generation("started.generation", started.generation)?;
                Target::Started {
                    generation,
                    root_pid: Some(started.root_pid).filter(|pid| *pid > 0),
                }
                .into()
            }
            Wire::Unknown(unknown) => {
                let generation = generation("unknown.generation", unknown.generation)?;
                Target::Unknown { generation }.into()
            }
        })
    }
}

impl TryFrom<schema::Hello> for Hello {
    type Error = ControlError;

    fn try_from(hello: schema::Hello) -> Result<Self, ControlError> {
        let invalid = |field, value| ControlError::Invalid { field, value };
        let length = hello.migration.len();
        let migration = <[u8; MigrationId::BYTES]>::try_from(hello.migration)
            .map_err(|_| invalid("hello.migration", length.try_into().unwrap_or(i64::MAX)))?;
        if hello.version == 0 {
            return Err(ControlError::Version(VersionError::Zero));
        }
        if hello.lanes == 0 || LANES_MAX < hello.lanes {
            return Err(invalid("hello.lanes", hello.lanes.into()));
        }
        if hello.lanes <= hello.lane {
            return Err(invalid("hello.lane", hello.lane.into()));
        }
        Ok(Self {
            version: hello.version,
            migration: MigrationId::new(migration),
            lane: hello.lane,
            lanes: hello.lanes,
        })
    }
}

impl TryFrom<schema::RoundEnd> for RoundEnd {
    type Error = ControlError;

    fn try_from(end: schema::RoundEnd) -> Result<Self, ControlError> {
        Ok(Self {
            round: round("round_end.round", end.round)?,
            parcels: at_most("round_end.parcels", end.parcels, ROUND_PARCELS_MAX)?,
            pages: PageCount(end.pages),
            files: at_most("round_end.files", end.files, COPIED_PATHS_MAX as u32)?,
        })
    }
}

impl TryFrom<schema::Final> for Final {
    type Error = ControlError;

    fn try_from(end: schema::Final) -> Result<Self, ControlError> {
        if !end.verify && end.digests != 0 {
            let value = end.digests.into();
            return Err(ControlError::Invalid {
                field: "final.digests",
                value,
            });
        }
        let absent = (end.absent_sets, end.absent_pages);
        if (absent.0 == 0) != (absent.1 == 0) || (end.verify && absent.0 != 0) {
            let value = absent.0.into();
            return Err(ControlError::Invalid {
                field: "final.absent_sets",
                value,
            });
        }
        Ok(Self {
            generation: generation("final.generation", end.generation)?,
            round: round("final.round", end.round)?,
            parcels: at_most("final.parcels", end.parcels, ROUND_PARCELS_MAX)?,
            pages: PageCount(end.pages),
            live_sets: at_most("final.live_sets", end.live_sets, FINAL_STREAMS_MAX)?,
            images: at_most("final.images", end.images, FINAL_STREAMS_MAX)?,
            digests: at_most("final.digests", end.digests, FINAL_STREAMS_MAX)?,
            verify: end.verify,
            locks: at_most("final.locks", end.locks, FINAL_LOCKS_MAX)?,
            files: at_most("final.files", end.files, COPIED_PATHS_MAX as u32)?,
            absent_sets: at_most("final.absent_sets", end.absent_sets, end.live_sets)?,
            absent_pages: PageCount(end.absent_pages),
        })
    }
}

fn drain_lost(lost: schema::DrainLost) -> Result<(Generation, Failure), ControlError> {
    let generation = generation("drain_lost.generation", lost.generation)?;
    let failure = failure("drain_lost.failure", lost.failure)?;
    Ok((generation, failure))
}
