//! The smaps text a dump reads, without asking the kernel for it.
//!
//! To render `/proc/PID/smaps` the kernel walks all page tables of the process, about 11 ms per GiB
//! of 4 KiB pages. CRIU reads two things of it (`parse_smaps` in its `proc_parse.c`, 4.2):
//! the first line of each mapping, which `/proc/PID/maps` gives in a tenth of a millisecond, and
//! `VmFlags`, which nothing else gives. So a true smaps is recorded while the process runs, and in
//! the freeze it is rendered anew from a fresh `maps`, with flags from the record.
//!
//! # Which flags matter
//! Of `VmFlags` CRIU takes `gd lo nr ht dp` (mmap flags), `sr rr dc dd mg hg nh wf` (advice),
//! `io pf` (unsupported mappings) and `ss` (shadow stack). It skips the others. [`IGNORED`] lists
//! those that are known to be skipped: permissions, which the first line has too; accounting; and
//! what tracking itself changes (`uw um ui sd`). A flag in neither list counts, so a newer kernel's
//! flag leads to a refusal, never to a wrong dump.
//!
//! # What can be told, and what cannot
//! A mapping that grew, shrank, was split, merged or protected keeps its flags: the kernel merges
//! only mappings of equal flags, and no mprotect changes one that counts. A new mapping has what
//! all of its kind have, or nobody can tell: `MAP_NORESERVE`, for one, is not in `maps`. And a
//! mapping replaced by another with the same first line, or one whose advice changed, looks
//! unchanged. That is why [`compare`] must find the rendered text equal to the true one before
//! anyone relies on it.

/// Flags CRIU does not look at, as the kernel's `show_smap_vma_flags` prints them: read, write,
/// execute, shared and their four may-bits; no expanding, accounted, synchronous; specific to the
/// machine, branch targets, memory tags; mixed map, soft-dirty; userfaultfd for missing,
/// write-protected and minor; sealed; may have guard regions, which CRIU scans for.
pub const IGNORED: [&[u8]; 21] = [
    b"rd", b"wr", b"ex", b"sh", b"mr", b"mw", b"me", b"ms", b"de", b"ac", b"sf", b"ar", b"bt",
    b"mt", b"mm", b"sd", b"um", b"uw", b"ui", b"sl", b"gu",
];

/// A true smaps, taken at some moment.
#[derive(Clone, Debug)]
pub struct Recorded {
    mappings: Vec<Mapping>,
}

/// A line that is not what procfs prints.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed line in smaps or maps: {line:?}")]
pub struct Malformed {
    pub line: String,
}

/// Why no text can be rendered: the true one must be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unrenderable {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("cannot tell the flags of the mapping {start:x}-{end:x}")]
    Unknown { start: u64, end: u64 },
}

/// The first mapping that is not what was said of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mapping {start:x}-{end:x} was recorded as {recorded:?} but is {actual:?}")]
pub struct Difference {
    pub start: u64,
    pub end: u64,
    /// First line without addresses, and flags that count; empty: there is no such mapping.
    pub recorded: String,
    pub actual: String,
}

/// Why two texts do not say the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unequal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Different(#[from] Difference),
}

#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    permissions: [u8; 4],
    offset: u64,
    /// `major:minor`, as printed.
    device: String,
    inode: u64,
    name: Vec<u8>,
    /// The whole first line: addresses, the above, padding.
    line: Vec<u8>,
    /// Those that count, sorted.
    pub(super) flags: Vec<[u8; 2]>,
    /// How many there are, with those that do not count.
    pub(super) words: usize,
}

impl Recorded {
    /// Reads the whole text of `/proc/PID/smaps`.
    ///
    /// # Errors
    /// [`Malformed`] with the first line that is not understood.
    pub fn parse(smaps: &[u8]) -> Result<Self, Malformed> {
        Ok(Self {
            mappings: mappings(smaps)?,
        })
    }

    /// The text for CRIU to read, from the record and a fresh `/proc/PID/maps`. To be rendered
    /// when the process can no longer change.
    ///
    /// # Errors
    /// [`Unrenderable::Unknown`] when a mapping is new and not like its kin.
    pub fn render(&self, maps: &[u8]) -> Result<Vec<u8>, Unrenderable> {
        let fresh = mappings(maps)?;
        let mut text = Vec::with_capacity(maps.len() + fresh.len() * "VmFlags: nr \n".len());
        let mut first = 0;
        for mapping in &fresh {
            while self
                .mappings
                .get(first)
                .is_some_and(|old| old.end <= mapping.start)
            {
                first += 1;
            }
            let rest = self.mappings.get(first..).unwrap_or_default();
            let flags = self.flags_of(mapping, rest).ok_or(Unrenderable::Unknown {
                start: mapping.start,
                end: mapping.end,
            })?;
            text.extend_from_slice(&mapping.line);
            text.extend_from_slice(b"\nVmFlags:");
            for flag in flags {
                text.push(b' ');
                text.extend_from_slice(flag);
            }
            text.extend_from_slice(b" \n");
        }
        Ok(text)
    }

    /// `rest` starts with the first recorded mapping that ends after `mapping` starts.
    fn flags_of<'a>(&'a self, mapping: &Mapping, rest: &'a [Mapping]) -> Option<&'a [[u8; 2]]> {
        let overlapping = rest.iter().take_while(|old| old.start < mapping.end);
        let mut same = overlapping
            .filter(|old| old.continues_as(mapping))
            .peekable();
        if same.peek().is_some() {
            unanimous(same)
        } else {
            self.predicted(mapping)
        }
    }

    /// Flags of a mapping that was not there when the record was made.
    fn predicted(&self, mapping: &Mapping) -> Option<&[[u8; 2]]> {
        let all = || self.mappings.iter();
        if mapping.is_special() {
            return None;
        }
        // Both come upon every new mapping of a process that asked for them (mlockall, prctl).
        let inherited = |flag: &[u8; 2]| flag == b"lo" || flag == b"mg";
        let inherits = all().any(|old| old.flags.iter().any(inherited));
        if mapping.name == b"[heap]" {
            return (!inherits).then_some(&[]);
        }
        let mut kin = all().filter(|old| old.is_kin_of(mapping)).peekable();
        if kin.peek().is_none() {
            return (mapping.is_plain() && !inherits).then_some(&[]);
        }
        unanimous(kin).or_else(|| {
            let same_permissions = |old: &&Mapping| old.permissions == mapping.permissions;
            unanimous(
                all()
                    .filter(|old| old.is_kin_of(mapping))
                    .filter(same_permissions),
            )
        })
    }
}

/// The flags that all of the mappings have, `None` if they differ or there are none.
fn unanimous<'a>(mut mappings: impl Iterator<Item = &'a Mapping>) -> Option<&'a [[u8; 2]]> {
    let flags = &mappings.next()?.flags;
    mappings
        .all(|other| other.flags == *flags)
        .then_some(flags.as_slice())
}

/// Whether the `rendered` text says what the `actual` smaps says, as far as CRIU looks.
///
/// # Errors
/// [`Unequal::Different`] with the first mapping that differs.
pub fn compare(actual: &[u8], rendered: &[u8]) -> Result<(), Unequal> {
    let (actual, rendered) = (mappings(actual)?, mappings(rendered)?);
    let longest = actual.len().max(rendered.len());
    let pairs = (0..longest).map(|index| (actual.get(index), rendered.get(index)));
    for (actual, rendered) in pairs {
        if let (Some(actual), Some(rendered)) = (actual, rendered)
            && actual.line == rendered.line
            && actual.flags == rendered.flags
        {
            continue;
        }
        let Some(named) = actual.or(rendered) else {
            continue;
        };
        let (start, end) = (named.start, named.end);
        let said = |of: Option<&Mapping>| of.map(Mapping::summary).unwrap_or_default();
        let (recorded, actual) = (said(rendered), said(actual));
        return Err(Difference {
            start,
            end,
            recorded,
            actual,
        }
        .into());
    }
    Ok(())
}

impl Mapping {
    /// Whether what was recorded as `self` can be (a part of) `later`, which overlaps it.
    fn continues_as(&self, later: &Self) -> bool {
        // Only the part of a stack that holds its first address has the name.
        let named = |mapping: &Self| mapping.is_special() && mapping.name != b"[stack]";
        let special = named(self) || named(later);
        self.permissions[3] == later.permissions[3]
            && (&self.device, self.inode) == (&later.device, later.inode)
            && (!special || self.name == later.name)
            && (self.is_anonymous()
                || self.start.wrapping_sub(self.offset) == later.start.wrapping_sub(later.offset))
    }

    /// Whether both were made the same way, as far as `maps` can tell.
    fn is_kin_of(&self, other: &Self) -> bool {
        let ordinary = |mapping: &Self| !mapping.is_special() && mapping.name != b"[heap]";
        ordinary(self)
            && ordinary(other)
            && self.permissions[3] == other.permissions[3]
            && self.device == other.device
            && self.is_anonymous() == other.is_anonymous()
    }

    /// Private memory without a file, or a file of a real disk: nothing that a mount option or a
    /// driver could have given flags to.
    fn is_plain(&self) -> bool {
        let private_memory = self.is_anonymous() && self.permissions[3] == b'p';
        private_memory || (self.inode != 0 && !self.device.starts_with("00:"))
    }

    fn is_anonymous(&self) -> bool {
        self.inode == 0 && self.device.bytes().all(|byte| byte == b'0' || byte == b':')
    }

    /// Mapped by the kernel: `[vdso]`, `[vvar]`, `[stack]` and the like.
    fn is_special(&self) -> bool {
        let ordinary = self.name == b"[heap]" || self.name.starts_with(b"[anon");
        self.name.starts_with(b"[") && !ordinary
    }

    fn summary(&self) -> String {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.split_once(' ').map_or("", |(_, rest)| rest.trim_end());
        let flags = self.flags.iter().map(|flag| String::from_utf8_lossy(flag));
        flags.fold(format!("{line}, flags"), |text, flag| text + " " + &flag)
    }
}

/// Mappings of a smaps or maps text; lines of smaps other than the first and `VmFlags` are skipped.
pub(super) fn mappings(text: &[u8]) -> Result<Vec<Mapping>, Malformed> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in text
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let malformed = || Malformed {
            line: String::from_utf8_lossy(line).into_owned(),
        };
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let mapping = found.last_mut().ok_or_else(malformed)?;
            mapping.flags = parse_flags(flags);
            mapping.words = words(flags).count();
        } else if !is_attribute(line) {
            let mapping = parse_first_line(line).ok_or_else(malformed)?;
            let sorted = found.last().is_none_or(|last| last.end <= mapping.start);
            if !sorted || mapping.start >= mapping.end {
                return Err(malformed());
            }
            found.push(mapping);
        }
    }
    Ok(found)
}

/// `Name:   value`: the first lines of mappings start with a lower-case hexadecimal number.
fn is_attribute(line: &[u8]) -> bool {
    line.first().is_some_and(u8::is_ascii_uppercase)
}

fn parse_flags(text: &[u8]) -> Vec<[u8; 2]> {
    let counted = words(text).filter(|word| !IGNORED.contains(word));
    let mut flags: Vec<[u8; 2]> = counted.filter_map(|word| word.try_into().ok()).collect();
    flags.sort_unstable();
    flags
}

fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

fn parse_first_line(line: &[u8]) -> Option<Mapping> {
    // Five fields separated by one space each, then padding and the name, which may have spaces.
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut field = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes().try_into().ok()?;
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let device = field()?.to_owned();
    let inode = field()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        permissions,
        offset,
        device,
        inode,
        name: fields.next().unwrap_or_default().trim_ascii().to_owned(),
        line: line.to_owned(),
        flags: Vec::new(),
        words: 0,
    })
}

#[cfg(test)]
#[path = "smaps_tests.rs"]
mod tests;
