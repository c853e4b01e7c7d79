//! Folders that travel with the workload.
//!
//! What is on their streams is not this crate's: it is told by kind, folder and round, and counted.

use crate::id::{IdError, Round};
use crate::wire::control::{ControlError, missing, short};
use crate::wire::description::PATH_BYTES_MAX;
use crate::wire::schema;

/// Most folders that travel with one workload.
pub const COPIED_PATHS_MAX: usize = 64;

/// Most bytes of one difference of one folder, in bytes (16 TiB).
pub const FILES_BYTES_MAX: u64 = 16 << 40;

/// A folder that travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedPath {
    /// Where it is at the source, and is to be at the target; absolute.
    pub path: String,
    /// How many entries it has.
    pub entries: u64,
    /// What its files take on disk, in bytes.
    pub bytes: u64,
    /// What the target had of it when it left there, if it did.
    pub base: Option<[u8; 32]>,
}

/// What precedes a difference on its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilesHeader {
    /// The round that it is of.
    pub round: Round,
    /// Which folder of the description it is of, from 0.
    pub folder: u32,
}

impl FilesHeader {
    /// Length of the header, in bytes.
    pub const BYTES: usize = 8;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.round.number().to_le_bytes());
        bytes[4..].copy_from_slice(&self.folder.to_le_bytes());
        bytes
    }

    /// The header that these bytes are.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, IdError> {
        let [a, b, c, d, folder @ ..] = bytes;
        Ok(Self {
            round: Round::new(u32::from_le_bytes([a, b, c, d]))?,
            folder: u32::from_le_bytes(folder),
        })
    }
}

impl From<&CopiedPath> for schema::CopiedPath {
    fn from(copied: &CopiedPath) -> Self {
        Self {
            path: copied.path.clone(),
            entries: copied.entries,
            bytes: copied.bytes,
            base: copied.base.map(Vec::from).unwrap_or_default(),
        }
    }
}

impl TryFrom<schema::CopiedPath> for CopiedPath {
    type Error = ControlError;

    fn try_from(wire: schema::CopiedPath) -> Result<Self, ControlError> {
        let parts = wire.path.strip_prefix('/').unwrap_or_default();
        // What is beside it is called by its name.
        if parts.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(missing("copied path"));
        }
        if wire.path.contains('\0') {
            return Err(missing("copied path"));
        }
        short("copied path", wire.path.len(), PATH_BYTES_MAX)?;
        let length = i64::try_from(wire.base.len()).unwrap_or(i64::MAX);
        let base = match wire.base.is_empty() {
            true => None,
            false => Some(wire.base.try_into().map_err(|_| ControlError::Invalid {
                field: "copied.base",
                value: length,
            })?),
        };
        Ok(Self {
            path: wire.path,
            entries: wire.entries,
            bytes: wire.bytes,
            base,
        })
    }
}
