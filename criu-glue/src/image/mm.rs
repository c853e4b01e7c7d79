//! `mm-VPID.img`: the mappings of one process.
//!
//! # Reserved addresses
//! Databases reserve terabytes of addresses (`PROT_NONE`) that they may come to use. The kernel
//! does not count such a mapping as memory, but CRIU makes every private mapping writable first,
//! and protects it later; and one that is writable and larger than the node's memory the kernel
//! refuses. [`reserve`] marks those as `MAP_NORESERVE`, which it does not count. They stay so
//! marked.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use prost::bytes::Buf;
use prost::encoding::DecodeContext;
use prost::encoding::{WireType, decode_key, decode_varint, encode_varint, skip_field};

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// The fields of use to us.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mm {
    #[prost(uint64, required, tag = "6")]
    pub brk_start: u64,
    #[prost(uint64, required, tag = "7")]
    pub brk: u64,
    /// Sorted by address. Guard regions follow at the end, as mappings of their own.
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<Vma>,
    #[prost(bool, optional, tag = "17")]
    pub huge_pages_disabled: Option<bool>,
}

/// A mapping as CRIU will restore it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Vma {
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// In bytes.
    #[prost(uint64, required, tag = "3")]
    pub offset: u64,
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    /// `PROT_*`.
    #[prost(uint32, required, tag = "5")]
    pub protection: u32,
    /// `MAP_*`.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// CRIU's own bits, `STATUS_*` here.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    #[prost(sint64, required, tag = "8")]
    pub fd: i64,
    /// Bit n stands for advice n of madvise.
    #[prost(uint64, optional, tag = "9")]
    pub advice: Option<u64>,
}

pub const STATUS_VSYSCALL: u32 = 1 << 2;
pub const STATUS_VDSO: u32 = 1 << 3;
pub const STATUS_VVAR: u32 = 1 << 12;
pub const STATUS_GUARD: u32 = 1 << 16;

impl Vma {
    /// Whether a lazy restore registers this mapping with userfaultfd and leaves it empty
    /// (`vma_entry_can_be_lazy` of CRIU).
    #[must_use]
    pub fn is_lazy_able(&self) -> bool {
        let kernels = STATUS_VSYSCALL | STATUS_VDSO | STATUS_VVAR | STATUS_GUARD;
        let wanted = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE).cast_unsigned();
        let unwanted = (libc::MAP_LOCKED | libc::MAP_HUGETLB).cast_unsigned();
        self.flags & (wanted | unwanted) == wanted && self.status & kernels == 0
    }

    /// Whether it is a large range of addresses that is kept and not used, and would be counted as
    /// memory if it were writable.
    fn is_reserved(&self) -> bool {
        self.is_lazy_able()
            && self.protection == 0
            && self.flags & NORESERVE == 0
            && RESERVED_MIN <= self.end.saturating_sub(self.start)
    }
}

/// Reads `mm-VPID.img` of an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path, vpid: u32) -> Result<Mm, ImageError> {
    let path = images.join(format!("mm-{vpid}.img"));
    parse(&read_file(&path)?).map_err(at(&path))
}

/// Marks large mappings that nobody may use as not to be counted as memory; whether there are any.
/// All else stays as it is. The file is replaced as a whole.
///
/// # Errors
/// [`ImageError`] with the file's path; the old file stays then.
pub fn reserve(images: &Path, vpid: u32) -> Result<bool, ImageError> {
    let path = images.join(format!("mm-{vpid}.img"));
    let bytes = read_file(&path)?;
    if !parse(&bytes)
        .map_err(at(&path))?
        .vmas
        .iter()
        .any(Vma::is_reserved)
    {
        return Ok(false);
    }
    let marked = marked(&bytes).map_err(at(&path))?;
    let temporary = path.with_extension("img.new");
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(&marked))
        .and_then(|()| std::fs::rename(&temporary, &path));
    written.map_err(|source| ImageError::Write { path, source })?;
    Ok(true)
}

fn marked(image: &[u8]) -> Result<Vec<u8>, FormatError> {
    let magic = [MAGIC_COMMON, MAGIC];
    let mut marked: Vec<u8> = magic
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    for (index, record) in records(image, &magic)?.into_iter().enumerate() {
        let mut body = Vec::with_capacity(record.len());
        copy(record, index, &mut body, |tag, field| {
            let vma = (tag == VMAS_TAG).then(|| vma_marked(field, index));
            vma.transpose()
        })?;
        let length = u32::try_from(body.len()).map_err(|_| FormatError::Value { index })?;
        marked.extend_from_slice(&length.to_le_bytes());
        marked.extend_from_slice(&body);
    }
    Ok(marked)
}

/// The field of one mapping, with its key; marked if it is to be.
fn vma_marked(field: &[u8], index: usize) -> Result<Vec<u8>, FormatError> {
    let failed = |source| FormatError::Record { index, source };
    let mut rest = field;
    let (_, wire_type) = decode_key(&mut rest).map_err(failed)?;
    let key = &field[..field.len() - rest.len()];
    let length = decode_varint(&mut rest).map_err(failed)?;
    let is_whole = wire_type == WireType::LengthDelimited && length == rest.len() as u64;
    if !is_whole || !decode::<Vma>(rest, index)?.is_reserved() {
        return Ok(field.to_vec());
    }
    let mut body = Vec::with_capacity(rest.len() + 2);
    copy(rest, index, &mut body, |tag, field| {
        if tag != FLAGS_TAG {
            return Ok(None);
        }
        let mut rest = field;
        decode_key(&mut rest).map_err(failed)?;
        let mut marked = field[..field.len() - rest.len()].to_vec();
        let flags = decode_varint(&mut rest).map_err(failed)?;
        encode_varint(flags | u64::from(NORESERVE), &mut marked);
        Ok(Some(marked))
    })?;
    let mut vma = key.to_vec();
    encode_varint(body.len() as u64, &mut vma);
    vma.extend(body);
    Ok(vma)
}

/// Copies a message field by field; those that `replaced` has something for are that.
fn copy(
    message: &[u8],
    index: usize,
    into: &mut Vec<u8>,
    replaced: impl Fn(u32, &[u8]) -> Result<Option<Vec<u8>>, FormatError>,
) -> Result<(), FormatError> {
    let failed = |source| FormatError::Record { index, source };
    let mut rest = message;
    while rest.has_remaining() {
        let field = rest;
        let (tag, wire_type) = decode_key(&mut rest).map_err(failed)?;
        skip_field(wire_type, tag, &mut rest, DecodeContext::default()).map_err(failed)?;
        let field = &field[..field.len() - rest.len()];
        match replaced(tag, field)? {
            Some(other) => into.extend(other),
            None => into.extend_from_slice(field),
        }
    }
    Ok(())
}

fn parse(bytes: &[u8]) -> Result<Mm, FormatError> {
    let records = records(bytes, &[MAGIC_COMMON, MAGIC])?;
    decode(records.first().ok_or(FormatError::Empty)?, 0)
}

const MAGIC: u32 = 0x5749_2820;

const VMAS_TAG: u32 = 14;
const FLAGS_TAG: u32 = 6;

const NORESERVE: u32 = libc::MAP_NORESERVE.cast_unsigned();

/// Smallest mapping that is marked, in bytes. What is smaller fits into any node's memory.
const RESERVED_MIN: u64 = 1 << 30; // 1 GiB

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_reservations_are_marked_and_nothing_else_changes() {
        use prost::Message as _;
        let private = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE).cast_unsigned();
        let vma = |protection, flags, bytes| Vma {
            start: 1 << 40,
            end: (1 << 40) + bytes,
            protection,
            flags,
            status: 1,
            fd: -1,
            advice: Some(1 << 14),
            ..Vma::default()
        };
        let large = 8 << 40;
        let mut mm = Mm {
            brk: 7,
            vmas: vec![
                vma(0, private, large),
                vma(0, private, RESERVED_MIN - 1),
                vma(1, private, large),
                vma(0, private | NORESERVE, large),
                vma(0, libc::MAP_PRIVATE.cast_unsigned(), large),
                vma(0, private, RESERVED_MIN),
            ],
            ..Mm::default()
        };
        let image = |mm: &Mm| {
            let mut record = mm.encode_to_vec();
            // Fields that nobody knows, before and behind.
            record.splice(0..0, [0x0a, 2, 8, 1]);
            record.extend([0xf8, 0x01, 5]);
            let mut image = [MAGIC_COMMON, MAGIC].map(u32::to_le_bytes).concat();
            image.extend(u32::try_from(record.len()).expect("small").to_le_bytes());
            image.extend(record);
            image
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mm-7.img");
        std::fs::write(&path, image(&mm)).expect("an image");
        assert!(reserve(folder.path(), 7).expect("well formed"));
        mm.vmas[0].flags |= NORESERVE;
        mm.vmas[5].flags |= NORESERVE;
        assert_eq!(std::fs::read(&path).expect("an image"), image(&mm));
        assert!(!reserve(folder.path(), 7).expect("well formed"));
    }

    #[test]
    fn only_plain_private_memory_is_lazy() {
        let anonymous = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE).cast_unsigned();
        let lazy = |flags: u32, status| {
            Vma {
                flags,
                status,
                ..Vma::default()
            }
            .is_lazy_able()
        };
        assert!(lazy(anonymous, 1));
        assert!(lazy(anonymous | libc::MAP_GROWSDOWN.cast_unsigned(), 1));
        assert!(!lazy(libc::MAP_PRIVATE.cast_unsigned(), 1));
        assert!(!lazy(
            (libc::MAP_ANONYMOUS | libc::MAP_SHARED).cast_unsigned(),
            1
        ));
        assert!(!lazy(anonymous | libc::MAP_LOCKED.cast_unsigned(), 1));
        assert!(!lazy(anonymous | libc::MAP_HUGETLB.cast_unsigned(), 1));
        for status in [STATUS_VDSO, STATUS_VVAR, STATUS_VSYSCALL, STATUS_GUARD] {
            assert!(!lazy(anonymous, status));
        }
    }
}
