//! `inventory.img`: what kind of dump this is.

use std::path::Path;

use super::{FormatError, ImageError, at, decode, read_file, records};

/// The fields of use to us.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Inventory {
    /// 2 for CRIU 4.
    #[prost(uint32, required, tag = "1")]
    pub image_version: u32,
    /// When the dump was made, in microseconds of uptime.
    #[prost(uint64, optional, tag = "8")]
    pub dump_uptime: Option<u64>,
    /// The lock restore will undo: 1 iptables, 2 nftables, 3 none.
    #[prost(uint32, optional, tag = "11")]
    pub network_lock: Option<u32>,
}

/// Reads `inventory.img` of an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path) -> Result<Inventory, ImageError> {
    let path = images.join("inventory.img");
    parse(&read_file(&path)?).map_err(at(&path))
}

fn parse(bytes: &[u8]) -> Result<Inventory, FormatError> {
    let records = records(bytes, &[MAGIC])?;
    decode(records.first().ok_or(FormatError::Empty)?, 0)
}

/// The only image without the common magic number.
const MAGIC: u32 = 0x5831_3116;
