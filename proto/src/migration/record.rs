//! What the journal keeps of a migration.
//!
//! A machine asks for a record to be written, and acts on it only when it is told that the
//! record is durable. After a restart the records, in the order they were written, are all that
//! a machine is rebuilt from; what the driver needs to find the workload again travels in the
//! opaque [`DriverState`].
//!
//! How records are framed, checked and fsynced is the journal's business.

use std::time::Duration;

use prost::Message as _;

use crate::id::{Generation, IdError, Incarnation, MigrationId, NodeName, WorkloadName};
use crate::migration::policy::{Mode, OnTimeout, Policy, ROUNDS_LIMIT};
use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::micros;
use schema::record::Entry as Wire;

/// The first byte of a record's bytes. 0 is never valid.
pub const FORMAT: u8 = 1;

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The migration it belongs to.
    pub migration: MigrationId,
    /// What happened.
    pub entry: Entry,
}

/// What happened. The comment says who writes it and what it permits once it is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Source: a migration has begun. Permits to dial.
    Offered(OfferedEntry),
    /// Source: the target may run this generation. Permits `Go`; forbids to thaw.
    Commit {
        /// The committed generation.
        generation: Generation,
        /// Pages of it were not sent: the frozen copy is kept until [`Entry::Filled`], or until
        /// that is lost.
        drains: bool,
    },
    /// Source: the target runs the workload. Permits to kill the frozen copy, unless that drains;
    /// then it forbids to thaw it, for whatever reason.
    Started {
        /// The started generation.
        generation: Generation,
    },
    /// Source: the operator declared the target dead. Permits to thaw a committed workload.
    Fenced {
        /// The committed generation that the target will never run.
        generation: Generation,
    },
    /// Target: the offer is accepted. Permits `Accepted`.
    Accepted(AcceptedEntry),
    /// Target: the workload is restored and held. Permits `Ready`.
    Ready(ReadyEntry),
    /// Target: the workload runs here. Permits to let it go; forbids to refuse.
    Running {
        /// The generation that runs.
        generation: Generation,
    },
    /// Target: the workload will never run here. Permits `Refused`; forbids to let it go.
    Refused {
        /// The refused generation.
        generation: Generation,
    },
    /// Target: the source knows how this generation ended, and never asks again. Permits to forget
    /// it.
    Settled {
        /// The generation that ran or was refused.
        generation: Generation,
    },
    /// Both: all memory of what runs at the target is there. At the target it permits to say so, at
    /// the source to kill the frozen copy.
    Filled {
        /// The generation that runs.
        generation: Generation,
    },
    /// Both: the migration failed. At the source after a `Commit` this stands for the target's
    /// durable refusal, and permits to thaw. After `Started`, or at a target after `Running`, with
    /// the code `lost-in-drain`: pages of what ran are lost, and it runs nowhere any more.
    Aborted(Failure),
    /// Both: nothing is left to do.
    Done,
}

/// The beginning of a migration at its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedEntry {
    /// What moves.
    pub workload: WorkloadName,
    /// The target's node.
    pub peer: NodeName,
    /// How it moves.
    pub policy: Policy,
    /// It is held before its freeze.
    pub hold: bool,
    /// What the driver needs to find the workload again.
    pub state: DriverState,
}

/// The beginning of a migration at its target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptedEntry {
    /// What moves.
    pub workload: WorkloadName,
    /// The source's node.
    pub peer: NodeName,
    /// This life of the target.
    pub incarnation: Incarnation,
    /// What the driver needs to find what it prepared.
    pub state: DriverState,
}

/// A restored and held workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyEntry {
    /// The restored generation.
    pub generation: Generation,
    /// This life of the target.
    pub incarnation: Incarnation,
    /// Pages of it are missing, which only the source has.
    pub drains: bool,
    /// What the driver needs to find the held workload.
    pub state: DriverState,
}

/// Bytes that only the driver understands: at most [`DriverState::BYTES_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriverState(Vec<u8>);

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// No bytes.
    #[error("record of no bytes")]
    Empty,
    /// A format that this build does not read.
    #[error("record format {0} is not {FORMAT}")]
    Format(u8),
    /// Not readable.
    #[error("record is not readable")]
    Decode(#[source] prost::DecodeError),
    /// A field that is missing or never valid.
    #[error("field {0} of the record is not valid")]
    Field(&'static str),
    /// A field that is not a name.
    #[error("field {field} of the record is not a name")]
    Name {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: IdError,
    },
    /// A driver's state that is too long.
    #[error("driver state of {0} bytes, more than {max}", max = DriverState::BYTES_MAX)]
    StateTooLong(usize),
}

impl DriverState {
    /// Longest state, in bytes (256 KiB): a few paths, and 8 bytes for each of the pids that a
    /// description may have.
    pub const BYTES_MAX: usize = 256 << 10;

    /// The state with these bytes.
    pub fn new(bytes: Vec<u8>) -> Result<Self, RecordError> {
        if Self::BYTES_MAX < bytes.len() {
            return Err(RecordError::StateTooLong(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Record {
    /// Its bytes: [`FORMAT`], then the record.
    pub fn to_bytes(&self) -> Vec<u8> {
        let record = schema::Record {
            migration: self.migration.as_bytes().to_vec(),
            entry: Some(self.entry.to_schema()),
        };
        let mut bytes = vec![FORMAT];
        bytes.extend(record.encode_to_vec());
        bytes
    }

    /// The record in these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let (&format, bytes) = bytes.split_first().ok_or(RecordError::Empty)?;
        if format != FORMAT {
            return Err(RecordError::Format(format));
        }
        let record = schema::Record::decode(bytes).map_err(RecordError::Decode)?;
        let migration = record
            .migration
            .try_into()
            .map_err(|_| RecordError::Field("migration"))?;
        let entry = record.entry.ok_or(RecordError::Field("entry"))?;
        Ok(Self {
            migration: MigrationId::new(migration),
            entry: entry.try_into()?,
        })
    }
}

impl Entry {
    /// A word for logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Offered(_) => "offered",
            Self::Commit { .. } => "commit",
            Self::Started { .. } => "started",
            Self::Fenced { .. } => "fenced",
            Self::Accepted(_) => "accepted",
            Self::Ready(_) => "ready",
            Self::Running { .. } => "running",
            Self::Refused { .. } => "refused",
            Self::Settled { .. } => "settled",
            Self::Filled { .. } => "filled",
            Self::Aborted(_) => "aborted",
            Self::Done => "done",
        }
    }

    fn to_schema(&self) -> Wire {
        let number = |generation: &Generation| schema::Generation {
            generation: generation.number(),
        };
        match self {
            Self::Offered(offered) => Wire::Offered(schema::Offered {
                workload: offered.workload.to_string(),
                peer: offered.peer.to_string(),
                downtime_max_us: micros(offered.policy.downtime_max),
                rounds_max: offered.policy.rounds_max,
                timeout_us: micros(offered.policy.timeout),
                verify: offered.policy.verify,
                force_eager: offered.policy.force_eager,
                frozen_max_us: offered.policy.frozen_max.map(micros),
                hold: offered.hold,
                mode: offered.policy.mode.number(),
                on_timeout: offered.policy.on_timeout.number(),
                downtime_bound_us: offered.policy.downtime_bound.map(micros),
                state: offered.state.0.clone(),
            }),
            Self::Commit { generation, drains } => match drains {
                false => Wire::Commit(number(generation)),
                true => Wire::CommitDraining(number(generation)),
            },
            Self::Started { generation } => Wire::Started(number(generation)),
            Self::Fenced { generation } => Wire::Fenced(number(generation)),
            Self::Accepted(accepted) => Wire::Accepted(schema::Accepted {
                workload: accepted.workload.to_string(),
                peer: accepted.peer.to_string(),
                incarnation: accepted.incarnation.0,
                state: accepted.state.0.clone(),
            }),
            Self::Ready(ready) => Wire::Ready(schema::Ready {
                generation: ready.generation.number(),
                incarnation: ready.incarnation.0,
                drains: ready.drains,
                state: ready.state.0.clone(),
            }),
            Self::Running { generation } => Wire::Running(number(generation)),
            Self::Refused { generation } => Wire::Refused(number(generation)),
            Self::Settled { generation } => Wire::Settled(number(generation)),
            Self::Filled { generation } => Wire::Filled(number(generation)),
            Self::Aborted(failure) => Wire::Aborted(schema::Aborted {
                code: failure.code().wire(),
                text: failure.text().to_owned(),
            }),
            Self::Done => Wire::Done(schema::Done {}),
        }
    }
}

impl TryFrom<Wire> for Entry {
    type Error = RecordError;

    fn try_from(wire: Wire) -> Result<Self, RecordError> {
        Ok(match wire {
            Wire::Offered(offered) => Self::Offered(offered.try_into()?),
            Wire::Commit(wire) => Self::Commit {
                generation: generation(wire.generation)?,
                drains: false,
            },
            Wire::CommitDraining(wire) => Self::Commit {
                generation: generation(wire.generation)?,
                drains: true,
            },
            Wire::Started(wire) => Self::Started {
                generation: generation(wire.generation)?,
            },
            Wire::Fenced(wire) => Self::Fenced {
                generation: generation(wire.generation)?,
            },
            Wire::Accepted(accepted) => Self::Accepted(AcceptedEntry {
                workload: workload(&accepted.workload)?,
                peer: peer(&accepted.peer)?,
                incarnation: Incarnation(accepted.incarnation),
                state: DriverState::new(accepted.state)?,
            }),
            Wire::Ready(ready) => Self::Ready(ReadyEntry {
                generation: generation(ready.generation)?,
                incarnation: Incarnation(ready.incarnation),
                drains: ready.drains,
                state: DriverState::new(ready.state)?,
            }),
            Wire::Running(wire) => Self::Running {
                generation: generation(wire.generation)?,
            },
            Wire::Refused(wire) => Self::Refused {
                generation: generation(wire.generation)?,
            },
            Wire::Settled(wire) => Self::Settled {
                generation: generation(wire.generation)?,
            },
            Wire::Filled(wire) => Self::Filled {
                generation: generation(wire.generation)?,
            },
            Wire::Aborted(aborted) => {
                let code = ErrorCode::from_wire(aborted.code);
                Self::Aborted(Failure::new(
                    code.ok_or(RecordError::Field("code"))?,
                    aborted.text,
                ))
            }
            Wire::Done(schema::Done {}) => Self::Done,
        })
    }
}

impl TryFrom<schema::Offered> for OfferedEntry {
    type Error = RecordError;

    fn try_from(offered: schema::Offered) -> Result<Self, RecordError> {
        if offered.rounds_max == 0 || ROUNDS_LIMIT < offered.rounds_max {
            return Err(RecordError::Field("rounds_max"));
        }
        Ok(Self {
            workload: workload(&offered.workload)?,
            peer: peer(&offered.peer)?,
            policy: Policy {
                downtime_max: Duration::from_micros(offered.downtime_max_us),
                rounds_max: offered.rounds_max,
                timeout: Duration::from_micros(offered.timeout_us),
                verify: offered.verify,
                force_eager: offered.force_eager,
                frozen_max: offered.frozen_max_us.map(Duration::from_micros),
                mode: Mode::from_number(offered.mode).ok_or(RecordError::Field("mode"))?,
                on_timeout: OnTimeout::from_number(offered.on_timeout)
                    .ok_or(RecordError::Field("on_timeout"))?,
                downtime_bound: offered.downtime_bound_us.map(Duration::from_micros),
            },
            hold: offered.hold,
            state: DriverState::new(offered.state)?,
        })
    }
}

fn generation(number: u32) -> Result<Generation, RecordError> {
    let name = |source| RecordError::Name {
        field: "generation",
        source,
    };
    Generation::new(number).map_err(name)
}

fn workload(text: &str) -> Result<WorkloadName, RecordError> {
    text.parse().map_err(|source| RecordError::Name {
        field: "workload",
        source,
    })
}

fn peer(text: &str) -> Result<NodeName, RecordError> {
    text.parse().map_err(|source| RecordError::Name {
        field: "peer",
        source,
    })
}

/// The generated structs. They never leave this module.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod schema {
    include!(concat!(env!("OUT_DIR"), "/pageferry.journal.rs"));
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
