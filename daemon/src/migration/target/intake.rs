//! What a target takes in: parcels into the store, images into a folder, live sets and digests into
//! memory, and the check that all of it is there.
//!
//! What has arrived of what, and whether that is all, says the ledger of `proto` alone.
//!
//! Invariants: nothing counts before its checksum fits; a parcel is admitted by the ledger before a
//! page of it is stored, and entered after; a stream that fails ends the intake with a named
//! failure, it is never skipped, unless it is of an attempt that the source has given up; each
//! attempt has a folder of images of its own for each member, so that no file of one gets among
//! those of another.

mod image;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use pageferry_pages::pool::Pool;
use pageferry_pages::recv::Receiver;
use pageferry_pages::store::Store;
use pageferry_proto::id::{Generation, MemberIndex, Round, SpaceId};
use pageferry_proto::migration::ledger::{Account, Arrival, Ledger, LedgerError};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Final, RoundEnd};
use pageferry_proto::wire::parcel::PARCEL_BYTES_MAX;
use pageferry_proto::wire::stream::{SetHeader, StreamKind, unseal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use super::feed::Feed;
use super::folders::Folders;
use super::parking::Parking;
use crate::migration::text::{chain, internal};
use crate::net::lanes::DataReceiver;
use crate::net::stream::{DataStream, StreamReader};

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
    folders: Folders,
    parking: Parking,
    /// What has not come when the workload runs.
    feed: Feed,
    /// Has a folder for each member's images of the attempt that is collected.
    images: PathBuf,
    /// How many members come.
    members: AtomicUsize,
    /// One for each stream that is read.
    places: Arc<Semaphore>,
    /// One for each place, so that whoever has a place need not wait.
    parcels: Pool,
    books: Mutex<Books>,
    /// Told after each entry in the ledger.
    entered: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Books {
    ledger: Ledger,
    attempt: Attempt,
    /// Bytes of image files that are counted as memory, by attempt.
    images: BTreeMap<Generation, Vec<u64>>,
}

/// What is kept of the attempt that the ledger collects, besides what the ledger knows.
#[derive(Debug)]
struct Attempt {
    generation: Generation,
    digests: Vec<(SpaceId, PageSet, Vec<u64>)>,
    image_bytes: u64,
}

impl Default for Attempt {
    fn default() -> Self {
        Self::new(Generation::FIRST)
    }
}

impl Attempt {
    const fn new(generation: Generation) -> Self {
        Self {
            generation,
            digests: Vec::new(),
            image_bytes: 0,
        }
    }
}

impl Books {
    /// Drops what an older attempt than the ledger's has left; answers with its generation.
    fn turn(&mut self) -> Option<Generation> {
        let generation = self.ledger.generation();
        let old = std::mem::replace(&mut self.attempt.generation, generation);
        if old == generation {
            return None;
        }
        self.attempt = Attempt::new(generation);
        Some(old)
    }
}

impl Intake {
    /// An intake into `store`, with images going to the folder `images`, which is emptied.
    pub fn new(
        store: Arc<Store>,
        images: PathBuf,
        folders: Folders,
        threads: usize,
    ) -> Result<Self, Failure> {
        drop(fs::remove_dir_all(&images));
        fs::create_dir_all(&images).map_err(|error| image_failed(&images, &error))?;
        let parking = Parking::default();
        Ok(Self::over(store, images, (folders, parking), threads))
    }

    /// An intake that nothing will come to: that of a workload which is already restored.
    pub fn detached(store: Arc<Store>, folders: Folders) -> Self {
        let parking = Parking::closed();
        Self::over(store, PathBuf::new(), (folders, parking), 1)
    }

    fn over(
        store: Arc<Store>,
        images: PathBuf,
        (folders, parking): (Folders, Parking),
        threads: usize,
    ) -> Self {
        let shared = Shared {
            receiver: Receiver::new(store, threads),
            folders,
            parking,
            feed: Feed::default(),
            images,
            members: AtomicUsize::new(1),
            places: Arc::new(Semaphore::new(STREAMS_MAX)),
            parcels: Pool::new(STREAMS_MAX, PARCEL_BYTES_MAX),
            books: Mutex::default(),
            entered: watch::Sender::default(),
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

    /// Waits until a round that has ended is in the store.
    pub async fn round(&self, end: RoundEnd) -> Result<(), Failure> {
        self.shared.enter(|ledger| ledger.round_end(end))?;
        self.held().await
    }

    /// Waits until everything of the final round is here, and checks it against the live sets.
    pub async fn complete(&self, last: Final) -> Result<(), Failure> {
        self.shared.enter(|ledger| ledger.final_end(last))?;
        self.held().await?;
        let shared = Arc::clone(&self.shared);
        let checked = tokio::task::spawn_blocking(move || {
            shared.settle()?;
            if last.verify { shared.verify() } else { Ok(()) }
        });
        checked.await.map_err(|error| internal(&error))?
    }

    /// Waits until the round that has ended is held.
    async fn held(&self) -> Result<(), Failure> {
        let mut entered = self.shared.entered.subscribe();
        loop {
            let held = self.shared.lock().ledger.round_held();
            if held.map_err(|error| refused(&error))?.is_some() {
                return Ok(());
            }
            let changed = entered.changed().await;
            changed.map_err(|error| internal(&error))?;
        }
    }

    /// Folders that come with the workload.
    pub fn folders(&self) -> &Folders {
        &self.shared.folders
    }

    /// What has not come when the workload runs.
    pub fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// What came for the workload while it stood still.
    pub fn parking(&self) -> &Parking {
        &self.shared.parking
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.shared.receiver.store()
    }

    /// So many members come. Before anything does.
    pub fn expect(&self, members: usize) {
        self.shared.members.store(members, Ordering::Relaxed);
    }

    /// The folder with a member's images of the attempt that is collected.
    pub fn images(&self, member: MemberIndex) -> PathBuf {
        let generation = self.shared.lock().ledger.generation();
        self.shared.images_of(generation, member)
    }

    /// Those of all members.
    pub fn all_images(&self) -> Vec<PathBuf> {
        let members = self.shared.members();
        members.map(|member| self.images(member)).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> impl Iterator<Item = MemberIndex> {
        MemberIndex::all(self.members.load(Ordering::Relaxed))
    }

    fn check_member(&self, number: usize) -> Result<(), Failure> {
        if number < self.members.load(Ordering::Relaxed) {
            return Ok(());
        }
        let text = format!("something comes of a member {number}, and there is none");
        Err(Failure::new(ErrorCode::Malformed, text))
    }

    fn images_of(&self, generation: Generation, member: MemberIndex) -> PathBuf {
        self.images.join(match member.number() {
            0 => generation.to_string(),
            number => format!("{generation}.{number}"),
        })
    }

    /// Enters something into the ledger.
    fn enter<T>(
        &self,
        entry: impl FnOnce(&mut Ledger) -> Result<T, LedgerError>,
    ) -> Result<T, Failure> {
        self.enter_and(entry, |_, _| ())
    }

    /// Enters something into the ledger, and keeps what belongs to it.
    fn enter_and<T>(
        &self,
        entry: impl FnOnce(&mut Ledger) -> Result<T, LedgerError>,
        keep: impl FnOnce(&mut Attempt, &T),
    ) -> Result<T, Failure> {
        let (entered, old) = {
            let mut books = self.lock();
            let entered = entry(&mut books.ledger);
            let old = books.turn();
            if let Ok(entered) = &entered {
                keep(&mut books.attempt, entered);
            }
            (entered, old)
        };
        if let Some(old) = old {
            tracing::info!(generation = %old, "the source has given up its freeze");
            self.remove_images(old);
        }
        self.entered.send_replace(());
        entered.map_err(|error| refused(&error))
    }

    /// Removes the images of an attempt that was given up. One that is being written at this moment
    /// may stay or come again: its writer removes it.
    fn remove_images(&self, generation: Generation) {
        for member in self.members() {
            let folder = self.images_of(generation, member);
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let folder = folder.display();
                    tracing::debug!(%folder, %error, "images of a given up attempt stay for now");
                }
                Ok(()) | Err(_) => {}
            }
        }
        let counted = self.lock().images.remove(&generation);
        for bytes in counted.into_iter().flatten() {
            self.receiver.store().give_back_besides(bytes);
        }
    }

    async fn take(self: &Arc<Self>, stream: DataStream) -> Result<(), Failure> {
        let kind = stream.kind;
        let mut reader = stream.reader;
        match kind {
            StreamKind::ImageFile => self.take_images(&mut reader).await,
            StreamKind::Parcel => {
                let mut parcel = self.parcels.take();
                let read = reader.read_to_end(&mut parcel).await;
                read.map_err(|error| lost(&error))?;
                self.take_parcel(Bytes::from_owner(parcel)).await
            }
            StreamKind::Fetched => {
                let mut parcel = self.parcels.take();
                let read = reader.read_to_end(&mut parcel).await;
                read.map_err(|error| lost(&error))?;
                self.take_fetched(Bytes::from_owner(parcel)).await
            }
            StreamKind::LiveSet => self.take_live(&whole(&mut reader).await?),
            StreamKind::AbsentSet => self.take_absent(&whole(&mut reader).await?),
            StreamKind::Digests => self.take_digests(&whole(&mut reader).await?),
            StreamKind::Parked => self.parking.take(&whole(&mut reader).await?),
            StreamKind::Files => {
                let header = Folders::header(&mut reader).await?;
                self.enter(|ledger| ledger.admit_files(header.round))?;
                self.folders.take(header, &mut reader).await?;
                self.enter(|ledger| ledger.files(header.round))
            }
        }
    }

    async fn take_parcel(self: &Arc<Self>, parcel: Bytes) -> Result<(), Failure> {
        let shared = Arc::clone(self);
        let admit = move |round: Round| shared.lock().ledger.admit(round);
        let received = self.receiver.receive(parcel, admit).await;
        let received = received.map_err(|error| Failure::new(error.code(), chain(&error)))?;
        let (space, pages) = (received.space, received.pages);
        self.enter(|ledger| ledger.parcel(received.admitted, space, pages))
    }

    /// Takes in pages that were asked for while the workload runs, or is restored.
    async fn take_fetched(&self, parcel: Bytes) -> Result<(), Failure> {
        // What was asked for twice may come when the workload has all.
        if !self.feed.is_needed() {
            return Ok(());
        }
        let feed = self.feed.clone();
        let is_missing = move |space, pages: &PageSet| feed.is_missing(space, pages);
        let fetched = self.receiver.fetch(parcel, is_missing).await;
        let (space, pages) = fetched.map_err(|error| Failure::new(error.code(), chain(&error)))?;
        self.feed.arrived(space, &pages).await
    }

    fn take_absent(&self, bytes: &[u8]) -> Result<(), Failure> {
        let (header, absent, rest) = set(bytes)?;
        if !rest.is_empty() {
            return Err(malformed("set of absent pages"));
        }
        self.check_member(header.space.member())?;
        self.enter(|ledger| ledger.absent_set(header.generation, header.space, absent))
            .map(drop)
    }

    fn take_live(&self, bytes: &[u8]) -> Result<(), Failure> {
        let (header, live, rest) = set(bytes)?;
        if !rest.is_empty() {
            return Err(malformed("live set"));
        }
        self.check_member(header.space.member())?;
        // The store has a limit for them.
        let space = self.receiver.store().space(header.space);
        space.map_err(|error| Failure::new(error.code(), chain(&error)))?;
        self.enter(|ledger| ledger.live_set(header.generation, header.space, live))
            .map(drop)
    }

    fn take_digests(&self, bytes: &[u8]) -> Result<(), Failure> {
        let (header, pages, rest) = set(bytes)?;
        let (digests, odd) = rest.as_chunks::<8>();
        if !odd.is_empty() || digests.len() as u64 != pages.len().0 {
            return Err(malformed("digests"));
        }
        let digests = digests.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let (space, digests) = (header.space, digests.collect());
        self.enter_and(
            |ledger| ledger.digests(header.generation, space, pages.clone()),
            |attempt, arrival| {
                if *arrival == Arrival::Kept {
                    attempt.digests.push((space, pages.clone(), digests));
                }
            },
        )
        .map(drop)
    }

    /// Checks that what is live is held, and gives up what is not live.
    fn settle(&self) -> Result<(), Failure> {
        let store = self.receiver.store();
        let held = store.held();
        let (accounts, image_bytes) = {
            let books = self.lock();
            let accounts = books.ledger.settle(&held);
            (
                accounts.map_err(|error| refused(&error))?,
                books.attempt.image_bytes,
            )
        };
        for account in &accounts {
            if !account.surplus.is_empty() {
                let space = store.space(account.space);
                let space = space.map_err(|error| internal(&error))?;
                let punched = space.punch(&account.surplus);
                punched.map_err(|error| internal(&error))?;
            }
        }
        let absent = accounts.iter().filter(|account| !account.absent.is_empty());
        let absent = absent.map(|account| (account.space, account.absent.clone()));
        let absent: BTreeMap<SpaceId, PageSet> = absent.collect();
        // Also if nothing is: an attempt that was given up may have lacked some.
        let generation = self.lock().ledger.generation();
        self.feed.begin(Some(generation), absent);
        let sum = |count: fn(&Account) -> PageCount| accounts.iter().map(count).sum::<PageCount>();
        tracing::info!(
            spaces = accounts.len(),
            live = %sum(|account| account.live),
            as_data = %sum(|account| account.data),
            as_zero = %sum(|account| account.zero),
            absent = %sum(|account| account.absent.len()),
            given_back = %sum(|account| account.surplus.len()),
            replaced = %sum(|account| account.replaced),
            received = %sum(|account| account.received),
            image_bytes,
            "every live page is held, or absent"
        );
        Ok(())
    }

    /// Compares the digests of the source with those of the store: all of it is in memory, so this
    /// takes a few nanoseconds for each page. That there is one of each live page the ledger has
    /// said.
    fn verify(&self) -> Result<(), Failure> {
        let began = Instant::now();
        let books = self.lock();
        let mut compared = PageCount::ZERO;
        for (id, pages, theirs) in &books.attempt.digests {
            let space = self.receiver.store().space(*id);
            let space = space.map_err(|error| internal(&error))?;
            if let Some(page) = space.first_difference(pages, theirs) {
                let text = format!("space {id}: the page at {:#x} differs", page.address());
                return Err(Failure::new(ErrorCode::VerifyMismatch, text));
            }
            compared.0 += pages.len().0;
        }
        for id in books.ledger.live().keys() {
            self.weigh(*id)?;
        }
        let took = began.elapsed();
        tracing::info!(pages = %compared, ?took, "every live page is the same on both sides");
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

/// Header, page set, and what follows them in a sealed body.
fn set(bytes: &[u8]) -> Result<(SetHeader, PageSet, &[u8]), Failure> {
    let body = unseal(bytes).map_err(|error| corrupt(&error))?;
    let (header, rest) = SetHeader::decode(body).map_err(|error| corrupt(&error))?;
    let length = header.length as usize;
    let (set, rest) = rest
        .split_at_checked(length)
        .ok_or_else(|| malformed("page set"))?;
    let set = PageSet::from_wire(set).map_err(|error| corrupt(&error))?;
    Ok((header, set, rest))
}

fn refused(error: &LedgerError) -> Failure {
    Failure::new(error.code(), error.to_string())
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
