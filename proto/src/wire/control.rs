//! The messages of the control stream, as types.
//!
//! [`Message::encode`] makes a whole frame; [`Message::decode`] takes the bytes of one message
//! without the frame's length field. All validation is in `decode`: a message that exists is
//! legal. A field that this build does not know is skipped, a message it does not know is an
//! error.

mod decode;
mod error;
mod fetch;
mod offer;

use std::time::Duration;

use prost::Message as _;

use crate::id::{Generation, Incarnation, MigrationId, NetworkName, Round, WorkloadName};
use crate::migration::policy::Policy;
use crate::page::PageCount;
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::description::WorkloadDescription;
use crate::wire::frame;
use crate::wire::schema;
use crate::wire::schema::envelope::Message as Wire;
use crate::wire::version::Version;
pub use error::ControlError;
pub use fetch::{FETCH_PAGES_MAX, FETCH_RUNS_MAX, Fetch};

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
    /// What only the frozen copy has of the workload is lost, or may be: has the target all of it?
    DrainLost {
        /// The generation that runs at the target.
        generation: Generation,
        /// What is lost.
        failure: Failure,
    },
    /// The workload is known to run at the target; the frozen copy is kept until all pages of it
    /// are there.
    Draining {
        /// The generation that runs.
        generation: Generation,
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
        /// Whether the workload may come with pages missing; filled in likewise.
        drains: bool,
    },
    /// The offer is not accepted.
    Declined(Failure),
    /// Pages of what runs here are lost for good, and it does not run on. This is on disk.
    DrainLost {
        /// The generation that ran.
        generation: Generation,
        /// What is lost.
        failure: Failure,
    },
    /// The target gave up before it was ready.
    Failed(Failure),
    /// Pages that the target wants of those that the source has not sent. The machines know
    /// nothing of it: drivers ask and answer.
    Fetch(Fetch),
    /// All pages of what runs here are here. This is on disk.
    Filled {
        /// The generation that runs.
        generation: Generation,
    },
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
    /// Streams that name live pages which are not sent: at most one per space.
    pub absent_sets: u32,
    /// Pages in those.
    pub absent_pages: PageCount,
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
            Self::DrainLost {
                generation,
                failure,
            } => Wire::SourceDrainLost(drain_lost(*generation, failure)),
            Self::Draining { generation } => Wire::Draining(schema::Draining {
                generation: generation.number(),
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
                absent_sets: end.absent_sets,
                absent_pages: end.absent_pages.0,
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
                drains,
            } => Wire::Accepted(schema::Accepted {
                incarnation: incarnation.0,
                kept: kept.clone(),
                parks: *parks,
                drains: *drains,
            }),
            Self::Declined(failure) => Wire::Declined(schema::Declined {
                failure: Some(failure.into()),
            }),
            Self::DrainLost {
                generation,
                failure,
            } => Wire::TargetDrainLost(drain_lost(*generation, failure)),
            Self::Failed(failure) => Wire::Failed(schema::Failed {
                failure: Some(failure.into()),
            }),
            Self::Fetch(fetch) => Wire::Fetch(fetch.into()),
            Self::Filled { generation } => Wire::Filled(schema::Filled {
                generation: generation.number(),
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

impl From<&Failure> for schema::Failure {
    fn from(failure: &Failure) -> Self {
        Self {
            code: failure.code().wire(),
            text: failure.text().to_owned(),
        }
    }
}

fn drain_lost(generation: Generation, failure: &Failure) -> schema::DrainLost {
    schema::DrainLost {
        generation: generation.number(),
        failure: Some(failure.into()),
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
