//! What a target takes in: parcels into the store, images into a folder, live sets and digests into
//! memory, and the check that all of it is there.
//!
//! Invariants: nothing counts before its checksum fits; a stream that fails ends the intake with a
//! named failure, it is never skipped; the ledger is complete when every live page of every space
//! is held, and what is held but not live has been given up.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Final;
use pageferry_proto::wire::parcel::PARCEL_BYTES_MAX;
use pageferry_proto::wire::stream::{
    CHECKSUM_BYTES, ImageFileHeader, SetHeader, StreamKind, unseal,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::migration::text::{chain, internal};
use crate::net::lanes::DataReceiver;
use crate::net::stream::{DataStream, StreamReader};
use crate::pages::pool::Pool;
use crate::pages::recv::Receiver;
use crate::pages::store::Store;

/// Streams read at the same time: enough that the network never waits for a decoder. Each holds at
/// most one parcel.
const STREAMS_MAX: usize = 8;

/// Everything one incoming workload sends.
#[derive(Debug)]
pub struct Intake {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    receiver: Receiver,
    images: PathBuf,
    /// One for each stream that is read.
    places: Arc<Semaphore>,
    /// One for each place, so that whoever has a place need not wait.
    parcels: Pool,
    sets: Mutex<Sets>,
    counts: watch::Sender<Counts>,
}

#[derive(Debug, Default)]
struct Sets {
    live: BTreeMap<SpaceId, PageSet>,
    digests: Vec<(SpaceId, PageSet, Vec<u64>)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    live_sets: u32,
    images: u32,
    digests: u32,
}

impl Intake {
    /// An intake into `store`, with images going to the folder `images`, which is emptied.
    pub fn new(store: Arc<Store>, images: PathBuf, threads: usize) -> Result<Self, Failure> {
        drop(fs::remove_dir_all(&images));
        fs::create_dir_all(&images).map_err(|error| image_failed(&images, &error))?;
        Ok(Self::over(store, images, threads))
    }

    /// An intake that nothing will come to: that of a workload which is already restored.
    pub fn detached(store: Arc<Store>) -> Self {
        Self::over(store, PathBuf::new(), 1)
    }

    fn over(store: Arc<Store>, images: PathBuf, threads: usize) -> Self {
        let shared = Shared {
            receiver: Receiver::new(store, threads),
            images,
            places: Arc::new(Semaphore::new(STREAMS_MAX)),
            parcels: Pool::new(STREAMS_MAX, PARCEL_BYTES_MAX),
            sets: Mutex::default(),
            counts: watch::Sender::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Takes in the streams of one connection until it is lost. The first failure is sent to
    /// `failures` and ends it.
    pub fn serve(&self, mut data: DataReceiver, failures: mpsc::Sender<Failure>) -> JoinHandle<()> {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            while let Some(stream) = data.next().await {
                let Ok(place) = Arc::clone(&shared.places).acquire_owned().await else {
                    return;
                };
                let (shared, failures) = (Arc::clone(&shared), failures.clone());
                tokio::spawn(async move {
                    if let Err(failure) = shared.take(stream).await {
                        // One failure is enough; the others follow from it.
                        drop(failures.try_send(failure));
                    }
                    drop(place);
                });
            }
        })
    }

    /// Waits until a round is in the store.
    pub async fn round(&self, round: Round, parcels: u32, pages: PageCount) -> Result<(), Failure> {
        let tally = self.shared.receiver.round(round, u64::from(parcels)).await;
        if tally.pages == pages {
            return Ok(());
        }
        Err(Failure::new(
            ErrorCode::LedgerIncomplete,
            format!(
                "round {round} brought {} pages instead of {}",
                tally.pages.0, pages.0
            ),
        ))
    }

    /// Waits until everything of the final round is here, and checks it against the live sets.
    pub async fn complete(&self, last: &Final) -> Result<(), Failure> {
        self.round(last.round, last.parcels, last.pages).await?;
        let mut counts = self.shared.counts.subscribe();
        let all = |counts: &Counts| {
            last.live_sets <= counts.live_sets
                && last.images <= counts.images
                && last.digests <= counts.digests
        };
        let reached = counts.wait_for(all).await;
        reached.map_err(|error| internal(&error))?;
        drop(counts);
        let shared = Arc::clone(&self.shared);
        let verify = last.verify;
        let checked = tokio::task::spawn_blocking(move || {
            shared.settle()?;
            if verify { shared.verify() } else { Ok(()) }
        });
        checked.await.map_err(|error| internal(&error))?
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.shared.receiver.store()
    }

    /// The spaces the workload has at its end.
    pub fn spaces(&self) -> Vec<SpaceId> {
        self.shared.lock().live.keys().copied().collect()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, stream: DataStream) -> Result<(), Failure> {
        let kind = stream.kind;
        let mut reader = stream.reader;
        match kind {
            StreamKind::ImageFile => {
                let store = self.receiver.store();
                let files = take_images(&self.images, store, &mut reader).await?;
                self.counts.send_modify(|counts| counts.images += files);
                Ok(())
            }
            StreamKind::Parcel => {
                let mut parcel = self.parcels.take();
                let read = reader.read_to_end(&mut parcel).await;
                read.map_err(|error| lost(&error))?;
                let received = self.receiver.receive(Bytes::from_owner(parcel)).await;
                received
                    .map(drop)
                    .map_err(|error| Failure::new(error.code(), chain(&error)))
            }
            StreamKind::LiveSet => {
                let bytes = whole(&mut reader).await?;
                let (space, set, rest) = set(&bytes)?;
                if !rest.is_empty() {
                    return Err(malformed("live set"));
                }
                self.lock().live.insert(space, set);
                self.counts.send_modify(|counts| counts.live_sets += 1);
                Ok(())
            }
            StreamKind::Digests => {
                let bytes = whole(&mut reader).await?;
                let (space, set, rest) = set(&bytes)?;
                let (digests, odd) = rest.as_chunks::<8>();
                if !odd.is_empty() || digests.len() as u64 != set.len().0 {
                    return Err(malformed("digests"));
                }
                let digests = digests
                    .iter()
                    .map(|bytes| u64::from_le_bytes(*bytes))
                    .collect();
                self.lock().digests.push((space, set, digests));
                self.counts.send_modify(|counts| counts.digests += 1);
                Ok(())
            }
        }
    }

    /// Gives up what is not live, and checks that what is live is held.
    fn settle(&self) -> Result<(), Failure> {
        let live = self.lock().live.clone();
        let store = self.receiver.store();
        for space in store.spaces() {
            if !live.contains_key(&space.id()) {
                let held = space.held().pages();
                space.punch(&held).map_err(|error| internal(&error))?;
            }
        }
        for (id, live) in &live {
            let space = store.space(*id).map_err(|error| internal(&error))?;
            let missing = space.keep_only(live).map_err(|error| internal(&error))?;
            if let Some(first) = missing.runs().first() {
                return Err(Failure::new(
                    ErrorCode::LedgerIncomplete,
                    format!(
                        "space {id} lacks {} live pages, the first at {:#x}",
                        missing.len().0,
                        first.address()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Compares the digests of the source with those of the store: all of it is in memory, so this
    /// takes a few nanoseconds for each page.
    fn verify(&self) -> Result<(), Failure> {
        let began = Instant::now();
        let sets = self.lock();
        let differ = |text| Failure::new(ErrorCode::VerifyMismatch, text);
        let mut compared: BTreeMap<SpaceId, Vec<&PageSet>> = BTreeMap::new();
        for (id, pages, theirs) in &sets.digests {
            let space = self.receiver.store().space(*id);
            let space = space.map_err(|error| internal(&error))?;
            if let Some(page) = space.first_difference(pages, theirs) {
                let text = format!("space {id}: the page at {:#x} differs", page.address());
                return Err(differ(text));
            }
            compared.entry(*id).or_default().push(pages);
        }
        let mut pages = PageCount::ZERO;
        for (id, live) in &sets.live {
            let sets = compared.remove(id).unwrap_or_default();
            let count = sets.iter().map(|pages| pages.len()).sum::<PageCount>();
            let runs = sets.iter().flat_map(|pages| pages.runs());
            if count != live.len() || PageSet::from_runs(runs.copied()) != *live {
                let live = live.len();
                return Err(differ(format!(
                    "space {id}: {count} digests of {live} live pages"
                )));
            }
            pages.0 += count.0;
            self.weigh(*id)?;
        }
        if let Some(id) = compared.keys().next() {
            return Err(differ(format!("space {id}: digests, but no live pages")));
        }
        let took = began.elapsed();
        tracing::info!(%pages, ?took, "every live page is the same on both sides");
        Ok(())
    }

    /// Checks that the file of a space still has as many pages as were written to it: digests are
    /// not made again, so that a page that was lost since would not be missed.
    fn weigh(&self, id: SpaceId) -> Result<(), Failure> {
        let space = self.receiver.store().space(id);
        let space = space.map_err(|error| internal(&error))?;
        let (written, _) = space.held_pages();
        let bytes = space.resident_bytes().map_err(|error| internal(&error))?;
        if written.bytes() <= bytes {
            return Ok(());
        }
        let text = format!("space {id}: {written} pages take {bytes} bytes of the store");
        Err(Failure::new(ErrorCode::VerifyMismatch, text))
    }
}

/// All that is left of a stream.
async fn whole(reader: &mut StreamReader) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = reader.read_to_end(&mut bytes).await;
    read.map(|()| bytes).map_err(|error| lost(&error))
}

/// Space, page set, and what follows them in a sealed body.
fn set(bytes: &[u8]) -> Result<(SpaceId, PageSet, &[u8]), Failure> {
    let body = unseal(bytes).map_err(|error| corrupt(&error))?;
    let (header, rest) = SetHeader::decode(body).map_err(|error| corrupt(&error))?;
    let length = header.length as usize;
    let (set, rest) = rest
        .split_at_checked(length)
        .ok_or_else(|| malformed("page set"))?;
    let set = PageSet::from_wire(set).map_err(|error| corrupt(&error))?;
    Ok((header.space, set, rest))
}

/// Writes the image files of a stream as they come; how many there were.
async fn take_images(
    folder: &Path,
    store: &Store,
    reader: &mut StreamReader,
) -> Result<u32, Failure> {
    let mut files = 0;
    while !reader.is_over().await.map_err(|error| lost(&error))? {
        take_image(folder, store, reader).await?;
        files += 1;
    }
    Ok(files)
}

/// Writes one image file. Its checksum covers the header too. Images are on a tmpfs, so they are
/// memory like the store's.
async fn take_image(
    folder: &Path,
    store: &Store,
    reader: &mut StreamReader,
) -> Result<(), Failure> {
    let mut head = vec![0; 1];
    reader
        .read_exact(&mut head)
        .await
        .map_err(|error| lost(&error))?;
    head.resize(1 + usize::from(head[0]) + 8, 0);
    reader
        .read_exact(&mut head[1..])
        .await
        .map_err(|error| lost(&error))?;
    let (header, _) = ImageFileHeader::decode(&head).map_err(|error| corrupt(&error))?;
    store
        .take_besides(header.length())
        .map_err(|error| Failure::new(error.code(), chain(&error)))?;
    let path = folder.join(header.name().as_str());
    let failed = |error: std::io::Error| image_failed(&path, &error);
    let mut file = File::create(&path).map_err(failed)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    let mut left = header.length();
    while 0 < left {
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        let content = reader.chunk_of(most).await.map_err(|error| lost(&error))?;
        let content = content.ok_or_else(|| malformed("image file"))?;
        hasher.update(&content);
        file.write_all(&content).map_err(failed)?;
        left -= content.len() as u64;
    }
    let mut checksum = [0; CHECKSUM_BYTES];
    reader
        .read_exact(&mut checksum)
        .await
        .map_err(|error| lost(&error))?;
    if checksum != hasher.finalize().to_le_bytes() {
        let name = header.name();
        return Err(Failure::new(
            ErrorCode::Checksum,
            format!("image {name} has a wrong checksum"),
        ));
    }
    Ok(())
}

fn image_failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        ErrorCode::Capacity,
        format!("cannot store image {}: {error}", path.display()),
    )
}

fn lost(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(ErrorCode::PeerLost, chain(error))
}

fn corrupt(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(ErrorCode::Checksum, chain(error))
}

fn malformed(what: &str) -> Failure {
    Failure::new(ErrorCode::Malformed, format!("a {what} has a wrong length"))
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
