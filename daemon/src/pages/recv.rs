//! The receiving half of the pipeline: parcels to store, on as many threads as there are cores.
//!
//! Knows no streams: whoever owns them reads a parcel to its end and hands over its bytes. A parcel
//! waits for a thread with the await of its stream, so the peer is slowed down by flow control, not
//! by memory here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::ErrorCode;
use thiserror::Error;
use tokio::sync::{Semaphore, watch};

use super::decode::{DecodeError, Decoder, Parcel};
use super::store::{Store, StoreError};

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
    rounds: watch::Sender<BTreeMap<Round, Tally>>,
}

/// What has come in of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Parcels in the store.
    pub parcels: u64,
    /// Their pages, zero pages too.
    pub pages: PageCount,
    /// Their bytes on the wire.
    pub wire_bytes: u64,
}

/// One parcel in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The space it is of.
    pub space: SpaceId,
    /// The round it is of.
    pub round: Round,
    /// Its pages, zero pages too.
    pub pages: PageCount,
}

/// Why a parcel did not get into the store. The migration cannot go on.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// Its bytes are no parcel.
    #[error("received bytes that are no parcel")]
    Parcel(#[source] DecodeError),
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
            rounds: watch::Sender::default(),
        }))
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.0.store
    }

    /// Decodes one parcel: the bytes of a stream without its prefix. Done when its pages are held.
    pub async fn receive(&self, parcel: Bytes) -> Result<Received, ReceiveError> {
        let threads = Arc::clone(&self.0.threads);
        let permit = threads
            .acquire_owned()
            .await
            .map_err(|_| ReceiveError::Cut)?;
        let shared = Arc::clone(&self.0);
        let decode = move || {
            let received = shared.receive(&parcel);
            drop(permit);
            received
        };
        let decoded = tokio::task::spawn_blocking(decode).await;
        decoded.map_err(|_| ReceiveError::Cut)?
    }

    /// Waits until `parcels` parcels of `round` are in the store, and returns what that came to.
    /// Does not end by itself when a parcel fails: whoever sees that error stops waiting.
    pub async fn round(&self, round: Round, parcels: u64) -> Tally {
        let mut rounds = self.0.rounds.subscribe();
        let tally =
            |rounds: &BTreeMap<Round, Tally>| rounds.get(&round).copied().unwrap_or_default();
        let complete = |rounds: &BTreeMap<Round, Tally>| parcels <= tally(rounds).parcels;
        let reached = rounds.wait_for(complete).await.map(|rounds| tally(&rounds));
        reached.expect("the sender lives as long as the receiver")
    }
}

impl Shared {
    fn receive(&self, bytes: &Bytes) -> Result<Received, ReceiveError> {
        let parcel = Parcel::parse(bytes).map_err(ReceiveError::Parcel)?;
        let (space, round) = (parcel.space(), parcel.round());
        let pages = PageCount(parcel.data_pages().0 + parcel.zero().len().0);
        let lock = || self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        let mut decoder = lock().pop().unwrap_or_default();
        let taken = self.store.take(&mut decoder, &parcel);
        lock().push(decoder);
        taken.map_err(|source| ReceiveError::Store { round, source })?;
        self.rounds.send_modify(|rounds| {
            let tally = rounds.entry(round).or_default();
            tally.parcels += 1;
            tally.pages.0 += pages.0;
            tally.wire_bytes += bytes.len() as u64;
            while ROUNDS_KEPT < rounds.len() {
                rounds.pop_first();
            }
        });
        Ok(Received {
            space,
            round,
            pages,
        })
    }
}

/// How many rounds are tallied: the one that is sent, and the ones a late question may be about.
const ROUNDS_KEPT: usize = 4;
