//! `mm-VPID.img`: the mappings of one process.

use std::path::Path;

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
}

/// Reads `mm-VPID.img` of an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path, vpid: u32) -> Result<Mm, ImageError> {
    let path = images.join(format!("mm-{vpid}.img"));
    parse(&read_file(&path)?).map_err(at(&path))
}

fn parse(bytes: &[u8]) -> Result<Mm, FormatError> {
    let records = records(bytes, &[MAGIC_COMMON, MAGIC])?;
    decode(records.first().ok_or(FormatError::Empty)?, 0)
}

const MAGIC: u32 = 0x5749_2820;

#[cfg(test)]
mod tests {
    use super::*;

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
