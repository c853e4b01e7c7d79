//! What a memory file holds, as digests: one for each page with contents.
//!
//! They are made while the workload still runs, so that nothing has to be read when it stands
//! still. Each is made of bytes read back from the file, not of those that were written to it: what
//! counts is what the file holds.
//!
//! Invariant: a digest is never older than its page. Whoever changes pages has this table locked
//! from before the change until after it; it takes their digests out first, and puts new ones in
//! only when it has read back what is there then. So a change that fails half way, or whose pages
//! cannot be read back, leaves pages without a digest, and these are equal to nothing.
//!
//! Memory: 8 bytes for each page, and some 30 for each 64 pages of addresses in which there is one:
//! 2.8 MiB for 1.3 GiB. At the worst, which is pages that are each alone in their 256 KiB, 550
//! bytes for each of them, an eighth and a bit of what they take themselves. Zero pages are not in
//! it: they are holes, which nobody counts.

use std::collections::BTreeMap;
use std::io;

use pageferry_proto::migration::ledger::HeldPages;
use pageferry_proto::page::{PAGE_SIZE, PageIndex, PageRun};
use pageferry_proto::set::PageSet;

use super::file::MemoryFile;
use crate::digest;

/// The digests of the pages of one memory file.
#[derive(Debug, Default)]
pub(super) struct Digests {
    /// By the number of their first page, divided by how many there are in one.
    chunks: BTreeMap<u64, Box<Chunk>>,
    /// What is read back at a time.
    buffer: Vec<u8>,
}

/// Pages that follow each other, some of which have digests.
#[derive(Debug)]
struct Chunk {
    /// Which, bit by bit.
    known: u64,
    digests: [u64; CHUNK_PAGES],
}

impl Digests {
    /// Takes out the pages of `run`, which are about to change.
    pub fn forget(&mut self, run: PageRun) {
        let numbers = chunk_of(run.start())..=chunk_of(PageIndex(run.end().0 - 1));
        let emptied = self.chunks.extract_if(numbers, |number, chunk| {
            let first = number * CHUNK_PAGES as u64;
            let start = run.start().0.saturating_sub(first);
            let end = (run.end().0 - first).min(CHUNK_PAGES as u64);
            chunk.known &= !(u64::MAX >> (CHUNK_PAGES as u64 - (end - start)) << start);
            chunk.known == 0
        });
        emptied.for_each(drop);
    }

    /// Puts in the pages of `run`, which have contents: reads them back.
    pub fn record(&mut self, memory: &MemoryFile, run: PageRun) -> io::Result<()> {
        self.buffer.resize(CHUNK_PAGES * PAGE_SIZE, 0);
        for part in parts(run) {
            let length = usize::try_from(part.bytes()).expect("at most a chunk");
            let bytes = &mut self.buffer[..length];
            memory.read(part.start(), bytes)?;
            let chunk = self.chunks.entry(chunk_of(part.start())).or_default();
            let first = place_of(part.start());
            for (place, page) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                chunk.digests[place] = digest::of_page(page);
                chunk.known |= 1 << place;
            }
        }
        Ok(())
    }

    /// Puts in what has contents among the pages of `run`, which should be holes: none, unless
    /// something is wrong, or the kernel has kept cleared memory of a huge page.
    pub fn record_contents(&mut self, memory: &MemoryFile, run: PageRun) -> io::Result<()> {
        let mut page = run.start();
        while let Some(data) = memory.data_from(page)?.filter(|data| *data < run.end()) {
            let hole = memory.hole_from(data)?.min(run.end());
            let part = PageRun::between(data, hole).map_err(io::Error::other)?;
            self.record(memory, part)?;
            page = part.end();
        }
        Ok(())
    }

    /// The first page of `pages` that is not held, or whose digest is not the one of `theirs`,
    /// which has one for each of `pages`, in order.
    pub fn first_difference(
        &self,
        held: &HeldPages,
        pages: &PageSet,
        theirs: &[u64],
    ) -> Option<PageIndex> {
        let of_zero = digest::of_page(&[0; PAGE_SIZE]);
        let (mut data, mut zero) = (Cursor(held.data.runs()), Cursor(held.zero.runs()));
        let mut theirs = theirs.iter();
        for part in pages.runs().iter().flat_map(|run| parts(*run)) {
            let chunk = self.chunks.get(&chunk_of(part.start()));
            for page in (part.start().0..part.end().0).map(PageIndex) {
                let known = chunk.and_then(|chunk| chunk.digest(place_of(page)));
                let ours = if data.reaches(page) {
                    known
                } else if zero.reaches(page) {
                    // Contents where a hole should be are the digest of nothing that is held.
                    Some(of_zero).filter(|_| known.is_none_or(|known| known == of_zero))
                } else {
                    None
                };
                if ours.is_none() || ours != theirs.next().copied() {
                    return Some(page);
                }
            }
        }
        None
    }
}

impl Chunk {
    fn digest(&self, place: usize) -> Option<u64> {
        (self.known >> place & 1 == 1).then(|| self.digests[place])
    }
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            known: 0,
            digests: [0; CHUNK_PAGES],
        }
    }
}

/// Where in the runs of a set pages are that come in order.
struct Cursor<'a>(&'a [PageRun]);

impl Cursor<'_> {
    /// Whether `page`, which is above those asked for before, is in the set.
    fn reaches(&mut self, page: PageIndex) -> bool {
        while let [first, rest @ ..] = self.0
            && first.end() <= page
        {
            self.0 = rest;
        }
        self.0.first().is_some_and(|run| run.start() <= page)
    }
}

/// The parts of `run` that are in different chunks, in order.
fn parts(run: PageRun) -> impl Iterator<Item = PageRun> {
    let mut start = run.start();
    std::iter::from_fn(move || {
        let next = PageIndex((chunk_of(start) + 1) * CHUNK_PAGES as u64);
        let part = PageRun::between(start, run.end().min(next)).ok()?;
        start = part.end();
        Some(part)
    })
}

fn chunk_of(page: PageIndex) -> u64 {
    page.0 / CHUNK_PAGES as u64
}

fn place_of(page: PageIndex) -> usize {
    (page.0 % CHUNK_PAGES as u64) as usize
}

/// Pages of one chunk, and of one read: one bit each in a word, and 256 KiB, which a processor's
/// second cache holds.
const CHUNK_PAGES: usize = u64::BITS as usize;
