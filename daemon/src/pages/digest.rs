//! Digests of pages, for the comparison of both sides before the hand-over.
//!
//! xxh3-64: it must find faults of ours and of the hardware, not of an adversary; the peer is
//! authenticated.

use std::sync::Arc;

use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex};
use pageferry_proto::set::PageSet;

use super::read::{ReadError, Reader};

/// The digest of one page.
pub fn of_page(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

/// Digests of pages of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// The pages that could be read.
    pub pages: PageSet,
    /// One for each of them, in order.
    pub digests: Vec<u64>,
    /// Those that could not.
    pub unread: PageSet,
}

/// The digests of `wanted` pages of a process that stands still. Blocks.
pub fn of_process(reader: &Arc<Reader>, wanted: &PageSet) -> Result<Digests, ReadError> {
    let mut all = Digests::default();
    let mut buffer = vec![0; BATCH_BYTES];
    for batch in wanted.partition(BATCH_PAGES) {
        let pages = reader.read(&batch, &mut buffer)?;
        let length = usize::try_from(pages.read.len().bytes()).expect("at most a batch");
        all.digests
            .extend(buffer[..length].chunks_exact(PAGE_SIZE).map(of_page));
        all.pages.union_with(&pages.read);
        all.unread.union_with(&pages.unread);
    }
    Ok(all)
}

/// The first page of `pages` whose digests differ. Both lists have one digest for each page; where
/// one is shorter, that is a difference too.
pub fn first_difference(pages: &PageSet, ours: &[u64], theirs: &[u64]) -> Option<PageIndex> {
    let place = match ours.iter().zip(theirs).position(|(a, b)| a != b) {
        Some(place) => place,
        None if ours.len() == theirs.len() => return None,
        None => ours.len().min(theirs.len()),
    };
    let mut left = place as u64;
    for run in pages.runs() {
        if left < run.count().0 {
            return Some(PageIndex(run.start().0 + left));
        }
        left -= run.count().0;
    }
    pages.runs().last().map(|run| PageIndex(run.end().0 - 1))
}

const BATCH_PAGES: PageCount = PageCount(256);
const BATCH_BYTES: usize = 256 * PAGE_SIZE;

#[cfg(test)]
mod tests {
    use pageferry_proto::page::PageRun;

    use super::*;

    #[test]
    fn the_first_page_that_differs_is_named() {
        let run = |start, count| PageRun::new(PageIndex(start), PageCount(count)).unwrap();
        let pages = PageSet::from_runs([run(10, 2), run(20, 2)]);
        assert_eq!(first_difference(&pages, &[1, 2, 3, 4], &[1, 2, 3, 4]), None);
        let differs = first_difference(&pages, &[1, 2, 3, 4], &[1, 2, 9, 9]);
        assert_eq!(differs, Some(PageIndex(20)));
        assert_eq!(
            first_difference(&pages, &[1, 2, 3, 4], &[1]),
            Some(PageIndex(11))
        );
    }
}
