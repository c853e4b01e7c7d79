//! Digests of pages, for the comparison of both sides before the hand-over.
//!
//! At the source they are made while the workload stands still, of all its pages at once, so that
//! every millisecond counts: on as many threads as there are cores, each with a buffer of its own
//! that stays in its cache. Of 1.3 GiB in small pages, one thread spends 180 to 300 ms on reading,
//! the more the wilder they lie in memory, and 50 ms on hashing. At the target they are made when
//! pages are written: see [`crate::store`].
//!
//! xxh3-64: it must find faults of ours and of the hardware, not of an adversary; the peer is
//! authenticated.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry_proto::id::SpaceId;
use pageferry_proto::page::{PAGE_SIZE, PageCount};
use pageferry_proto::set::PageSet;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::read::{Misses, ReadError, Reader};

/// The digest of one page.
pub fn of_page(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

/// Digests of pages of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// The space.
    pub space: SpaceId,
    /// The process they were read of.
    pub pid: i32,
    /// The pages that could be read.
    pub pages: PageSet,
    /// One for each of them, in order.
    pub digests: Vec<u64>,
    /// Those that could not.
    pub unread: PageSet,
}

/// Why pages have no digests.
#[derive(Debug, Error)]
pub enum DigestError {
    /// The process could not be read.
    #[error("cannot read space {space}")]
    Read {
        /// The space.
        space: SpaceId,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The runtime is shutting down.
    #[error("hashing was cut off")]
    Cut,
}

/// Pages that are being hashed by threads, which go on until nobody waits for them any more.
#[derive(Debug)]
pub struct Hashing {
    made: mpsc::Receiver<Result<Digests, DigestError>>,
    /// Pieces of which nothing has been heard.
    left: usize,
}

impl Hashing {
    /// Begins to hash pages of processes that stand still, on `threads` threads, but at most
    /// [`THREADS_MAX`]. Must be called in a runtime.
    pub fn begin(
        wanted: impl IntoIterator<Item = (SpaceId, Arc<Reader>, PageSet)>,
        threads: usize,
    ) -> Self {
        let pieces: VecDeque<Piece> = wanted
            .into_iter()
            .flat_map(|(space, reader, pages)| {
                let pieces = pages.partition(PIECE_PAGES).into_iter();
                pieces.map(move |pages| Piece {
                    space,
                    reader: Arc::clone(&reader),
                    pages,
                })
            })
            .collect();
        let left = pieces.len();
        let (output, made) = mpsc::channel(MADE_MAX);
        let pieces = Arc::new(Mutex::new(pieces));
        for _ in 0..threads.clamp(1, THREADS_MAX).min(left) {
            let (pieces, output) = (Arc::clone(&pieces), output.clone());
            tokio::task::spawn_blocking(move || hash(&pieces, &output));
        }
        Self { made, left }
    }

    /// The digests of one more piece, in no order; none when there are no more. Cancelling loses
    /// nothing.
    pub async fn next(&mut self) -> Option<Result<Digests, DigestError>> {
        if self.left == 0 {
            return None;
        }
        // Threads end early only if they are never started.
        let made = self.made.recv().await.unwrap_or(Err(DigestError::Cut));
        self.left -= 1;
        Some(made)
    }
}

/// Some pages of a space.
#[derive(Debug)]
struct Piece {
    space: SpaceId,
    reader: Arc<Reader>,
    pages: PageSet,
}

impl Piece {
    /// Hashes the pages, until nobody wants them.
    fn hash(
        &self,
        buffer: &mut [u8],
        output: &mpsc::Sender<Result<Digests, DigestError>>,
    ) -> Result<Digests, DigestError> {
        let space = self.space;
        let mut all = Digests {
            space,
            pid: self.reader.pid(),
            pages: PageSet::new(),
            digests: Vec::with_capacity(usize::try_from(self.pages.len().0).unwrap_or(0)),
            unread: PageSet::new(),
        };
        for batch in self.pages.partition(BATCH_PAGES) {
            if output.is_closed() {
                return Err(DigestError::Cut);
            }
            let pages = self.reader.read(&batch, buffer, Misses::Settle);
            let pages = pages.map_err(|source| DigestError::Read { space, source })?;
            let length = usize::try_from(pages.read.len().bytes()).expect("at most a batch");
            let hashed = buffer[..length].chunks_exact(PAGE_SIZE).map(of_page);
            all.digests.extend(hashed);
            all.pages.union_with(&pages.read);
            all.unread.union_with(&pages.unread);
        }
        Ok(all)
    }
}

/// What one thread does.
fn hash(pieces: &Mutex<VecDeque<Piece>>, output: &mpsc::Sender<Result<Digests, DigestError>>) {
    let next = || {
        let mut pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.pop_front()
    };
    let mut buffer = vec![0; BATCH_BYTES];
    while let Some(piece) = next() {
        let made = piece.hash(&mut buffer, output);
        if output.blocking_send(made).is_err() {
            return;
        }
    }
}

/// Most threads that hash: together they read as fast as the memory of a processor is.
pub const THREADS_MAX: usize = 16;

/// Most pages that are hashed as one: 32 MiB, 5 ms of one thread's time. So the threads end
/// together, and 64 KiB of digests are on their way while the next ones are made.
pub const PIECE_PAGES: PageCount = PageCount(8192);

/// Most pieces that are made and not yet taken.
const MADE_MAX: usize = 8;

/// How much is read at a time: half of what the second cache of a processor holds, and enough that
/// calls do not count. With 64 KiB it takes a quarter longer; with 1 MiB, the same or more.
const BATCH_PAGES: PageCount = PageCount(128);
const BATCH_BYTES: usize = 128 * PAGE_SIZE;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pageferry_proto::page::{PageIndex, PageRun};

    use super::*;
    use crate::track::tests::{attach, start};

    const BASE: u64 = 0x2000_0000_0000;

    #[tokio::test]
    async fn every_page_of_every_space_is_hashed_once() {
        let mut wanted = Vec::new();
        let mut trials = Vec::new();
        for (number, pages) in [(1, 20_000_u64), (2, 3)] {
            let mut trial = start();
            trial.tell(&format!("map {BASE:#x} {pages} rw"));
            trial.tell(&format!("fill {BASE:#x} {pages} {number}"));
            let reader = attach(&trial).reader();
            let run = PageRun::new(PageIndex::containing(BASE), PageCount(pages)).unwrap();
            wanted.push((SpaceId(number), reader, PageSet::from(run)));
            trials.push(trial);
        }
        let mut left: BTreeMap<_, _> = wanted
            .iter()
            .map(|(space, _, pages)| (*space, pages.clone()))
            .collect();
        let mut hashing = Hashing::begin(wanted, 3);
        while let Some(made) = hashing.next().await {
            let made = made.unwrap();
            let byte = u8::try_from(made.space.0).unwrap();
            let expected = of_page(&[byte; PAGE_SIZE]);
            assert!(made.digests.iter().all(|digest| *digest == expected));
            assert_eq!(made.digests.len() as u64, made.pages.len().0);
            assert!(made.pages.len() <= PIECE_PAGES);
            assert!(made.unread.is_empty());
            let left = left.get_mut(&made.space).unwrap();
            assert!(left.is_superset(&made.pages));
            *left = left.difference(&made.pages);
        }
        assert!(left.values().all(PageSet::is_empty), "{left:?}");
    }

    #[tokio::test]
    async fn a_page_that_is_not_there_has_no_digest() {
        let mut trial = start();
        trial.tell(&format!("map {BASE:#x} 2 rw"));
        trial.tell(&format!("fill {BASE:#x} 2 7"));
        let reader = attach(&trial).reader();
        let start = PageIndex::containing(BASE);
        let run = PageRun::new(start, PageCount(3)).unwrap();
        let mut hashing = Hashing::begin([(SpaceId(1), reader, PageSet::from(run))], 1);
        let made = hashing.next().await.unwrap().unwrap();
        let missing = PageRun::new(PageIndex(start.0 + 2), PageCount(1)).unwrap();
        assert_eq!(made.unread, PageSet::from(missing));
        assert_eq!(made.digests, [of_page(&[7; PAGE_SIZE]); 2]);
        assert!(hashing.next().await.is_none());
    }

    #[tokio::test]
    async fn a_process_that_has_ended_is_an_error() {
        let trial = start();
        let reader = attach(&trial).reader();
        drop(trial);
        let run = PageRun::new(PageIndex::containing(BASE), PageCount(3)).unwrap();
        let mut hashing = Hashing::begin([(SpaceId(1), reader, PageSet::from(run))], 1);
        let made = hashing.next().await.unwrap();
        assert!(matches!(made, Err(DigestError::Read { .. })), "{made:?}");
    }
}
