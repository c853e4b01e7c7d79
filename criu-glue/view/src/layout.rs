//! The feed: a memory file through which a dump is told what to see.
//!
//! Compiled into both sides, the preload library that reads it and the crate that writes it, so
//! neither can change it alone. All numbers are in the machine's own byte order: both sides run on
//! one machine.
//!
//! ```text
//! 0      Header      magic, version, spaces, generation
//! 64     counters    written by the library, one u64 each
//! 4096   Space * n   one per process, any order
//! ...    ranges, guards, smaps texts, wherever the Space entries point to
//! ```
//!
//! `generation` is 0 while the feed is unpublished. The writer sets it to 0 before it changes
//! anything and to a new number afterwards; a reader that finds another number after reading than
//! before has read nothing.

// Each side uses its half.
#![allow(dead_code)]

/// Environment variable with the number of the feed's descriptor.
pub const FEED_VARIABLE: &str = "CRIU_VIEW_FEED";

/// Environment variable with the path of the cgroup that holds the tree, if one does.
pub const FREEZER_VARIABLE: &str = "CRIU_VIEW_FREEZER";

/// Environment variable, of any value, for a dump in which CRIU traces by itself.
pub const ALONE_VARIABLE: &str = "CRIU_VIEW_ALONE";

/// Environment variable, of any value, for a restore whose root has to adopt orphans.
pub const REAPER_VARIABLE: &str = "CRIU_VIEW_REAPER";

/// "CRIUVIEW", little-endian.
pub const MAGIC: u64 = 0x5745_4956_5549_5243;

/// Raised with every change of this file.
pub const VERSION: u32 = 3;

/// Size of the memory file, in bytes, sealed against shrinking. It is sparse: memory is used for
/// what is written only. Large enough for 65536 VMAs (the kernel's default limit for one process)
/// of 128 bytes of smaps each, thirty times.
pub const CAPACITY: u64 = 256 << 20; // 256 MiB

/// Offset of the first [`Space`].
pub const SPACES_AT: u64 = 4096;

/// Offset of the first counter.
pub const COUNTERS_AT: u64 = 64;

/// Most processes in one feed, and most ranges of one process, and as many guards: what a reader
/// believes at most.
pub const SPACES_MAX: u32 = 65_536;
pub const RANGES_MAX: u32 = 1 << 20;

/// Offset of the generation, the one number that is written last.
pub const GENERATION_AT: u64 = 16;

/// What the library counts, in this order from [`COUNTERS_AT`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Counter {
    /// The library found and mapped a feed of its version.
    Attached = 0,
    /// Scans answered "no pages" without asking the kernel.
    ScansHidden = 1,
    /// Scans asked and cut.
    ScansCut = 2,
    /// Scans passed to the kernel as they were.
    ScansPassed = 3,
    /// Opens of `smaps` answered with a recorded text.
    SmapsServed = 4,
    /// Opens of `smaps` passed to the kernel.
    SmapsPassed = 5,
    /// Scans for guard regions answered without the kernel, but for what is not hidden.
    GuardsServed = 6,
    /// Calls of ptrace and wait that were passed to the tracer.
    TracerAsked = 7,
}

pub const COUNTERS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub spaces: u32,
    pub generation: u64,
}

/// What is shown of one process. Offsets and lengths in bytes from the start of the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub pid: i32,
    /// Number of [`Range`]s, sorted by address, disjoint.
    pub ranges: u32,
    pub ranges_at: u64,
    pub smaps_at: u64,
    /// 0: the true smaps is shown.
    pub smaps_length: u64,
    /// Where all guard regions within the ranges are told, as [`Range`]s; 0: they are not told.
    pub guards_at: u64,
    /// Number of them, sorted by address, disjoint.
    pub guards: u32,
}

/// Addresses that seem to hold no pages; page-aligned, `start < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Header {
    pub const SIZE: usize = 24;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..8].copy_from_slice(&MAGIC.to_ne_bytes());
        bytes[8..12].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.spaces.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.generation.to_ne_bytes());
        bytes
    }

    /// Whether this is a feed of this version, published or not.
    pub fn is_known(bytes: &[u8; Self::SIZE]) -> bool {
        u64_at(bytes, 0) == MAGIC && u32_at(bytes, 8) == VERSION
    }

    /// `None` for another magic or version, an unpublished feed, or an absurd count.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let header = Self {
            spaces: u32_at(bytes, 12),
            generation: u64_at(bytes, 16),
        };
        let sane = header.generation != 0 && header.spaces <= SPACES_MAX;
        (Self::is_known(bytes) && sane).then_some(header)
    }
}

impl Space {
    pub const SIZE: usize = 48;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..4].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.ranges.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.ranges_at.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.smaps_at.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.smaps_length.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.guards_at.to_ne_bytes());
        bytes[40..44].copy_from_slice(&self.guards.to_ne_bytes());
        bytes
    }

    /// `None` if it points outside a feed of `capacity` bytes.
    pub fn from_bytes(bytes: &[u8; Self::SIZE], capacity: u64) -> Option<Self> {
        let space = Self {
            pid: u32_at(bytes, 0).cast_signed(),
            ranges: u32_at(bytes, 4),
            ranges_at: u64_at(bytes, 8),
            smaps_at: u64_at(bytes, 16),
            smaps_length: u64_at(bytes, 24),
            guards_at: u64_at(bytes, 32),
            guards: u32_at(bytes, 40),
        };
        let length = |ranges: u32| u64::from(ranges) * Range::SIZE as u64;
        let inside = space.ranges <= RANGES_MAX
            && space.guards <= RANGES_MAX
            && space.ranges_at.checked_add(length(space.ranges))? <= capacity
            && space.guards_at.checked_add(length(space.guards))? <= capacity
            && space.smaps_at.checked_add(space.smaps_length)? <= capacity;
        inside.then_some(space)
    }
}

impl Range {
    pub const SIZE: usize = 16;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..8].copy_from_slice(&self.start.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.end.to_ne_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        Self {
            start: u64_at(bytes, 0),
            end: u64_at(bytes, 8),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

const _: () = assert!(SPACES_AT >= COUNTERS_AT + 8 * COUNTERS as u64);
