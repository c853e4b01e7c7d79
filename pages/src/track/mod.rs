//! Tracking writes of a running process from outside.
//!
//! A [`Space`] is one address space under asynchronous write protection: the kernel notes the first
//! write to every page after a scan, without stopping anybody and without telling us. A round is
//! *scan and protect, then read*: a write that comes during the read is found by the next scan.
//!
//! ```text
//!   attach ──► scan ──► scan ──► … ──► (frozen) final_scan ──► shown_smaps
//!     │         dirty    dirty          dirty, live, hidden, smaps
//!     └ borrow a userfaultfd (`pageferry_inject`), register every private mapping of no file
//! ```
//!
//! Invariants:
//! - A page that was written after it was last returned as dirty is returned again, or the space is
//!   void ([`TrackError::Exec`], [`TrackError::Gone`]). What a failed scan protected without
//!   returning, and what the caller could not read ([`Space::put_back`]), is owed until then.
//! - `registered` holds only pages whose protection is in order. A mapping that is not in it is
//!   registered and counts as dirty altogether. A mapping that is in it but was replaced by another
//!   is found out by the scan (`EPERM`), wherever it begins.
//! - Empty ranges are never protected: the kernel would put markers there that look like swapped
//!   pages to everybody, CRIU included.
//!
//! Which memory is followed: every private mapping without a file, whatever its protection now,
//! since protections change (RELRO, W^X, heaps that are PROT_NONE for a while) and the kernel keeps
//! the tracking over that. Executable ones are registered but not scanned: their writes wait. What
//! is
//! *lazy*, that is hidden from CRIU and filled by us at the target, is decided at the end.
//!
//! Absent: shared memory, huge pages, devices (see [`refuse`]); who is in the workload ([`tree`]
//! tells, the caller decides); reading pages.

mod eager;
mod error;
pub mod frozen;
pub mod maps;
mod probe;
pub mod refuse;
mod scan;
pub mod tree;
mod walk;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use criu_glue::view::flags::{Area, FlagNames};
use criu_glue::view::smaps::{self, Recorded};
pub use pageferry_inject::InjectError;
use pageferry_inject::userfaultfd::{self, Injected};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_sys::{pagemap, ptrace, task, track};

pub use eager::{Eager, SharedMemory, shared_bytes};
pub use error::TrackError;
use maps::{Flags, Mapping};
use probe::areas::Areas;
use probe::calls::Calls;
use probe::files::Files;
use probe::threads::Threads;
pub use scan::Scanning;

use crate::read::Reader;

/// That this kernel can track, and how.
#[derive(Clone, Debug)]
pub struct Support {
    /// Guard regions are told apart from memory; else there are none.
    guard: bool,
    /// Tells flags of mappings without a walk of page tables.
    flags: Option<Arc<Areas>>,
    /// Tells open files without a call for each.
    files: Option<Arc<Files>>,
    /// Tells which threads are traced, likewise.
    threads: Option<Arc<Threads>>,
    /// Tells which calls they are in, likewise.
    calls: Option<Arc<Calls>>,
}

/// How a space is attached.
#[derive(Clone, Debug)]
pub struct TrackOptions {
    /// What this kernel can do.
    pub support: Support,
    /// All processes of the workload; those that share the descriptors of the one attached are
    /// stopped with it.
    pub tree: Vec<i32>,
    /// Longest time the threads stand still in one attempt; [`STOP_MAX`].
    pub stop_max: Duration,
    /// How many attempts are made; [`ATTEMPTS`].
    pub attempts: u32,
}

/// Longest time a workload stands still while it is attached. A stop of 200 threads takes less than
/// half of it.
pub const STOP_MAX: Duration = Duration::from_millis(20);

/// How often attaching is tried. What fails for a passing reason (a thread in an uninterruptible
/// call, a storm of new threads) seldom fails three times.
pub const ATTEMPTS: u32 = 3;

/// Most memory, in bytes, that may come into being between the last round and the freeze: it is
/// read and sent while the workload stands still.
pub const LATE_BIRTH_BYTES_MAX: u64 = 16 << 20;

/// One address space, tracked. Dropping it takes all protection off: 26 ms per GiB in all, but page
/// faults of the process are held up for no more than [`DETACH_BYTES`] of it at a time.
#[derive(Debug)]
pub struct Space {
    pid: i32,
    start_time: u64,
    tracker: track::WriteTracker,
    support: Support,
    /// Pages under protection or known as written; see the module's invariants.
    registered: PageSet,
    /// Dirty whatever a scan says: taken by a scan that failed, or not read by the caller.
    owed: PageSet,
    recorded: Option<Record>,
    /// What records taught about the flags that the kernel holds.
    names: Arc<FlagNames>,
    /// The text `final_scan` returned.
    shown: Option<Arc<[u8]>>,
    reader: Arc<Reader>,
    attached: Attached,
}

/// A true smaps of the running process.
#[derive(Debug)]
struct Record {
    smaps: Recorded,
    /// Mappings with flags that make a difference, for the forecast of what is eager.
    special: Vec<(Mapping, Flags)>,
    /// What `maps` said just after.
    maps: Vec<u8>,
    /// The mappings it is of; none if they changed while it was taken, or are not all understood.
    areas: Option<Vec<Area>>,
}

/// What attaching cost the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// How long its threads stood still.
    pub stopped: Duration,
    /// How many threads.
    pub threads: usize,
}

/// What one round has to send.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Live pages that were written since they were last returned, or never returned.
    pub dirty: PageSet,
    /// How many pages of the tracked mappings are live.
    pub live_pages: PageCount,
    /// What CRIU would copy if the freeze were now.
    pub eager: Eager,
    /// How long it took.
    pub duration: Duration,
}

/// What the frozen process has.
#[derive(Clone, Debug)]
pub struct FinalScan {
    /// Live pages that were written since they were last returned, or never returned. They stay
    /// dirty: if the freeze is given up, the next scan returns them again.
    pub dirty: PageSet,
    /// All pages the target must hold, and no others.
    pub live: PageSet,
    /// Ranges of bytes CRIU must be shown without pages: the lazy mappings.
    pub hidden: Vec<(u64, u64)>,
    /// All guard regions within `hidden`, in bytes.
    pub guards: Vec<(u64, u64)>,
    /// The smaps CRIU is to be shown: rendered from the record, or the true one if it cannot be.
    pub smaps: Vec<u8>,
    /// Whether `smaps` is rendered and must be compared before anybody relies on it.
    pub smaps_rendered: bool,
    /// What CRIU copies by itself.
    pub eager: Eager,
    /// How long it took.
    pub duration: Duration,
}

impl Support {
    /// Asks the kernel. The features are tried, never guessed from a version.
    pub fn probe() -> Result<Self, TrackError> {
        let probing = |what| move |source| TrackError::Probe { what, source };
        let scan = pagemap::probe().map_err(probing("page map scans"))?;
        if !scan.scan {
            return Err(TrackError::Unsupported("PAGEMAP_SCAN"));
        }
        let asynchronous = track::probe().map_err(probing("userfaultfd"))?;
        if !asynchronous {
            return Err(TrackError::Unsupported(
                "asynchronous userfaultfd write protection",
            ));
        }
        let regions = pagemap::guard_regions().map_err(probing("guard regions"))?;
        if regions && !scan.guard {
            return Err(TrackError::Unsupported(
                "a page category for its guard regions",
            ));
        }
        let without = |what: &'static str| {
            move |error: &io::Error| {
                tracing::info!("{what} in every freeze: {error}");
            }
        };
        let types = probe::kernel_types();
        let types = types
            .inspect_err(without("smaps and all descriptors are read"))
            .ok();
        let types = types.as_ref();
        let flags = types.map(|types| {
            Areas::load(types).inspect_err(without("smaps is read, for 11 ms per GiB,"))
        });
        let files = types.map(|types| {
            let cost = "every descriptor is read, for 5 us,";
            Files::load(types).inspect_err(without(cost))
        });
        let threads = types.map(|types| {
            let cost = "the status of every thread is read, for 10 us,";
            Threads::load(types).inspect_err(without(cost))
        });
        let calls = types.map(|types| {
            let cost = "the call of every thread is read, for 5 us,";
            Calls::load(types).inspect_err(without(cost))
        });
        Ok(Self {
            guard: scan.guard,
            flags: flags.and_then(Result::ok).map(Arc::new),
            files: files.and_then(Result::ok).map(Arc::new),
            threads: threads.and_then(Result::ok).map(Arc::new),
            calls: calls.and_then(Result::ok).map(Arc::new),
        })
    }

    /// Whether the kernel changes semaphores when process `pid` ends (`SEM_UNDO`). None: it does
    /// not tell. Some microseconds.
    pub fn undoes(&self, pid: i32) -> Option<bool> {
        self.threads.as_ref()?.of(pid).ok()?.undo
    }
}

impl Space {
    /// Attaches to process `pid`: borrows a userfaultfd from it and registers its memory. Blocks
    /// for some milliseconds; the workload stands still for at most `options.stop_max` of them.
    pub fn attach(pid: i32, options: &TrackOptions) -> Result<Self, TrackError> {
        let inspecting = |what| move |source| TrackError::Inspect { pid, what, source };
        let start_time = task::start_time(pid).map_err(inspecting("stat"))?;
        let pidfd = ptrace::pidfd_open(pid).map_err(inspecting("the process"))?;
        let injected = inject(pid, options)?;
        let tracker = track::WriteTracker::negotiate(injected.userfaultfd).map_err(|source| {
            let what = "userfaultfd features";
            TrackError::Probe { what, source }
        })?;
        let mut space = Self {
            pid,
            start_time,
            tracker,
            support: options.support.clone(),
            registered: PageSet::new(),
            owed: PageSet::new(),
            recorded: None,
            names: Arc::default(),
            shown: None,
            reader: Arc::new(Reader::open(pid, pidfd).map_err(inspecting("mem"))?),
            attached: Attached {
                stopped: injected.stopped,
                threads: injected.threads,
            },
        };
        let maps = space.read_maps()?;
        space.adopt(&maps)?;
        Ok(space)
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What attaching cost the workload.
    pub fn attached(&self) -> Attached {
        self.attached
    }

    /// For reading the pages a scan returned; may be used while the space is scanned.
    pub fn reader(&self) -> Arc<Reader> {
        Arc::clone(&self.reader)
    }

    /// Pages that were returned as dirty, but did not reach the target: they are dirty still.
    pub fn put_back(&mut self, pages: &PageSet) {
        self.owed.union_with(pages);
    }

    /// Records the true smaps, from which the one of the freeze is rendered. 11 ms per GiB of the
    /// running process, unless the last record is known to be true still; to be done in every
    /// round.
    ///
    /// The kernel renders it in pieces, so a process that unmaps meanwhile may get a text that is
    /// none: then nothing is recorded, and without a better one later CRIU gets the true one.
    pub fn record_smaps(&mut self) -> Result<(), TrackError> {
        let pid = self.pid;
        let inspecting = |what| move |source| TrackError::Inspect { pid, what, source };
        let before = self.areas();
        if let Some(last) = &self.recorded
            && before.is_some()
            && last.areas == before
            && maps::read_text(pid).map_err(inspecting("maps"))? == last.maps
        {
            return Ok(());
        }
        let text = maps::read_smaps_text(pid).map_err(inspecting("smaps"))?;
        let maps = maps::read_text(pid).map_err(inspecting("maps"))?;
        let after = self.areas();
        let names = Arc::make_mut(&mut self.names);
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        self.recorded = record(&text, maps, names, &before, &after);
        if self.recorded.is_none() {
            tracing::debug!(pid, "its smaps changed while it was read");
        }
        Ok(())
    }

    /// What the kernel holds, where it can be asked.
    fn areas(&self) -> Option<Vec<Area>> {
        let probe = self.support.flags.as_ref()?;
        let areas = probe.of(self.pid);
        areas
            .inspect_err(|error| tracing::debug!(pid = self.pid, %error, "no flags of mappings"))
            .ok()
    }

    /// The smaps the last `final_scan` returned, to be compared with the true one; none if that
    /// was the true one.
    pub fn shown_smaps(&self) -> Option<ShownSmaps> {
        let text = Arc::clone(self.shown.as_ref()?);
        let names = Arc::clone(&self.names);
        Some(ShownSmaps {
            pid: self.pid,
            text,
            flags: self.support.flags.clone().map(|probe| (probe, names)),
        })
    }

    /// Takes all protection off and forgets the process. Blocks, 26 ms per GiB; a process that is
    /// to run on should run already.
    pub fn detach(self) {
        drop(self);
    }
}

/// What CRIU was shown of a process instead of its smaps.
#[derive(Debug)]
pub struct ShownSmaps {
    pid: i32,
    text: Arc<[u8]>,
    /// The kernel's flags, and what is known of their meaning.
    flags: Option<(Arc<Areas>, Arc<FlagNames>)>,
}

impl ShownSmaps {
    /// Compares it with what the kernel holds. The process must still be frozen.
    ///
    /// Where that is not understood, with the true smaps: 11 ms per GiB, which the kernel takes to
    /// count pages that nobody asked for.
    pub fn compare(&self) -> Result<(), TrackError> {
        if self.is_confirmed() {
            return Ok(());
        }
        let pid = self.pid;
        let inspecting = |source| TrackError::Inspect {
            pid,
            what: "smaps",
            source,
        };
        let text = maps::read_smaps_text(pid).map_err(inspecting)?;
        smaps::compare(&text, &self.text).map_err(|source| TrackError::SmapsChanged { pid, source })
    }

    /// Whether the kernel's flags say the same. If not, they may only be unknown.
    fn is_confirmed(&self) -> bool {
        let Some((probe, names)) = &self.flags else {
            return false;
        };
        let areas = probe.of(self.pid);
        let confirmed = areas.is_ok_and(|areas| {
            let confirmed = names.confirm(&self.text, &areas);
            confirmed.is_ok_and(|confirmed| confirmed)
        });
        tracing::debug!(
            pid = self.pid,
            confirmed,
            "compared the flags of all mappings"
        );
        confirmed
    }
}

impl Drop for Space {
    /// Closing the descriptor would do it all, under one lock that stops every page fault of the
    /// process: 100 ms for 4 GiB. So it is done in pieces first.
    fn drop(&mut self) {
        let bytes = DETACH_BYTES.max(self.registered.len().bytes() / DETACH_PIECES_MAX);
        for part in self.registered.partition(PageCount::covering(bytes)) {
            for run in part.runs() {
                let (start, end) = (run.address(), run.address() + run.bytes());
                let unregistered = self.tracker.unregister(start, end);
                // Gone altogether; any other error is of a mapping that has changed meanwhile.
                if unregistered.is_err_and(|error| error.raw_os_error() == Some(libc::ESRCH)) {
                    return;
                }
            }
        }
    }
}

/// How much memory is let go of under one lock, in bytes: 1.6 ms.
const DETACH_BYTES: u64 = 64 << 20;

/// In how many pieces it is done at most: a reservation of terabytes holds little.
const DETACH_PIECES_MAX: u64 = 4096;

/// A record, if the text is one. The areas are those before and after it was read, none where they
/// are not known.
fn record(
    text: &[u8],
    maps: Vec<u8>,
    names: &mut FlagNames,
    before: &[Area],
    after: &[Area],
) -> Option<Record> {
    let mappings = maps::parse_smaps(text)?;
    let smaps = Recorded::parse(text).ok()?;
    let same = |area: &&Area| {
        let place = after.binary_search_by_key(&area.start, |after| after.start);
        place.is_ok_and(|place| after[place] == **area)
    };
    let lasting: Vec<Area> = before.iter().filter(same).copied().collect();
    names.learn(text, &lasting).ok()?;
    let special = |(_, flags): &(Mapping, Flags)| *flags != Flags::default();
    let told = before == after && names.confirm(text, before).is_ok_and(|told| told);
    Some(Record {
        smaps,
        special: mappings.into_iter().filter(special).collect(),
        maps,
        areas: told.then_some(lasting),
    })
}

fn inject(pid: i32, options: &TrackOptions) -> Result<Injected, TrackError> {
    let mut attempt = 1;
    loop {
        match userfaultfd::borrow(pid, &options.tree, options.stop_max) {
            Ok(injected) => return Ok(injected),
            Err(error) if error.is_transient() && attempt < options.attempts => {
                tracing::debug!(pid, attempt, error = %error, "cannot attach yet");
                std::thread::sleep(error::ATTEMPT_PAUSE);
                attempt += 1;
            }
            Err(source) => return Err(TrackError::Inject { pid, source }),
        }
    }
}

/// Whether the process behind a descriptor is still there.
fn is_alive(pidfd: &OwnedFd) -> bool {
    ptrace::is_alive(pidfd.as_fd())
}

#[cfg(test)]
pub(crate) mod tests;
