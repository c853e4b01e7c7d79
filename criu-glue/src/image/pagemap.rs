//! `pagemap-VPID.img` and `pages-N.img`: which pages a dump has, and what is in them.
//!
//! # Rewriting for a lazy restore
//! A dump marks the pages of lazy-able mappings `PRESENT|LAZY`. At a lazy restore CRIU skips such an
//! entry, its contents too, and leaves the pages to the page-fault side. But under the view the
//! pages that are in the dump are exactly those nobody else has, so [`rewrite`] makes them
//! `PRESENT`: CRIU reads them before it registers the mapping. Pages that were hidden from the dump
//! have no entry and need none: every lazy-able mapping is registered as a whole.
//!
//! This makes a mapping of which some pages are in the dump and others are not populated before it
//! is registered. With huge pages for all memory ("always") the kernel would then fill 2 MiB around
//! each page with zeros, and the page-fault side would never be asked for them; the restoring worker
//! must run with huge pages off ([`crate::rpc::SwrkConfig::huge_pages`]). CRIU gives each task its
//! own setting back right after registering.
//!
//! # Two ways to count
//! Since CRIU 4.2 an entry holds its number of pages in field 5 and 0 in field 2; before, in field
//! 2. A file keeps its form.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use prost::bytes::Buf;
use prost::encoding::DecodeContext;
use prost::encoding::{WireType, decode_key, decode_varint, encode_varint, skip_field};

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// The entry's contents are in the parent images.
pub const PARENT: u32 = 1;
/// A lazy restore leaves these pages to the page-fault side.
pub const LAZY: u32 = 2;
/// The entry's contents are in the pages image.
pub const PRESENT: u32 = 4;

/// Bytes of a page in `pages-N.img`.
pub const PAGE_SIZE: u64 = 4096;

/// Which pages of a process an images directory has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// N of `pages-N.img`.
    pub pages_id: u32,
    /// Sorted by address, disjoint.
    pub entries: Vec<Entry>,
}

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first page.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// [`PARENT`], [`LAZY`], [`PRESENT`].
    pub flags: u32,
    /// Where the contents begin in `pages-N.img`, in bytes; `None` unless [`PRESENT`].
    pub contents_at: Option<u64>,
}

/// Page contents by address.
#[derive(Debug)]
pub struct Pages {
    file: File,
    path: PathBuf,
    pagemap: Pagemap,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct HeadRecord {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct EntryRecord {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// Reads `pagemap-VPID.img` of an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path, vpid: u32) -> Result<Pagemap, ImageError> {
    let path = path_of(images, vpid);
    parse(&read_file(&path)?).map_err(at(&path))
}

/// Rewrites `pagemap-VPID.img` for a lazy restore: `PRESENT|LAZY` becomes `PRESENT`. The file is
/// replaced as a whole.
///
/// # Errors
/// [`ImageError`] with the file's path; the old file stays then.
pub fn rewrite(images: &Path, vpid: u32) -> Result<(), ImageError> {
    let path = path_of(images, vpid);
    let eager = make_eager(&read_file(&path)?).map_err(at(&path))?;
    let temporary = path.with_extension("img.new");
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(&eager))
        .and_then(|()| std::fs::rename(&temporary, &path));
    written.map_err(|source| ImageError::Write { path, source })
}

/// The bytes of a pagemap image with every `PRESENT|LAZY` entry made `PRESENT`, all else as it was.
///
/// # Errors
/// [`FormatError`] when `image` is no pagemap image.
pub fn make_eager(image: &[u8]) -> Result<Vec<u8>, FormatError> {
    let mut eager = Vec::with_capacity(image.len());
    for magic in [MAGIC_COMMON, MAGIC] {
        eager.extend_from_slice(&magic.to_le_bytes());
    }
    for (index, record) in records(image, &[MAGIC_COMMON, MAGIC])?
        .into_iter()
        .enumerate()
    {
        let record = if index == 0 {
            record.to_vec()
        } else {
            eager_record(record, index)?
        };
        let length = u32::try_from(record.len()).map_err(|_| FormatError::Value { index })?;
        eager.extend_from_slice(&length.to_le_bytes());
        eager.extend_from_slice(&record);
    }
    Ok(eager)
}

/// Copies the record field by field, whatever the fields are.
fn eager_record(record: &[u8], index: usize) -> Result<Vec<u8>, FormatError> {
    let failed = |source| FormatError::Record { index, source };
    let mut eager = Vec::with_capacity(record.len());
    let mut rest = record;
    while rest.has_remaining() {
        let field = rest;
        let (tag, wire_type) = decode_key(&mut rest).map_err(failed)?;
        if tag == FLAGS_TAG && wire_type == WireType::Varint {
            let key = &field[..field.len() - rest.len()];
            let flags = decode_varint(&mut rest).map_err(failed)?;
            let both = u64::from(PRESENT | LAZY);
            let lazy = if flags & both == both {
                u64::from(LAZY)
            } else {
                0
            };
            eager.extend_from_slice(key);
            encode_varint(flags & !lazy, &mut eager);
        } else {
            skip_field(wire_type, tag, &mut rest, DecodeContext::default()).map_err(failed)?;
            eager.extend_from_slice(&field[..field.len() - rest.len()]);
        }
    }
    Ok(eager)
}

/// Decodes the bytes of a pagemap image.
///
/// # Errors
/// [`FormatError`] when it is none, or its entries are out of order.
pub fn parse(image: &[u8]) -> Result<Pagemap, FormatError> {
    let records = records(image, &[MAGIC_COMMON, MAGIC])?;
    let (head, rest) = records.split_first().ok_or(FormatError::Empty)?;
    let HeadRecord { pages_id } = decode(head, 0)?;
    let mut entries = Vec::with_capacity(rest.len());
    let (mut free_from, mut contents_at) = (0, 0);
    for (index, record) in (1..).zip(rest) {
        let impossible = FormatError::Value { index };
        let record: EntryRecord = decode(record, index)?;
        let pages = record.nr_pages.unwrap_or(record.compat_nr_pages.into());
        let flags = match (record.in_parent, record.flags) {
            (Some(true), flags) => flags.unwrap_or(0) | PARENT,
            (_, Some(flags)) => flags,
            (_, None) => PRESENT,
        };
        let length = pages.checked_mul(PAGE_SIZE);
        let end = length.and_then(|length| record.vaddr.checked_add(length));
        let (Some(length), Some(end)) = (length, end) else {
            return Err(impossible);
        };
        if record.vaddr < free_from || !record.vaddr.is_multiple_of(PAGE_SIZE) {
            return Err(impossible);
        }
        free_from = end;
        let present = flags & PRESENT != 0;
        let entry = Entry {
            start: record.vaddr,
            pages,
            flags,
            contents_at: present.then_some(contents_at),
        };
        contents_at = if present {
            contents_at.checked_add(length)
        } else {
            Some(contents_at)
        }
        .ok_or(impossible)?;
        entries.push(entry);
    }
    Ok(Pagemap { pages_id, entries })
}

impl Pagemap {
    /// The entry that covers `address`.
    #[must_use]
    pub fn entry_at(&self, address: u64) -> Option<&Entry> {
        let after = self.entries.partition_point(|entry| entry.start <= address);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        (address - entry.start < entry.pages * PAGE_SIZE).then_some(entry)
    }
}

impl Pages {
    /// Opens `pagemap-VPID.img` and the `pages-N.img` it names.
    ///
    /// # Errors
    /// [`ImageError`] with the path of the file that failed.
    pub fn open(images: &Path, vpid: u32) -> Result<Self, ImageError> {
        let pagemap = read(images, vpid)?;
        let path = images.join(format!("pages-{}.img", pagemap.pages_id));
        let opened = File::open(&path);
        let file = opened.map_err(|source| ImageError::Read {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            file,
            path,
            pagemap,
        })
    }

    #[must_use]
    pub fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// Fills `buffer` with the contents at `address`, as far as the images have them without a gap,
    /// and tells how many bytes that is; 0 if the page at `address` has no contents.
    ///
    /// # Errors
    /// [`ImageError::Read`] when the pages image is shorter than the pagemap says.
    pub fn read_at(&self, address: u64, buffer: &mut [u8]) -> Result<usize, ImageError> {
        let Some(entry) = self.pagemap.entry_at(address) else {
            return Ok(0);
        };
        let Some(contents_at) = entry.contents_at else {
            return Ok(0);
        };
        let into = address - entry.start;
        let left = usize::try_from(entry.pages * PAGE_SIZE - into).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        self.file
            .read_exact_at(&mut buffer[..length], contents_at + into)
            .map_err(|source| ImageError::Read {
                path: self.path.clone(),
                source,
            })?;
        Ok(length)
    }
}

fn path_of(images: &Path, vpid: u32) -> PathBuf {
    images.join(format!("pagemap-{vpid}.img"))
}

const MAGIC: u32 = 0x5608_4025;

/// Field number of `flags` in `pagemap_entry`.
const FLAGS_TAG: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    fn image(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut image = [MAGIC_COMMON.to_le_bytes(), MAGIC.to_le_bytes()].concat();
        let head = HeadRecord { pages_id: 3 }.encode_to_vec();
        for record in std::iter::once(&head).chain(entries) {
            let length = u32::try_from(record.len()).expect("short");
            image.extend_from_slice(&length.to_le_bytes());
            image.extend_from_slice(record);
        }
        image
    }

    /// As CRIU 4.2 and newer write it.
    fn new_form(vaddr: u64, pages: u64, flags: u32) -> Vec<u8> {
        let record = EntryRecord {
            vaddr,
            flags: Some(flags),
            ..EntryRecord::default()
        };
        EntryRecord {
            nr_pages: Some(pages),
            ..record
        }
        .encode_to_vec()
    }

    fn old_form(vaddr: u64, compat_nr_pages: u32, flags: u32) -> Vec<u8> {
        let record = EntryRecord {
            vaddr,
            compat_nr_pages,
            ..EntryRecord::default()
        };
        EntryRecord {
            flags: Some(flags),
            ..record
        }
        .encode_to_vec()
    }

    #[test]
    fn both_ways_to_count_are_read_and_contents_are_found() {
        let image = image(&[
            old_form(0x1000, 2, PRESENT),
            new_form(0x5000, 3, LAZY),
            new_form(0x9000, 1, PRESENT | LAZY),
        ]);
        let pagemap = parse(&image).expect("well formed");
        let found: Vec<_> = pagemap
            .entries
            .iter()
            .map(|e| (e.start, e.pages, e.contents_at))
            .collect();
        let expected = [
            (0x1000, 2, Some(0)),
            (0x5000, 3, None),
            (0x9000, 1, Some(0x2000)),
        ];
        assert_eq!(
            (pagemap.pages_id, found.as_slice()),
            (3, expected.as_slice())
        );
        let start_at = |address| pagemap.entry_at(address).map(|entry| entry.start);
        assert_eq!(start_at(0xfff), None);
        assert_eq!(start_at(0x2fff), Some(0x1000));
        assert_eq!(start_at(0x3000), None);
        assert_eq!(start_at(0x9000), Some(0x9000));
        assert_eq!(start_at(0xa000), None);
    }

    #[test]
    fn making_eager_changes_nothing_but_the_flag() {
        let unknown = |mut record: Vec<u8>| {
            // Field 900, length-delimited, and field 901, a varint.
            record.extend_from_slice(&[0xa2, 0x38, 2, 1, 2, 0xa8, 0x38, 5]);
            record
        };
        let before = image(&[
            unknown(old_form(0x1000, 2, PRESENT | LAZY)),
            new_form(0x5000, 3, LAZY),
            new_form(0x9000, 1, PRESENT),
            unknown(new_form(0xf000, 1 << 40, PRESENT | LAZY)),
        ]);
        let after = image(&[
            unknown(old_form(0x1000, 2, PRESENT)),
            new_form(0x5000, 3, LAZY),
            new_form(0x9000, 1, PRESENT),
            unknown(new_form(0xf000, 1 << 40, PRESENT)),
        ]);
        // The unknown fields must come after the known ones for this: so CRIU would write them.
        assert_eq!(make_eager(&before).expect("well formed"), after);
        assert_eq!(make_eager(&after).expect("well formed"), after);
    }

    #[test]
    fn impossible_entries_are_refused() {
        let bad = [
            vec![new_form(0x1000, 2, PRESENT), new_form(0x2000, 1, PRESENT)],
            vec![new_form(0x1001, 1, PRESENT)],
            vec![new_form(0x1000, u64::MAX, PRESENT)],
            vec![new_form(u64::MAX - 0xfff, 1, PRESENT)],
        ];
        for entries in bad {
            assert!(matches!(
                parse(&image(&entries)),
                Err(FormatError::Value { .. })
            ));
        }
        assert!(matches!(
            parse(&image(&[vec![0xff]])),
            Err(FormatError::Record { .. })
        ));
        let empty = [MAGIC_COMMON.to_le_bytes(), MAGIC.to_le_bytes()].concat();
        assert!(matches!(parse(&empty), Err(FormatError::Empty)));
        assert!(make_eager(&[1, 2, 3]).is_err());
        assert!(
            make_eager(&image(&[vec![0x20]])).is_err(),
            "a key without its value"
        );
    }

    #[test]
    fn contents_are_read_up_to_the_end_of_their_entry() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let image = image(&[
            new_form(0x1000, 2, PRESENT),
            new_form(0x5000, 1, LAZY),
            new_form(0x9000, 1, PRESENT),
        ]);
        std::fs::write(directory.path().join("pagemap-4.img"), image).expect("writable");
        let contents: Vec<u8> = (1..=3).flat_map(|byte| [byte; 4096]).collect();
        std::fs::write(directory.path().join("pages-3.img"), contents).expect("writable");
        let pages = Pages::open(directory.path(), 4).expect("both files");
        let mut buffer = vec![0; 3 * 4096];
        assert_eq!(pages.read_at(0x1000, &mut buffer).expect("there"), 2 * 4096);
        assert_eq!((buffer[0], buffer[4096]), (1, 2));
        assert_eq!(pages.read_at(0x2800, &mut buffer).expect("there"), 2048);
        assert_eq!(pages.read_at(0x9000, &mut buffer[..10]).expect("there"), 10);
        assert_eq!(buffer[0], 3);
        assert_eq!(pages.read_at(0x5000, &mut buffer).expect("no contents"), 0);
        assert_eq!(pages.read_at(0x8000, &mut buffer).expect("no entry"), 0);
    }
}
