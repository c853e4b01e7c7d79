//! Who may come with how much memory.
//!
//! A workload is let in with what it may need at its peak, if that is left at this node beside what
//! others have been promised and have not taken yet. The promise lasts until the workload has all
//! its memory, or is gone; then what it uses is seen by the kernel's own figures. What it grows by
//! while it is copied is asked for again, in steps.
//!
//! Memory files are in nobody's resident memory, so a node that is short of memory would find
//! nothing to kill for them: what is not left must not be promised.
//!
//! Absent: reading what is left ([`crate::runtime::memory`]).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::needs::Needs;

use crate::migration::text::mebibytes;
use crate::runtime::memory::Room;

/// What a migration takes however small its workload is: daemon, buffers of parcels, pager, CRIU,
/// images. The peak of a target's memory was 1097 MiB for a workload of 1 GiB and 4175 MiB for one
/// of 4 GiB: a line of 71 MiB and 1 + 1/512 of the workload.
const FIXED_BYTES: u64 = 71 << 20; // 71 MiB

/// The part of it that images may take: those of a small workload are some hundred KiB, and the
/// store counts them with the pages. What CRIU copies of memory is in what the workload needs.
const IMAGES_BYTES: u64 = 32 << 20; // 32 MiB

/// The 1/512 of it: an entry of 8 bytes in a page table for each page of 4096.
const TABLES_PART: u64 = 512;

/// With `--verify`, digests of 8 bytes for each page at this node, and as many from the source.
const DIGESTS_PART: u64 = 256;

/// By how much a promise grows when a workload has grown beyond it.
const STEP_BYTES: u64 = 64 << 20; // 64 MiB

/// What a workload needs at its peak, in bytes: what it has for itself once, since a page that is
/// filled is given up in the store; shared memory twice, since CRIU copies it out of images.
pub fn peak(needs: &Needs, verify: bool) -> u64 {
    let private = needs.private_bytes;
    let digests = if verify { private / DIGESTS_PART } else { 0 };
    [
        private,
        private / TABLES_PART,
        digests,
        needs.shared_bytes,
        needs.shared_bytes,
        FIXED_BYTES,
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

/// Fails if less than `needed` is left in one of `rooms`, beside `promised`, all in bytes.
pub fn admit(needed: u64, rooms: &[Room], promised: u64) -> Result<(), Failure> {
    let Some(tightest) = rooms.iter().min_by_key(|room| room.bytes) else {
        return Ok(());
    };
    if needed <= tightest.bytes.saturating_sub(promised) {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::MemoryShort,
        format!(
            "the workload may need {} of memory at the target, and {} are available: {} of {}, of \
             which {} are promised to other migrations",
            mebibytes(needed),
            mebibytes(tightest.bytes.saturating_sub(promised)),
            mebibytes(tightest.bytes),
            tightest.limit,
            mebibytes(promised)
        ),
    ))
}

/// What a promise still stands for, when so much has been taken: the kernel's figures count that.
const fn outstanding(promised: u64, taken: u64) -> u64 {
    promised.saturating_sub(taken)
}

/// What all incoming migrations of this node have been promised. Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Shared>);

struct Shared {
    rooms: Box<dyn Fn() -> io::Result<Vec<Room>> + Send + Sync>,
    accounts: Mutex<Accounts>,
}

#[derive(Default)]
struct Accounts {
    next: u64,
    promised: BTreeMap<u64, Account>,
}

struct Account {
    /// In bytes.
    promised: u64,
    /// Pages that have been taken of it.
    taken: Arc<AtomicU64>,
}

/// A promise of memory, as long as it lives.
pub struct Promise {
    ledger: Ledger,
    number: u64,
    /// Pages that the store may hold.
    pages: AtomicU64,
}

impl Ledger {
    /// A ledger of which nothing is promised; `rooms` says what is left at the node.
    pub fn new(rooms: impl Fn() -> io::Result<Vec<Room>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared {
            rooms: Box::new(rooms),
            accounts: Mutex::default(),
        }))
    }

    /// Promises what a workload needs, if that is left. `taken` counts the pages that are taken of
    /// it.
    pub fn promise(
        &self,
        needs: &Needs,
        verify: bool,
        taken: Arc<AtomicU64>,
    ) -> Result<Promise, Failure> {
        let promised = peak(needs, verify);
        let mut accounts = self.lock();
        self.admit(&accounts, promised, None)?;
        let number = accounts.next;
        accounts.next += 1;
        accounts
            .promised
            .insert(number, Account { promised, taken });
        let bytes = [needs.private_bytes, needs.shared_bytes, IMAGES_BYTES];
        let bytes = bytes.into_iter().fold(0, u64::saturating_add);
        Ok(Promise {
            ledger: self.clone(),
            number,
            pages: AtomicU64::new(PageCount::covering(bytes).0),
        })
    }

    /// Under the lock of the accounts, so that two who come at once do not both get the last of it.
    /// `grows` is the one that asks for more, if it has a promise: what that holds besides pages is
    /// in use by the time it grows, and is not kept free from itself.
    fn admit(&self, accounts: &Accounts, needed: u64, grows: Option<u64>) -> Result<(), Failure> {
        let rooms = (self.0.rooms)().map_err(|error| {
            Failure::new(
                ErrorCode::NodeUnfit,
                format!("what memory is left cannot be read: {error}"),
            )
        })?;
        let promised = accounts.promised.iter().map(|(number, account)| {
            let taken = PageCount(account.taken.load(Ordering::Relaxed)).bytes();
            let outstanding = outstanding(account.promised, taken);
            let own = if Some(*number) == grows {
                FIXED_BYTES
            } else {
                0
            };
            outstanding.saturating_sub(own)
        });
        admit(needed, &rooms, promised.fold(0, u64::saturating_add))
    }

    /// What has been promised, and what of it is taken, in bytes.
    pub fn totals(&self) -> (u64, u64) {
        let accounts = self.lock();
        let totals = accounts.promised.values().map(|account| {
            let taken = PageCount(account.taken.load(Ordering::Relaxed)).bytes();
            (account.promised, taken)
        });
        totals.fold((0, 0), |(promised, taken), (more, of)| {
            (promised.saturating_add(more), taken.saturating_add(of))
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Accounts> {
        let accounts = self.0.accounts.lock();
        accounts.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promise {
    /// Pages that may be taken.
    pub fn pages(&self) -> PageCount {
        PageCount(self.pages.load(Ordering::Relaxed))
    }

    /// Promises more, so that `held` pages may be taken and some besides; how many then may.
    pub fn grow(&self, held: PageCount) -> Result<PageCount, Failure> {
        let mut accounts = self.ledger.lock();
        // Somebody else may have asked for the same just before.
        let pages = self.pages();
        if held <= pages {
            return Ok(pages);
        }
        let step = PageCount(held.0 - pages.0).bytes() + STEP_BYTES;
        let more = step + step / TABLES_PART;
        // What was taken beyond the promise is used already.
        self.ledger.admit(&accounts, more, Some(self.number))?;
        if let Some(account) = accounts.promised.get_mut(&self.number) {
            account.promised = account.promised.saturating_add(more);
        }
        let pages = pages.0 + PageCount::covering(step).0;
        self.pages.store(pages, Ordering::Relaxed);
        Ok(PageCount(pages))
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.ledger.lock().promised.remove(&self.number);
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let promised = self.lock().promised.len();
        f.debug_struct("Ledger")
            .field("promised", &promised)
            .finish()
    }
}

impl fmt::Debug for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Promise").field(&self.pages()).finish()
    }
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
