//! CRIU's images: framing here, one module per image that is of use to us.
//!
//! An image is one or two magic numbers and then records, each a little-endian `u32` length and a
//! protobuf message. `pages-N.img` has no framing: it is page contents one after the other.
//!
//! Only what is needed is decoded. What is rewritten ([`pagemap`], [`mm`], [`file_locks`]) is
//! rewritten byte for byte, so that fields this crate has never heard of stay.

pub mod core;
pub mod file_locks;
pub mod inet;
pub mod inventory;
pub mod mm;
pub mod pagemap;
pub mod pstree;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Why an image could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    #[error("cannot read image {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write image {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("image {path} is malformed")]
    Malformed {
        path: PathBuf,
        #[source]
        source: FormatError,
    },
}

/// What is wrong with an image's bytes.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    #[error("the image is longer than {IMAGE_MAX} bytes")]
    TooLong,
    #[error("the image begins with {found:x?}, not with the magic numbers {expected:x?}")]
    Magic { expected: Vec<u32>, found: Vec<u8> },
    #[error("record {index} is cut off")]
    CutOff { index: usize },
    #[error("the image has no record")]
    Empty,
    #[error("cannot decode record {index}")]
    Record {
        index: usize,
        #[source]
        source: prost::DecodeError,
    },
    #[error("record {index} has an address or a count that cannot be")]
    Value { index: usize },
}

/// First number of every image but the inventory.
const MAGIC_COMMON: u32 = 0x5456_4319;

/// The records of an image whose magic numbers must be `magic`.
fn records<'a>(bytes: &'a [u8], magic: &[u32]) -> Result<Vec<&'a [u8]>, FormatError> {
    let header: Vec<u8> = magic
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    let Some(mut rest) = bytes.strip_prefix(header.as_slice()) else {
        let found = bytes.iter().take(header.len()).copied().collect();
        return Err(FormatError::Magic {
            expected: magic.to_vec(),
            found,
        });
    };
    let mut records = Vec::new();
    while !rest.is_empty() {
        let cut_off = FormatError::CutOff {
            index: records.len(),
        };
        let Some((length, after)) = rest.split_first_chunk() else {
            return Err(cut_off);
        };
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| cut_off.clone())?;
        let Some((record, after)) = after.split_at_checked(length) else {
            return Err(cut_off);
        };
        records.push(record);
        rest = after;
    }
    Ok(records)
}

fn decode<M: prost::Message + Default>(record: &[u8], index: usize) -> Result<M, FormatError> {
    M::decode(record).map_err(|source| FormatError::Record { index, source })
}

fn read_file(path: &Path) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(IMAGE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > IMAGE_MAX {
        Err(at(path)(FormatError::TooLong))
    } else {
        Ok(bytes)
    }
}

fn at(path: &Path) -> impl FnOnce(FormatError) -> ImageError {
    move |source| ImageError::Malformed {
        path: path.to_owned(),
        source,
    }
}

/// Longest image that is read into memory, in bytes. The largest is a process's `mm`: 65536 VMAs
/// of less than 100 bytes each.
const IMAGE_MAX: u64 = 64 << 20; // 64 MiB

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_told_apart_and_a_cut_is_noticed() {
        let image = [1, 0, 0, 0, 2, 0, 0, 0, 7, 8, 0, 0, 0, 0, 1, 0, 0, 0, 9];
        let found = records(&image, &[1]).expect("well formed");
        assert_eq!(found, [&[7, 8][..], &[], &[9]]);
        assert!(matches!(
            records(&image[..18], &[1]),
            Err(FormatError::CutOff { index: 2 })
        ));
        assert!(matches!(
            records(&image[..6], &[1]),
            Err(FormatError::CutOff { index: 0 })
        ));
        assert!(matches!(
            records(&image, &[2]),
            Err(FormatError::Magic { .. })
        ));
        assert!(records(&image[..4], &[1]).expect("no records").is_empty());
    }
}
