//! What comes first on a unidirectional stream, and what the streams other than parcels hold.
//!
//! A stream is a prefix of [`StreamPrefix::BYTES`], a body, and the crc32 of the body
//! ([`seal`], [`unseal`]). The prefix is outside the checksum because it is read before anybody
//! knows whom the body is for.

use crate::id::{Generation, IdError, MemberIndex, MigrationId, SpaceId};
use crate::set;

/// Longest digests stream, in bytes, prefix and checksum included (4 MiB).
pub const DIGESTS_BYTES_MAX: usize = 4 << 20;

/// Most pages of one digests stream: 1 MiB of digests, and a set of at most 2 MiB
/// ([`set::RUN_BYTES_MAX`] a page when no two of them touch), which keeps a stream below
/// [`DIGESTS_BYTES_MAX`] whatever the set looks like.
pub const DIGESTS_PAGES_MAX: u64 = 1 << 17;

/// Length of one digest, in bytes: xxh3-64, little endian.
pub const DIGEST_BYTES: usize = 8;

/// Longest image file, in bytes (64 GiB). Large images hold memory that only CRIU copies, and
/// the target must hold that in memory.
pub const IMAGE_BYTES_MAX: u64 = 64 << 30;

/// Length of the checksum that ends every stream, in bytes.
pub const CHECKSUM_BYTES: usize = 4;

/// What a stream carries. 0 is never valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StreamKind {
    /// Pages.
    Parcel = 1,
    /// The live pages of a space in the freeze.
    LiveSet = 2,
    /// A file of CRIU's images.
    ImageFile = 3,
    /// One digest per page of a set.
    Digests = 4,
    /// What a folder has that the target lacks.
    Files = 5,
    /// Frames that came for a workload that stands still.
    Parked = 6,
    /// The live pages of a space that are not sent.
    AbsentSet = 7,
    /// Pages that the target asked for.
    Fetched = 8,
}

/// The first bytes of every stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamPrefix {
    /// What the stream carries.
    pub kind: StreamKind,
    /// The migration it belongs to.
    pub migration: MigrationId,
}

/// What precedes a set of pages: on a stream of a live or absent set that is all there is, on a
/// digests stream one digest per page follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetHeader {
    /// The attempt that the set belongs to.
    pub generation: Generation,
    /// The space that the pages are of.
    pub space: SpaceId,
    /// Length of the set's wire form, in bytes: at most [`set::WIRE_BYTES_MAX`].
    pub length: u32,
}

/// What precedes an image file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFileHeader {
    generation: Generation,
    name: ImageName,
    length: u64,
}

/// The name of an image file: 1 to 255 of `A-Za-z0-9._-`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(String);

/// Why the bytes of a stream are not what its kind says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The stream ended early.
    #[error("stream has {length} bytes where {needed} are needed")]
    Truncated {
        /// Bytes there are.
        length: usize,
        /// Bytes there must be.
        needed: usize,
    },
    /// No kind has this number.
    #[error("stream kind {0} is not known")]
    Kind(u8),
    /// Bytes and checksum differ.
    #[error("stream has checksum {found:#010x}, its bytes have {computed:#010x}")]
    Checksum {
        /// The checksum at the end of the stream.
        found: u32,
        /// The checksum of its bytes.
        computed: u32,
    },
    /// A generation that is never valid.
    #[error("stream belongs to no attempt")]
    Generation(#[source] IdError),
    /// A set longer than its limit.
    #[error("set of {0} bytes, more than {max}", max = set::WIRE_BYTES_MAX)]
    SetTooLong(u32),
    /// An image file longer than its limit.
    #[error("image file of {0} bytes, more than {IMAGE_BYTES_MAX}")]
    ImageTooLong(u64),
    /// Not a name of an image file.
    #[error("image file name {0:?} is not 1 to 255 of A-Za-z0-9._- after a first without a dot")]
    ImageName(String),
    /// A link that no workload has.
    #[error("a parked frame of link {0}: a workload has at most 16")]
    Link(u8),
    /// A frame that is too short or too long to be one.
    #[error("a parked frame of {0} bytes")]
    Frame(usize),
}

impl StreamKind {
    const fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Parcel),
            2 => Some(Self::LiveSet),
            3 => Some(Self::ImageFile),
            4 => Some(Self::Digests),
            5 => Some(Self::Files),
            6 => Some(Self::Parked),
            7 => Some(Self::AbsentSet),
            8 => Some(Self::Fetched),
            0 | 9..=u8::MAX => None,
        }
    }
}

impl StreamPrefix {
    /// Length of the prefix, in bytes.
    pub const BYTES: usize = 1 + MigrationId::BYTES;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (kind, migration) = bytes.split_at_mut(1);
        kind[0] = self.kind as u8;
        migration.copy_from_slice(self.migration.as_bytes());
        bytes
    }

    /// The prefix in these bytes.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, StreamError> {
        let (kind, migration) = bytes.split_first_chunk::<1>().expect("1 is at most 17");
        let kind = StreamKind::from_wire(kind[0]).ok_or(StreamError::Kind(kind[0]))?;
        let migration = migration
            .try_into()
            .expect("17 less 1 are the bytes of an id");
        Ok(Self {
            kind,
            migration: MigrationId::new(migration),
        })
    }
}

impl SetHeader {
    /// Length of the header, in bytes.
    pub const BYTES: usize = 12;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.generation.number().to_le_bytes());
        bytes[4..8].copy_from_slice(&self.space.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The header at the start of these bytes, and what follows it.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), StreamError> {
        let mut rest = bytes;
        let generation = take_generation(&mut rest)?;
        let space = SpaceId(u32::from_le_bytes(take(&mut rest)?));
        let length = u32::from_le_bytes(take(&mut rest)?);
        if set::WIRE_BYTES_MAX < length as usize {
            return Err(StreamError::SetTooLong(length));
        }
        let header = Self {
            generation,
            space,
            length,
        };
        Ok((header, rest))
    }
}

impl ImageFileHeader {
    /// Length of what comes before the name and says how long that is, in bytes.
    pub const START_BYTES: usize = 4 + 1;

    /// Longest header, in bytes.
    pub const BYTES_MAX: usize = Self::START_BYTES + ImageName::BYTES_MAX + 8;

    /// The header of a file of `length` bytes.
    pub fn new(generation: Generation, name: ImageName, length: u64) -> Result<Self, StreamError> {
        if IMAGE_BYTES_MAX < length {
            return Err(StreamError::ImageTooLong(length));
        }
        Ok(Self {
            generation,
            name,
            length,
        })
    }

    /// The attempt that the file belongs to.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The file's name.
    pub const fn name(&self) -> &ImageName {
        &self.name
    }

    /// The file's length, in bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Length of the header that begins with these bytes, in bytes.
    pub fn bytes(start: &[u8; Self::START_BYTES]) -> usize {
        let [.., name_length] = start;
        Self::START_BYTES + usize::from(*name_length) + 8
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let generation = self.generation.number().to_le_bytes();
        let name = self.name.0.as_bytes();
        let name_length = u8::try_from(name.len()).expect("a name has at most 255 bytes");
        let length = self.length.to_le_bytes();
        [&generation[..], &[name_length], name, &length].concat()
    }

    /// The header at the start of these bytes, and what follows it. An error of
    /// [`StreamError::Truncated`] says how many bytes the header needs as far as known.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), StreamError> {
        let truncated = |needed| StreamError::Truncated {
            length: bytes.len(),
            needed,
        };
        let start = bytes.first_chunk().ok_or(truncated(Self::START_BYTES))?;
        let needed = Self::bytes(start);
        let header = bytes.get(..needed).ok_or(truncated(needed))?;
        let mut fields = header;
        let generation = take_generation(&mut fields)?;
        let (name, mut length) = fields[1..].split_at(needed - Self::START_BYTES - 8);
        let name = ImageName::from_bytes(name)?;
        let length = u64::from_le_bytes(take(&mut length)?);
        Ok((Self::new(generation, name, length)?, &bytes[needed..]))
    }
}

impl ImageName {
    /// Longest name, in bytes: the kernel's NAME_MAX.
    pub const BYTES_MAX: usize = 255;

    /// The name with this text.
    pub fn new(text: &str) -> Result<Self, StreamError> {
        Self::from_bytes(text.as_bytes())
    }

    /// The name as text. Safe to join to a directory: it has no slash and no leading dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the image `name` of a member is called among those of all: as it is of the first one,
    /// else with the member's number before it. CRIU has no image whose name begins with digits and
    /// a dot, so that one is told from the other.
    pub fn of_member(member: MemberIndex, name: &str) -> Result<Self, StreamError> {
        let plain = Self::new(name)?;
        if plain.number().is_some() {
            return Err(StreamError::ImageName(name.to_owned()));
        }
        match member.number() {
            0 => Ok(plain),
            number => Self::new(&format!("{number}.{name}")),
        }
    }

    /// Whose image it is, and its name there.
    pub fn split(&self) -> Result<(MemberIndex, &str), StreamError> {
        let refuse = || StreamError::ImageName(self.0.clone());
        let Some((number, name)) = self.number() else {
            return Ok((MemberIndex::FIRST, &self.0));
        };
        let member = number.parse().ok().and_then(|n| MemberIndex::new(n).ok());
        let member = member.filter(|member| *member != MemberIndex::FIRST);
        // One spelling for one member.
        let member = member.filter(|member| member.to_string() == number);
        let member = member.ok_or_else(refuse)?;
        let is_plain = Self::new(name).is_ok_and(|name| name.number().is_none());
        is_plain.then_some((member, name)).ok_or_else(refuse)
    }

    /// The digits that it begins with, if a dot follows, and what is after that.
    fn number(&self) -> Option<(&str, &str)> {
        let (number, name) = self.0.split_once('.')?;
        number
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then_some((number, name))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, StreamError> {
        let text = String::from_utf8_lossy(bytes);
        let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        let within = (1..=Self::BYTES_MAX).contains(&bytes.len());
        if !within || !bytes.iter().all(legal) || bytes[0] == b'.' {
            return Err(StreamError::ImageName(text.into_owned()));
        }
        Ok(Self(text.into_owned()))
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Appends the checksum of `body`: everything on the stream after the prefix.
pub fn seal(body: &mut Vec<u8>) {
    let checksum = crc32fast::hash(body);
    body.extend_from_slice(&checksum.to_le_bytes());
}

/// The body in these bytes, which are a stream without its prefix, if its checksum fits.
pub fn unseal(bytes: &[u8]) -> Result<&[u8], StreamError> {
    let truncated = StreamError::Truncated {
        length: bytes.len(),
        needed: CHECKSUM_BYTES,
    };
    let (body, found) = bytes
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or(truncated)?;
    let found = u32::from_le_bytes(*found);
    let computed = crc32fast::hash(body);
    if found != computed {
        return Err(StreamError::Checksum { found, computed });
    }
    Ok(body)
}

pub(super) fn take_generation(rest: &mut &[u8]) -> Result<Generation, StreamError> {
    let number = u32::from_le_bytes(take(rest)?);
    Generation::new(number).map_err(StreamError::Generation)
}

pub(super) fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], StreamError> {
    let truncated = StreamError::Truncated {
        length: rest.len(),
        needed: N,
    };
    let (taken, tail) = rest.split_first_chunk::<N>().ok_or(truncated)?;
    *rest = tail;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    // clause: M-3
    #[test]
    fn an_image_is_of_one_member_and_the_first_members_are_called_as_ever() {
        let second = MemberIndex::new(1).unwrap();
        let name = ImageName::of_member(second, "core-1.img").unwrap();
        assert_eq!(name.as_str(), "1.core-1.img");
        assert_eq!(name.split(), Ok((second, "core-1.img")));
        let first = ImageName::of_member(MemberIndex::FIRST, "core-1.img").unwrap();
        assert_eq!(first.split(), Ok((MemberIndex::FIRST, "core-1.img")));
        assert_eq!(first, ImageName::new("core-1.img").unwrap());
        assert!(ImageName::of_member(second, "2.core-1.img").is_err());
        assert!(ImageName::of_member(MemberIndex::FIRST, "1.core-1.img").is_err());
        assert!(ImageName::of_member(second, &"a".repeat(254)).is_err());
        for odd in [
            "0.a",
            "01.a",
            "16.a",
            "1.2.a",
            "1.",
            "1..a",
            "99999999999999999999.a",
        ] {
            let split = ImageName::new(odd).and_then(|name| name.split().map(|found| found.0));
            assert!(split.is_err(), "{odd}");
        }
        assert_eq!(
            ImageName::new("1-a.img").unwrap().split().unwrap().1,
            "1-a.img"
        );
    }

    // clause: D-1
    #[test]
    fn a_prefix_reads_back_and_kind_zero_does_not() {
        let migration = MigrationId::new([7; 16]);
        for kind in [
            StreamKind::Parcel,
            StreamKind::LiveSet,
            StreamKind::ImageFile,
            StreamKind::Digests,
            StreamKind::Files,
            StreamKind::Parked,
            StreamKind::AbsentSet,
            StreamKind::Fetched,
        ] {
            let prefix = StreamPrefix { kind, migration };
            assert_eq!(StreamPrefix::decode(&prefix.encode()), Ok(prefix));
        }
        for kind in [0, 9, 255] {
            let mut bytes = [7; StreamPrefix::BYTES];
            bytes[0] = kind;
            assert_eq!(StreamPrefix::decode(&bytes), Err(StreamError::Kind(kind)));
        }
    }

    // clause: D-6
    #[test]
    fn an_image_name_leads_nowhere_else() {
        for name in ["pages-1.img", "core-17.img", "a"] {
            assert_eq!(ImageName::new(name).unwrap().as_str(), name);
        }
        for name in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a\0",
            "ä",
            &"a".repeat(256),
        ] {
            assert!(ImageName::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn an_image_header_says_how_long_it_is() {
        let name = ImageName::new("mm-1.img").unwrap();
        let header = ImageFileHeader::new(Generation::FIRST.next(), name, 77).unwrap();
        let bytes = header.encode();
        for length in 0..bytes.len() {
            let known = ImageFileHeader::START_BYTES <= length;
            let needed = if known {
                bytes.len()
            } else {
                ImageFileHeader::START_BYTES
            };
            let truncated = StreamError::Truncated { length, needed };
            assert_eq!(ImageFileHeader::decode(&bytes[..length]), Err(truncated));
        }
        let followed = [&bytes[..], b"rest"].concat();
        assert_eq!(
            ImageFileHeader::decode(&followed),
            Ok((header, &b"rest"[..]))
        );
    }

    // clause: D-2
    #[test]
    fn a_changed_byte_does_not_pass_the_checksum() {
        let mut bytes = b"body".to_vec();
        seal(&mut bytes);
        assert_eq!(unseal(&bytes), Ok(&b"body"[..]));
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert!(matches!(
                unseal(&changed),
                Err(StreamError::Checksum { .. })
            ));
        }
        assert!(matches!(
            unseal(&bytes[..3]),
            Err(StreamError::Truncated { .. })
        ));
    }

    // clause: D-7
    #[test]
    fn the_worst_digests_stream_fits_its_limit() {
        let pages = usize::try_from(DIGESTS_PAGES_MAX).unwrap();
        let body = SetHeader::BYTES + pages * (set::RUN_BYTES_MAX + DIGEST_BYTES);
        assert!(StreamPrefix::BYTES + body + CHECKSUM_BYTES <= DIGESTS_BYTES_MAX);
    }

    #[test]
    fn a_set_header_is_bounded() {
        let header = SetHeader {
            generation: Generation::FIRST,
            space: SpaceId(9),
            length: 1 << 25,
        };
        let bytes = header.encode();
        assert_eq!(SetHeader::decode(&bytes), Ok((header, &[][..])));
        let beyond = SetHeader {
            length: (1 << 25) + 1,
            ..header
        };
        let refused = SetHeader::decode(&beyond.encode()).map(|(header, _)| header);
        assert_eq!(refused, Err(StreamError::SetTooLong((1 << 25) + 1)));
    }

    // clause: V-5
    #[test]
    fn nothing_belongs_to_generation_zero() {
        let refused = Err(StreamError::Generation(IdError::GenerationZero));
        let set = SetHeader::decode(&[0; SetHeader::BYTES]);
        assert_eq!(set.map(|_| ()), refused.clone());
        let file = [&[0, 0, 0, 0, 1, b'a'][..], &[0; 8]].concat();
        assert_eq!(ImageFileHeader::decode(&file).map(|_| ()), refused);
    }
}
