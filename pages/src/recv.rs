//! The receiving half of the pipeline: parcels to store, on as many threads as there are cores.
//!
//! Knows no streams: whoever owns them reads a parcel to its end and hands over its bytes. A parcel
//! waits for a thread with the await of its stream, so the peer is slowed down by flow control, not
//! by memory here. Counts nothing: whether a parcel may go to the store is asked of the caller when
//! its checksum has been found to fit, and before a page of it takes the place of another.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::migration::ledger::LedgerError;
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::ErrorCode;
use thiserror::Error;
use tokio::sync::Semaphore;

use crate::decode::{DecodeError, Decoder, Parcel};
use crate::store::{Store, StoreError};

/// Decodes parcels into a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Receiver(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: Arc<Store>,
    /// One permit per thread.
    threads: Arc<Semaphore>,
    /// Decoders nobody uses.
    decoders: Mutex<Vec<Decoder>>,
}

/// One parcel in the store.
#[derive(Debug, PartialEq, Eq)]
pub struct Received<T> {
    /// What the caller said when it was asked.
    pub admitted: T,
    /// The space it is of.
    pub space: SpaceId,
    /// Its pages, zero pages too.
    pub pages: PageCount,
}

/// Why a parcel did not get into the store. The migration cannot go on.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// Its bytes are no parcel.
    #[error("received bytes that are no parcel")]
    Parcel(#[source] DecodeError),
    /// It has no place in what the source says.
    #[error("a parcel has no place in the ledger")]
    Refused(#[source] LedgerError),
    /// It has pages that nobody waits for.
    #[error("a parcel has pages of space {space} that are not missing")]
    Unasked {
        /// The space.
        space: SpaceId,
    },
    /// The store did not take it.
    #[error("cannot store a parcel of round {round}")]
    Store {
        /// The round.
        round: Round,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The runtime is shutting down.
    #[error("decoding was cut off")]
    Cut,
}

impl ReceiveError {
    /// What to tell the peer and the operator.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Parcel(source) => source.code(),
            Self::Refused(source) => source.code(),
            Self::Unasked { .. } => ErrorCode::Unexpected,
            Self::Store { source, .. } => source.code(),
            Self::Cut => ErrorCode::Restarted,
        }
    }
}

impl Receiver {
    /// A receiver into `store` that decodes on at most `threads` threads.
    pub fn new(store: Arc<Store>, threads: usize) -> Self {
        Self(Arc::new(Shared {
            store,
            threads: Arc::new(Semaphore::new(threads.max(1))),
            decoders: Mutex::default(),
        }))
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.0.store
    }

    /// Decodes one parcel: the bytes of a stream without its prefix. Done when its pages are held.
    /// `admit` is asked with its round, and what it answers is returned when that is so.
    pub async fn receive<T: Send + 'static>(
        &self,
        parcel: Bytes,
        admit: impl FnOnce(Round) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<Received<T>, ReceiveError> {
        let threads = Arc::clone(&self.0.threads);
        let permit = threads
            .acquire_owned()
            .await
            .map_err(|_| ReceiveError::Cut)?;
        let shared = Arc::clone(&self.0);
        let decode = move || {
            let received = shared.receive(&parcel, admit);
            drop(permit);
            received
        };
        let decoded = tokio::task::spawn_blocking(decode).await;
        decoded.map_err(|_| ReceiveError::Cut)?
    }

    /// The same of a parcel of no round: pages that were asked for, each of which must be one that
    /// `is_missing` says is. Answers with its space and pages when their contents are in the store.
    ///
    /// Few, and waited for: they do not wait for the threads that rounds have.
    pub async fn fetch(
        &self,
        parcel: Bytes,
        is_missing: impl FnOnce(SpaceId, &PageSet) -> bool + Send + 'static,
    ) -> Result<(SpaceId, PageSet), ReceiveError> {
        let shared = Arc::clone(&self.0);
        let decode = move || shared.fetch(&parcel, is_missing);
        let decoded = tokio::task::spawn_blocking(decode).await;
        decoded.map_err(|_| ReceiveError::Cut)?
    }
}

impl Shared {
    fn receive<T>(
        &self,
        bytes: &Bytes,
        admit: impl FnOnce(Round) -> Result<T, LedgerError>,
    ) -> Result<Received<T>, ReceiveError> {
        let parcel = Parcel::parse(bytes).map_err(ReceiveError::Parcel)?;
        let (space, round) = (parcel.space(), parcel.round());
        let admitted = admit(round).map_err(ReceiveError::Refused)?;
        let pages = PageCount(parcel.data_pages().0 + parcel.zero().len().0);
        self.take(&parcel)?;
        Ok(Received {
            admitted,
            space,
            pages,
        })
    }

    fn fetch(
        &self,
        bytes: &Bytes,
        is_missing: impl FnOnce(SpaceId, &PageSet) -> bool,
    ) -> Result<(SpaceId, PageSet), ReceiveError> {
        let parcel = Parcel::parse(bytes).map_err(ReceiveError::Parcel)?;
        let (space, pages) = (parcel.space(), parcel.data().union(&parcel.zero()));
        if !is_missing(space, &pages) {
            return Err(ReceiveError::Unasked { space });
        }
        self.take(&parcel)?;
        Ok((space, pages))
    }

    fn take(&self, parcel: &Parcel<'_>) -> Result<(), ReceiveError> {
        let round = parcel.round();
        let lock = || self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        let mut decoder = lock().pop().unwrap_or_default();
        let taken = self.store.take(&mut decoder, parcel);
        lock().push(decoder);
        taken.map_err(|source| ReceiveError::Store { round, source })
    }
}
