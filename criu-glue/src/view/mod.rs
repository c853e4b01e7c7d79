//! What a dump is shown instead of the truth: the writer's side of the preload library in
//! `criu-glue/view`.
//!
//! A [`Feed`] is made and shared with a worker when the worker starts; what it tells is set and
//! published later, before the dump is requested. Told of a process can be: address ranges that
//! seem to hold no pages, the guard regions within them, and the text of its `smaps`. A process
//! that is not mentioned is seen as it is.
//!
//! The caller answers for the truth of it. A hidden range whose pages do not reach the target some
//! other way is lost; a smaps text that is not what the kernel would say makes a workload that is
//! restored differently. [`smaps`] renders such a text and finds the difference.

pub mod flags;
#[path = "../../view/src/layout.rs"]
mod layout;
mod seen;
pub mod smaps;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::rpc::ViewFds;
use layout::{CAPACITY, COUNTERS, COUNTERS_AT, Counter, Header, RANGES_MAX, SPACES_MAX, Space};

pub(crate) use layout::{ALONE_VARIABLE, FEED_VARIABLE, FREEZER_VARIABLE, REAPER_VARIABLE};
pub use seen::Blind;

/// The writer's end of a feed.
#[derive(Debug)]
pub struct Feed {
    memory: File,
    spaces: BTreeMap<i32, Shown>,
    generation: u64,
}

#[derive(Debug, Default)]
struct Shown {
    /// Sorted, disjoint, not adjacent.
    hidden: Vec<(u64, u64)>,
    /// Likewise, and none outside of `hidden`; none if the kernel is to be asked.
    guards: Option<Vec<(u64, u64)>>,
    smaps: Vec<u8>,
}

/// How often the library was asked, since the feed was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Programs that loaded the library and found a feed of their version. Whether CRIU is among
    /// them [`Feed::check_seen_by`] tells.
    pub attached: u64,
    /// Scans answered without the kernel, cut, and passed on.
    pub scans_hidden: u64,
    pub scans_cut: u64,
    pub scans_passed: u64,
    /// Opens of `smaps` answered with our text, and passed on.
    pub smaps_served: u64,
    pub smaps_passed: u64,
    /// Scans for guard regions that were answered with what was told of them.
    pub guards_served: u64,
    /// Calls of ptrace and wait that CRIU left to its tracer; 0 where it traces by itself.
    pub tracer_asked: u64,
}

/// Why a feed could not be made or told something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    #[error("cannot create a memory file for the view")]
    Create(#[source] io::Error),
    #[error("cannot write to the view's memory file")]
    Write(#[source] io::Error),
    #[error("cannot read the view's memory file")]
    Read(#[source] io::Error),
    #[error("cannot duplicate the view's memory file")]
    Share(#[source] io::Error),
    #[error("range {start:#x}-{end:#x} of process {pid} is empty or not page-aligned")]
    Range { pid: i32, start: u64, end: u64 },
    #[error("guard region {start:#x}-{end:#x} of process {pid} is not within a hidden range")]
    Guard { pid: i32, start: u64, end: u64 },
    #[error("the view of {spaces} processes is too large")]
    TooLarge { spaces: usize },
}

impl Feed {
    /// An unpublished feed that tells nothing.
    ///
    /// # Errors
    /// [`FeedError::Create`] when there is no memory file to be had.
    pub fn create() -> Result<Self, FeedError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memory = memfd_create(c"criu-view", flags).map_err(|e| FeedError::Create(e.into()))?;
        let memory = File::from(memory);
        memory.set_len(CAPACITY).map_err(FeedError::Create)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| FeedError::Create(e.into()))?;
        let unpublished = Header {
            spaces: 0,
            generation: 0,
        };
        memory
            .write_all_at(&unpublished.to_bytes(), 0)
            .map_err(FeedError::Create)?;
        Ok(Self {
            memory,
            spaces: BTreeMap::new(),
            generation: 0,
        })
    }

    /// What a worker is started with to see through this feed. `library` is the path of
    /// `libcriu_view.so` where the worker will look for it.
    ///
    /// # Errors
    /// [`FeedError::Share`] when no descriptor is left.
    pub fn share(&self, library: PathBuf) -> Result<ViewFds, FeedError> {
        let feed = self.memory.try_clone().map_err(FeedError::Share)?;
        Ok(ViewFds {
            library,
            freezer: None,
            tracer: true,
            feed: OwnedFd::from(feed),
        })
    }

    /// Address ranges of `pid` that seem to hold no pages; they replace the earlier ones. Seen
    /// after [`Self::publish`].
    ///
    /// # Errors
    /// [`FeedError::Range`]; then nothing is changed.
    pub fn set_ranges(&mut self, pid: i32, ranges: &[(u64, u64)]) -> Result<(), FeedError> {
        let hidden = merged(pid, ranges)?;
        let shown = self.spaces.entry(pid).or_default();
        shown.hidden = hidden;
        shown.guards = None;
        Ok(())
    }

    /// All guard regions within the hidden ranges of `pid`, which are to be set before: without
    /// them the kernel is asked, for 1.3 ms per GiB. Seen after [`Self::publish`].
    ///
    /// # Errors
    /// [`FeedError::Range`] or [`FeedError::Guard`]; then nothing is changed.
    pub fn set_guards(&mut self, pid: i32, guards: &[(u64, u64)]) -> Result<(), FeedError> {
        let guards = merged(pid, guards)?;
        let shown = self.spaces.entry(pid).or_default();
        let hidden = |&&(start, end): &&(u64, u64)| {
            let place = shown.hidden.partition_point(|range| range.1 <= start);
            shown
                .hidden
                .get(place)
                .is_some_and(|range| range.0 <= start && end <= range.1)
        };
        if let Some(&(start, end)) = guards.iter().find(|guard| !hidden(guard)) {
            return Err(FeedError::Guard { pid, start, end });
        }
        // More than the table holds: the kernel is asked.
        shown.guards = (guards.len() <= RANGES_MAX as usize).then_some(guards);
        Ok(())
    }

    /// The text CRIU shall read as the smaps of `pid`; empty for the true one. Seen after
    /// [`Self::publish`].
    pub fn set_smaps(&mut self, pid: i32, text: &[u8]) {
        self.spaces.entry(pid).or_default().smaps = text.to_vec();
    }

    /// Forgets all processes. Seen after [`Self::publish`].
    pub fn clear(&mut self) {
        self.spaces.clear();
    }

    /// Makes the workers see what was set. Not while one of them dumps: it would see a bit of both.
    ///
    /// # Errors
    /// [`FeedError::TooLarge`] or [`FeedError::Write`]; the feed is unpublished then.
    pub fn publish(&mut self) -> Result<(), FeedError> {
        self.withdraw()?;
        let count = self.spaces.len();
        let too_large = FeedError::TooLarge { spaces: count };
        let spaces = u32::try_from(count)
            .ok()
            .filter(|count| *count <= SPACES_MAX);
        let Some(spaces) = spaces else {
            return Err(too_large);
        };
        let Some(content) = self.content() else {
            return Err(too_large);
        };
        self.generation += 1;
        let header = Header {
            spaces,
            generation: 0,
        };
        let generation = self.generation.to_ne_bytes();
        self.memory
            .write_all_at(&content, layout::SPACES_AT)
            .and_then(|()| self.memory.write_all_at(&header.to_bytes(), 0))
            .and_then(|()| self.memory.write_all_at(&generation, layout::GENERATION_AT))
            .map_err(FeedError::Write)
    }

    /// Makes the workers see the truth.
    ///
    /// # Errors
    /// [`FeedError::Write`], which leaves the feed as it was.
    pub fn withdraw(&mut self) -> Result<(), FeedError> {
        let unpublished = 0_u64.to_ne_bytes();
        self.memory
            .write_all_at(&unpublished, layout::GENERATION_AT)
            .map_err(FeedError::Write)
    }

    /// What the library has counted so far.
    ///
    /// # Errors
    /// [`FeedError::Read`].
    pub fn counters(&self) -> Result<Counters, FeedError> {
        let mut bytes = [0; 8 * COUNTERS];
        self.memory
            .read_exact_at(&mut bytes, COUNTERS_AT)
            .map_err(FeedError::Read)?;
        let of = |counter: Counter| {
            let at = 8 * counter as usize;
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        Ok(Counters {
            attached: of(Counter::Attached),
            scans_hidden: of(Counter::ScansHidden),
            scans_cut: of(Counter::ScansCut),
            scans_passed: of(Counter::ScansPassed),
            smaps_served: of(Counter::SmapsServed),
            smaps_passed: of(Counter::SmapsPassed),
            guards_served: of(Counter::GuardsServed),
            tracer_asked: of(Counter::TracerAsked),
        })
    }

    /// The space table with ranges and texts behind it, or `None` if it is too large.
    fn content(&self) -> Option<Vec<u8>> {
        let table = self.spaces.len() * Space::SIZE;
        let mut content = vec![0; table];
        for (index, (&pid, shown)) in self.spaces.iter().enumerate() {
            let mut place = |table: &[(u64, u64)]| {
                let at = layout::SPACES_AT + content.len() as u64;
                for &(start, end) in table {
                    content.extend_from_slice(&layout::Range { start, end }.to_bytes());
                }
                let count = u32::try_from(table.len()).ok();
                count
                    .filter(|count| *count <= RANGES_MAX)
                    .map(|count| (at, count))
            };
            let (ranges_at, ranges) = place(&shown.hidden)?;
            let (guards_at, guards) = match &shown.guards {
                Some(guards) => place(guards)?,
                None => (0, 0),
            };
            let smaps_at = layout::SPACES_AT + content.len() as u64;
            content.extend_from_slice(&shown.smaps);
            let smaps_length = shown.smaps.len() as u64;
            let space = Space {
                pid,
                ranges,
                ranges_at,
                smaps_at,
                smaps_length,
                guards_at,
                guards,
            };
            content[index * Space::SIZE..][..Space::SIZE].copy_from_slice(&space.to_bytes());
        }
        let end = layout::SPACES_AT + content.len() as u64;
        (end <= CAPACITY).then_some(content)
    }
}

/// Sorted, disjoint, not adjacent; refused if one of them is no range of pages.
fn merged(pid: i32, ranges: &[(u64, u64)]) -> Result<Vec<(u64, u64)>, FeedError> {
    let fits = |&(start, end): &(u64, u64)| start < end && (start | end) % PAGE_SIZE == 0;
    if let Some(&(start, end)) = ranges.iter().find(|range| !fits(range)) {
        return Err(FeedError::Range { pid, start, end });
    }
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(sorted.len());
    for (start, end) in sorted {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    Ok(merged)
}

/// The smallest page of every supported machine, in bytes: what pagemap counts in.
const PAGE_SIZE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(feed: &Feed, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        feed.memory
            .read_exact_at(&mut bytes, at)
            .expect("inside the file");
        bytes
    }

    #[test]
    fn a_published_feed_says_what_was_set() {
        let mut feed = Feed::create().expect("memfd");
        assert_eq!(Header::from_bytes(&read(&feed, 0)), None);
        feed.set_ranges(9, &[(0x5000, 0x6000), (0x1000, 0x3000), (0x3000, 0x4000)])
            .expect("fits");
        feed.set_smaps(4, b"text");
        feed.publish().expect("fits");
        let header = Header::from_bytes(&read(&feed, 0)).expect("published");
        assert_eq!(
            header,
            Header {
                spaces: 2,
                generation: 1
            }
        );
        let space = |index: u64| {
            let bytes = read(&feed, layout::SPACES_AT + index * Space::SIZE as u64);
            Space::from_bytes(&bytes, CAPACITY).expect("well formed")
        };
        let (first, second) = (space(0), space(1));
        assert_eq!((first.pid, first.ranges, first.smaps_length), (4, 0, 4));
        assert_eq!(&read::<4>(&feed, first.smaps_at), b"text");
        assert_eq!((second.pid, second.ranges, second.smaps_length), (9, 2, 0));
        let range =
            |index: u64| layout::Range::from_bytes(&read(&feed, second.ranges_at + 16 * index));
        assert_eq!(
            range(0),
            layout::Range {
                start: 0x1000,
                end: 0x4000
            }
        );
        assert_eq!(
            range(1),
            layout::Range {
                start: 0x5000,
                end: 0x6000
            }
        );
    }

    #[test]
    fn every_publication_has_a_new_generation_and_a_withdrawn_feed_none() {
        let mut feed = Feed::create().expect("memfd");
        let generation = |feed: &Feed| Header::from_bytes(&read(feed, 0)).map(|h| h.generation);
        feed.publish().expect("fits");
        assert_eq!(generation(&feed), Some(1));
        feed.withdraw().expect("writable");
        assert_eq!(generation(&feed), None);
        feed.publish().expect("fits");
        assert_eq!(generation(&feed), Some(2));
        assert_eq!(feed.counters().expect("readable"), Counters::default());
    }

    #[test]
    fn guards_are_told_only_of_what_is_hidden() {
        let mut feed = Feed::create().expect("memfd");
        let told = |feed: &Feed| {
            let space = Space::from_bytes(&read(feed, layout::SPACES_AT), CAPACITY);
            let space = space.expect("well formed");
            (space.guards_at != 0, space.guards)
        };
        feed.set_ranges(7, &[(0x1000, 0x5000)]).expect("fits");
        feed.publish().expect("fits");
        assert_eq!(told(&feed), (false, 0));
        feed.set_guards(7, &[(0x4000, 0x5000), (0x1000, 0x2000)])
            .expect("hidden");
        for outside in [(0x5000, 0x6000), (0x4000, 0x6000), (0, 0x2000)] {
            let refused = feed.set_guards(7, &[outside]);
            assert!(
                matches!(refused, Err(FeedError::Guard { .. })),
                "{outside:x?}"
            );
        }
        feed.publish().expect("fits");
        assert_eq!(told(&feed), (true, 2));
        feed.set_guards(7, &[]).expect("none at all");
        feed.publish().expect("fits");
        assert_eq!(told(&feed), (true, 0));
        feed.set_ranges(7, &[(0x1000, 0x5000)]).expect("fits");
        feed.publish().expect("fits");
        assert_eq!(told(&feed), (false, 0));
    }

    #[test]
    fn a_range_that_is_no_range_is_refused() {
        let mut feed = Feed::create().expect("memfd");
        for range in [
            (0x1000, 0x1000),
            (0x2000, 0x1000),
            (0x1000, 0x1800),
            (1, 0x1000),
        ] {
            let refused = feed.set_ranges(1, &[(0, 0x1000), range]);
            assert!(matches!(refused, Err(FeedError::Range { .. })), "{range:?}");
        }
    }
}
