//! The messages of the control stream, as types.
//!
//! [`Message::encode`] makes a whole frame; [`Message::decode`] takes the bytes of one message
//! without the frame's length field. All validation is in `decode`: a message that exists is
//! legal. A field that this build does not know is skipped, a message it does not know is an
//! error.

mod error;
mod offer;
mod spans;

use std::time::Duration;

use prost::Message as _;

use crate::id::{Generation, Incarnation, MigrationId, NetworkName, Round, WorkloadName};
use crate::migration::policy::Policy;
use crate::migration::timeline::Spans;
use crate::page::PageCount;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::copied::COPIED_PATHS_MAX;
use crate::wire::description::WorkloadDescription;
use crate::wire::frame;
use crate::wire::schema;
use crate::wire::schema::envelope::Message as Wire;
use crate::wire::version::{Version, VersionError};
pub use error::ControlError;

/// Most lanes of one migration. A connection is bound to one core's worth of encryption; more
/// lanes than this only add connections.
pub const LANES_MAX: u32 = 16;

/// Most parcels of one round. A parcel holds up to 4 MiB, so this is 16 TiB of full parcels.
pub const ROUND_PARCELS_MAX: u32 = 1 << 22;

/// Most live sets, digest streams or image files of one final round.
pub const FINAL_STREAMS_MAX: u32 = 1 << 20;

/// Most file locks on shared storage of one workload; a database has one on each of its files.
pub const FINAL_LOCKS_MAX: u32 = 1 << 16;

/// Any message of a control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The first message on the first stream of every lane.
    Hello(Hello),
    /// Its answer.
    Welcome(Welcome),
    /// What only the source says.
    Source(SourceMessage),
    /// What only the target says.
    Target(TargetMessage),
}

/// The source names the migration and the lane it dialled for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The source's own version, not yet agreed.
    pub version: u32,
    /// The migration.
    pub migration: MigrationId,
    /// This lane, from 0.
    pub lane: u32,
    /// How many lanes the source will dial: 1 to [`LANES_MAX`].
    pub lanes: u32,
}

/// The target takes the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version to use from here on.
    pub version: Version,
}

/// What the source says to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceMessage {
    /// Nothing more will come; a restore that the target holds is not needed. Says that the
    /// source has not committed any generation up to this one, and never will.
    Abort {
        /// The highest generation that this ends.
        generation: Generation,
        /// Why.
        failure: Failure,
    },
    /// The final round is sent; restore.
    Final(Final),
    /// Run the workload: the source has committed, durably.
    Go {
        /// The committed generation.
        generation: Generation,
    },
    /// Will you take this workload?
    Offer(Box<Offer>),
    /// Do you run it? If not, refuse, durably.
    Query {
        /// The generation that was, or may have been, committed.
        generation: Generation,
    },
    /// All parcels of a round are sent.
    RoundEnd(RoundEnd),
    /// How this generation ended is on disk here: neither it nor an older one will be asked about
    /// again.
    Settled {
        /// The highest generation that this is about.
        generation: Generation,
    },
}

/// What the target says to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetMessage {
    /// The offer is accepted and everything is prepared.
    Accepted {
        /// Names the life of the target's process.
        incarnation: Incarnation,
        /// Of the folders that travel, those that the target has as their base says. The machine
        /// knows no folders: whoever performs it fills this in.
        kept: Vec<u32>,
        /// Whether it takes frames that come for the frozen workload; filled in likewise.
        parks: bool,
    },
    /// The offer is not accepted.
    Declined(Failure),
    /// The target gave up before it was ready.
    Failed(Failure),
    /// Everything of the final round has arrived and the target's pages are complete.
    FinalHeld {
        /// The generation of the final round.
        generation: Generation,
    },
    /// No answer is kept for a source that settled this.
    Forgotten {
        /// The settled generation.
        generation: Generation,
    },
    /// The workload is restored and held. This is on disk.
    Ready {
        /// The restored generation.
        generation: Generation,
        /// As in `Accepted`.
        incarnation: Incarnation,
    },
    /// The target will never run this generation or an older one. This is on disk.
    Refused {
        /// The refused generation.
        generation: Generation,
        /// Why, if that is still known.
        failure: Option<Failure>,
    },
    /// All parcels of the round are held.
    RoundHeld {
        /// The round.
        round: Round,
    },
    /// What the target has measured. No machine says or hears it: whoever performs one does, to a
    /// source whose offer says that it takes it.
    Spans(Box<Spans>),
    /// The workload runs at the target.
    Started {
        /// The started generation.
        generation: Generation,
        /// Its root in the target node's pid namespace. The machine knows no processes: whoever
        /// performs it fills this in.
        root_pid: Option<i32>,
    },
    /// The target's journal does not hold this generation's `Ready`. Neither a promise nor a
    /// refusal.
    Unknown {
        /// The generation that was asked about.
        generation: Generation,
    },
}

/// What the source offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The agreed version.
    pub version: Version,
    /// What is to move.
    pub workload: WorkloadName,
    /// The generation of the first attempt.
    pub generation: Generation,
    /// How it is to move.
    pub policy: Policy,
    /// What the target must know to prepare.
    pub description: WorkloadDescription,
    /// The network namespace at the target that it is to join; none: one is made for it.
    pub network: Option<NetworkName>,
    /// The source takes [`TargetMessage::Spans`].
    pub spans: bool,
}

/// How many parcels and pages a round had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// The round.
    pub round: Round,
    /// Parcels sent in it.
    pub parcels: u32,
    /// Pages in those parcels, zero pages too.
    pub pages: PageCount,
    /// Differences of folders that travel, sent in it.
    pub files: u32,
}

/// How many streams the final round had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Final {
    /// The generation that the round ends with.
    pub generation: Generation,
    /// The number of the final round.
    pub round: Round,
    /// Parcels sent in it.
    pub parcels: u32,
    /// Pages in those parcels, zero pages too.
    pub pages: PageCount,
    /// Live sets: one per space.
    pub live_sets: u32,
    /// Image files.
    pub images: u32,
    /// Digest streams: 0 unless `verify`.
    pub digests: u32,
    /// Whether the target must compare every live page with a digest before it restores.
    pub verify: bool,
    /// File locks that the source lets go of before it says `Go`, and the target takes then.
    pub locks: u32,
    /// Differences of folders that travel: one of each.
    pub files: u32,
}

impl Message {
    /// The frame that carries this message. Fails only for an offer whose description is too
    /// large.
    pub fn encode(&self) -> Result<Vec<u8>, ControlError> {
        let envelope = schema::Envelope {
            message: Some(self.to_schema()),
        };
        frame::enclose(&envelope.encode_to_vec()).map_err(ControlError::Frame)
    }

    /// The message in these bytes, which are a frame without its length field.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        let envelope = schema::Envelope::decode(bytes).map_err(ControlError::Decode)?;
        Self::try_from(envelope.message.ok_or(missing("message"))?)
    }

    fn to_schema(&self) -> Wire {
        match self {
            Self::Hello(hello) => Wire::Hello(schema::Hello {
                version: hello.version,
                migration: hello.migration.as_bytes().to_vec(),
                lane: hello.lane,
                lanes: hello.lanes,
            }),
            Self::Welcome(welcome) => Wire::Welcome(schema::Welcome {
                version: welcome.version.number(),
            }),
            Self::Source(message) => message.to_schema(),
            Self::Target(message) => message.to_schema(),
        }
    }
}

impl From<SourceMessage> for Message {
    fn from(message: SourceMessage) -> Self {
        Self::Source(message)
    }
}

impl From<TargetMessage> for Message {
    fn from(message: TargetMessage) -> Self {
        Self::Target(message)
    }
}

impl SourceMessage {
    fn to_schema(&self) -> Wire {
        match self {
            Self::Abort {
                generation,
                failure,
            } => Wire::Abort(schema::Abort {
                generation: generation.number(),
                failure: Some(failure.into()),
            }),
            Self::Final(end) => Wire::Final(schema::Final {
                generation: end.generation.number(),
                round: end.round.number(),
                parcels: end.parcels,
                pages: end.pages.0,
                live_sets: end.live_sets,
                images: end.images,
                digests: end.digests,
                verify: end.verify,
                locks: end.locks,
                files: end.files,
            }),
            Self::Go { generation } => Wire::Go(schema::Go {
                generation: generation.number(),
            }),
            Self::Offer(offer) => Wire::Offer(offer.as_ref().into()),
            Self::Query { generation } => Wire::Query(schema::Query {
                generation: generation.number(),
            }),
            Self::RoundEnd(end) => Wire::RoundEnd(schema::RoundEnd {
                round: end.round.number(),
                parcels: end.parcels,
                pages: end.pages.0,
                files: end.files,
            }),
            Self::Settled { generation } => Wire::Settled(schema::Settled {
                generation: generation.number(),
            }),
        }
    }
}

impl TargetMessage {
    fn to_schema(&self) -> Wire {
        match self {
            Self::Accepted {
                incarnation,
                kept,
                parks,
            } => Wire::Accepted(schema::Accepted {
                incarnation: incarnation.0,
                kept: kept.clone(),
                parks: *parks,
            }),
            Self::Declined(failure) => Wire::Declined(schema::Declined {
                failure: Some(failure.into()),
            }),
            Self::Failed(failure) => Wire::Failed(schema::Failed {
                failure: Some(failure.into()),
            }),
            Self::FinalHeld { generation } => Wire::FinalHeld(schema::FinalHeld {
                generation: generation.number(),
            }),
            Self::Forgotten { generation } => Wire::Forgotten(schema::Forgotten {
                generation: generation.number(),
            }),
            Self::Ready {
                generation,
                incarnation,
            } => Wire::Ready(schema::Ready {
                generation: generation.number(),
                incarnation: incarnation.0,
            }),
            Self::Refused {
                generation,
                failure,
            } => Wire::Refused(schema::Refused {
                generation: generation.number(),
                failure: failure.as_ref().map(Into::into),
            }),
            Self::RoundHeld { round } => Wire::RoundHeld(schema::RoundHeld {
                round: round.number(),
            }),
            Self::Spans(spans) => Wire::Spans(spans.as_ref().into()),
            Self::Started {
                generation,
                root_pid,
            } => Wire::Started(schema::Started {
                generation: generation.number(),
                root_pid: root_pid.unwrap_or(0),
            }),
            Self::Unknown { generation } => Wire::Unknown(schema::Unknown {
                generation: generation.number(),
            }),
        }
    }
}

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
                }
                .into()
            }
            Wire::Declined(declined) => {
                Target::Declined(failure("declined.failure", declined.failure)?).into()
            }
            Wire::Failed(failed) => {
                Target::Failed(failure("failed.failure", failed.failure)?).into()
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
            Wire::Spans(spans) => Target::Spans(Box::new(spans.try_into()?)).into(),
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
        })
    }
}

impl From<&Failure> for schema::Failure {
    fn from(failure: &Failure) -> Self {
        Self {
            code: failure.code().wire(),
            text: failure.text().to_owned(),
        }
    }
}

pub(crate) const fn missing(field: &'static str) -> ControlError {
    ControlError::Missing { field }
}

pub(crate) fn short(field: &'static str, length: usize, max: usize) -> Result<(), ControlError> {
    if max < length {
        Err(ControlError::TooLong { field, length, max })
    } else {
        Ok(())
    }
}

/// Whole microseconds; what does not fit (half a million years) becomes the most that does.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn failure(field: &'static str, wire: Option<schema::Failure>) -> Result<Failure, ControlError> {
    let wire = wire.ok_or(missing(field))?;
    short(field, wire.text.len(), Failure::TEXT_BYTES_MAX)?;
    let code = ErrorCode::from_wire(wire.code);
    let code = code.ok_or(ControlError::Invalid { field, value: 0 })?;
    Ok(Failure::new(code, wire.text))
}

fn generation(field: &'static str, number: u32) -> Result<Generation, ControlError> {
    Generation::new(number).map_err(|source| ControlError::Name { field, source })
}

fn round(field: &'static str, number: u32) -> Result<Round, ControlError> {
    Round::new(number).map_err(|source| ControlError::Name { field, source })
}

fn at_most(field: &'static str, found: u32, max: u32) -> Result<u32, ControlError> {
    let value = found.into();
    if max < found {
        return Err(ControlError::Invalid { field, value });
    }
    Ok(found)
}
