//! The sending half of the pipeline: dirty pages to parcels, on as many threads as there are cores.
//!
//! Each thread takes a batch of pages, reads it, encodes it and hands the parcel on. A parcel is a
//! buffer of a pool and goes back there when the last reader drops it, so a slow network stops the
//! threads, and memory stays what the pools are.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::parcel::PARCEL_BYTES_MAX;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::encode::{self, Encoder};
use crate::pace::Pace;
use crate::pool::Pool;
use crate::read::{Misses, ReadError, Reader};

/// Takes parcels to the target. A parcel is the bytes of a stream without its prefix.
pub trait ParcelSink: Sync {
    /// Why a parcel cannot be sent.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Sends one parcel. Several sends run at the same time, at most [`SENDS_MAX`]. Memory is free
    /// again when all clones of `parcel` are dropped.
    fn send(&self, parcel: Bytes) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// Sends pages. One per migration; rounds of several spaces may run at the same time and share its
/// memory.
#[derive(Debug)]
pub struct Sender {
    threads: usize,
    raw: Pool,
    parcels: Pool,
    pace: Arc<Mutex<Pace>>,
}

/// What one round of one space came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundSent {
    /// Parcels that were sent.
    pub parcels: u64,
    /// Their pages, zero pages too.
    pub pages: PageCount,
    /// Those of them that are zero.
    pub zero_pages: PageCount,
    /// Bytes of all pages that were read.
    pub raw_bytes: u64,
    /// Bytes of all parcels.
    pub wire_bytes: u64,
    /// Pages that could not be read: they must be put back into the space's dirty set.
    pub unread: PageSet,
    /// From the first read to the last send.
    pub duration: Duration,
}

/// Why a round ended early.
#[derive(Debug, Error)]
pub enum SendError<E: std::error::Error + Send + Sync + 'static> {
    /// The process could not be read.
    #[error("cannot read space {space}")]
    Read {
        /// The space.
        space: SpaceId,
        /// What the sink had taken before: the target will have it, and counts it.
        sent: Box<RoundSent>,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The sink did not take a parcel.
    #[error("cannot send a parcel of space {space}")]
    Send {
        /// The space.
        space: SpaceId,
        /// Why.
        #[source]
        source: E,
    },
    /// The runtime is shutting down.
    #[error("sending was cut off")]
    Cut,
}

impl Sender {
    /// A sender that reads and encodes on `threads` threads.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let raw_bytes =
            usize::try_from(encode::PAGES_MAX.bytes()).expect("a parcel fits in memory");
        Self {
            threads,
            raw: Pool::new(threads, raw_bytes),
            parcels: Pool::new(threads + SENDS_MAX, PARCEL_BYTES_MAX),
            pace: Arc::new(Mutex::new(Pace::new())),
        }
    }

    /// Most memory of the pipeline, in bytes.
    pub fn memory_max(&self) -> u64 {
        let raw = self.threads as u64 * encode::PAGES_MAX.bytes();
        raw + (self.threads + SENDS_MAX) as u64 * PARCEL_BYTES_MAX as u64
    }

    /// Reads `pages` of a space and sends them; what may be given up is as for [`Reader::read`].
    /// Done when the sink has taken everything.
    pub async fn round<S: ParcelSink>(
        &self,
        space: SpaceId,
        (reader, misses): (&Arc<Reader>, Misses),
        pages: &PageSet,
        round: Round,
        sink: &S,
    ) -> Result<RoundSent, SendError<S::Error>> {
        let began = Instant::now();
        let work = Arc::new(Work {
            space,
            round,
            reader: Arc::clone(reader),
            misses,
            batches: Mutex::new(pages.partition(encode::PAGES_MAX).into()),
            stopped: AtomicBool::new(false),
            raw: self.raw.clone(),
            parcels: self.parcels.clone(),
            pace: Arc::clone(&self.pace),
        });
        work.pace().begin(began);
        // Threads stop at their next batch when this future is dropped.
        let _stop = StopOnDrop(Arc::clone(&work));
        let (output, parcels) = mpsc::channel(SENDS_MAX);
        let batches = work
            .batches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        let threads: Vec<_> = (0..self.threads.min(batches))
            .map(|_| {
                let (work, output) = (Arc::clone(&work), output.clone());
                tokio::task::spawn_blocking(move || work.run(&output))
            })
            .collect();
        drop(output);
        let mut sent = RoundSent::default();
        forward(space, parcels, sink, &mut sent).await?;
        let mut broken = None;
        for thread in threads {
            match thread.await.map_err(|_| SendError::Cut)? {
                Ok(unread) => sent.unread.union_with(&unread),
                Err(error) => broken = Some(error),
            }
        }
        sent.duration = began.elapsed();
        match broken {
            None => Ok(sent),
            Some(source) => Err(SendError::Read {
                space,
                sent: Box::new(sent),
                source,
            }),
        }
    }
}

/// Sends what comes out of the threads, several at a time, until they are done.
async fn forward<S: ParcelSink>(
    space: SpaceId,
    mut parcels: mpsc::Receiver<Made>,
    sink: &S,
    sent: &mut RoundSent,
) -> Result<(), SendError<S::Error>> {
    let mut sends = FuturesUnordered::new();
    loop {
        let made = tokio::select! {
            Some(result) = sends.next(), if !sends.is_empty() => {
                let result: Result<(), S::Error> = result;
                result.map_err(|source| SendError::Send { space, source })?;
                continue;
            }
            made = parcels.recv(), if sends.len() < SENDS_MAX => made,
        };
        let Some(made) = made else {
            break;
        };
        sent.parcels += 1;
        sent.pages.0 += made.pages.0;
        sent.zero_pages.0 += made.zero_pages.0;
        sent.raw_bytes += made.pages.bytes();
        sent.wire_bytes += made.parcel.len() as u64;
        sends.push(sink.send(made.parcel));
    }
    while let Some(result) = sends.next().await {
        result.map_err(|source| SendError::Send { space, source })?;
    }
    Ok(())
}

/// A parcel, and what is in it.
#[derive(Debug)]
struct Made {
    parcel: Bytes,
    pages: PageCount,
    zero_pages: PageCount,
}

/// What the threads of one round share.
#[derive(Debug)]
struct Work {
    space: SpaceId,
    round: Round,
    reader: Arc<Reader>,
    misses: Misses,
    batches: Mutex<VecDeque<PageSet>>,
    stopped: AtomicBool,
    raw: Pool,
    parcels: Pool,
    pace: Arc<Mutex<Pace>>,
}

impl Work {
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes parcels until there are no batches left, or nobody wants them. Returns what could not
    /// be read.
    fn run(&self, output: &mpsc::Sender<Made>) -> Result<PageSet, ReadError> {
        let mut encoder = Encoder::new();
        let mut unread = PageSet::new();
        let mut raw = self.raw.take();
        while let Some(batch) = self.next_batch() {
            let length = usize::try_from(batch.len().bytes()).expect("a parcel fits in memory");
            raw.resize(length, 0);
            let pages = self.reader.read(&batch, &mut raw, self.misses);
            let pages = pages.inspect_err(|_| self.stop())?;
            unread.union_with(&pages.unread);
            if pages.read.is_empty() {
                continue;
            }
            let length = usize::try_from(pages.read.len().bytes()).expect("part of the batch");
            let mut parcel = self.parcels.take();
            let bytes = &mut raw[..length];
            encoder.bottleneck = self.pace().bottleneck();
            let made = encoder.encode(self.space, self.round, &pages.read, bytes, &mut parcel);
            let data_bytes = made.data_pages.bytes();
            let made = Made {
                parcel: Bytes::from_owner(parcel),
                pages: pages.read.len(),
                zero_pages: made.zero_pages,
            };
            if output.blocking_send(made).is_err() {
                break;
            }
            self.pace().note(Instant::now(), data_bytes);
        }
        Ok(unread)
    }

    fn next_batch(&self) -> Option<PageSet> {
        if self.stopped.load(Ordering::Relaxed) {
            return None;
        }
        self.batches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

struct StopOnDrop(Arc<Work>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// How many parcels are on their way to the network at a time: enough to keep a link of 10 Gbit/s
/// with 20 ms of delay busy, and with 4 MiB each, 32 MiB.
pub const SENDS_MAX: usize = 8;

#[cfg(test)]
mod tests;
