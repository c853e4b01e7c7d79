//! `pstree.img`: the dumped tree.

use std::path::Path;

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// A process of the tree; the first one is the root. All numbers are as seen in the tree's own pid
/// namespace.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Process {
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// 0 for the root.
    #[prost(uint32, required, tag = "2")]
    pub parent: u32,
    #[prost(uint32, required, tag = "3")]
    pub group: u32,
    #[prost(uint32, required, tag = "4")]
    pub session: u32,
    /// With the main thread, whose number is `pid`.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// Reads `pstree.img` of an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path) -> Result<Vec<Process>, ImageError> {
    let path = images.join("pstree.img");
    parse(&read_file(&path)?).map_err(at(&path))
}

fn parse(bytes: &[u8]) -> Result<Vec<Process>, FormatError> {
    let records = records(bytes, &[MAGIC_COMMON, MAGIC])?;
    records
        .iter()
        .enumerate()
        .map(|(index, record)| decode(record, index))
        .collect()
}

const MAGIC: u32 = 0x5027_3030;
