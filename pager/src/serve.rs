//! The threads that serve faults and fill memory.
//!
//! A family of spaces (one restored process and the children it forks meanwhile) belongs to one
//! thread: it alone reads their userfaultfds, copies into them, keeps the model and punches the
//! store. So there is no lock, and between reading an event and the next copy nothing can slip.
//! Families are spread over a few threads; two threads on one family would wait for each other at
//! every copy, since a copy decided before an event was read must not be made after.
//!
//! ```text
//!            ┌──────────────── one turn ────────────────┐
//!  commands ─► ready descriptors ─► events ─► faults ─► one chunk of fill ─► again
//!            (while faults come: small chunks, and only every FAULT_TURNS_MAX turns)
//! ```
//!
//! A member's descriptor is closed when nothing is missing in it any more. The last close
//! undoes every registration, also of mappings that moved, merged or grew since, wakes whoever
//! waits, and lets a child whose fork was not read yet go its way: all it inherited is there.
//! (`UFFDIO_UNREGISTER` would need to know the mappings, and refuses ranges with strangers in
//! them.)
//!
//! Pages that are absent ([`crate::absent`]) are waited for: which of them threads want is told to
//! whoever can bring them, and what has arrived is told to the thread that its space belongs to.
//! [`Homes`] knows which that is, also before a space is served.
//!
//! Not here: who may run when; that the fill may begin is told from outside.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pageferry_pages::store::MemoryFile;
use pageferry_proto::id::SpaceId;
use pageferry_proto::page::PageIndex;
use pageferry_proto::set::PageSet;
use pageferry_sys::priority;
use pageferry_sys::uffd::{EVENTS, Uffd};
use tokio::sync::oneshot;

use crate::latency::Latency;
use crate::worker::Worker;

/// Most serving threads. Two fill a third faster than one; beyond, memory is the limit.
pub const THREADS_MAX: usize = 4;

/// Counters over all spaces, for whoever asks.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages still missing.
    pub pending: AtomicU64,
    /// Pages that were missing and are not any more, by whatever cause.
    pub settled: AtomicU64,
    /// Faults served.
    pub faults: AtomicU64,
    /// Pages that had no mapping any more when their turn came, although no event had said so.
    pub unmapped: AtomicU64,
    /// Times an error was met.
    pub errors: AtomicU64,
    /// Pages that have not come yet.
    pub absent: AtomicU64,
    /// How long threads waited for pages that were absent.
    pub waited: Latency,
}

/// A page of a store that a thread waits for, and that is absent.
pub type Wanted = (SpaceId, PageIndex);

/// What is absent of a space, and its store.
#[derive(Debug)]
pub struct Missing {
    /// Which.
    pub space: SpaceId,
    /// Where the pages are to go.
    pub store: OwnedFd,
    /// The pages that are still needed.
    pub pages: PageSet,
}

/// Where the pages of each space are waited for.
#[derive(Debug, Default)]
pub struct Homes {
    inner: Mutex<Inner>,
    wanted: Option<tokio::sync::mpsc::UnboundedSender<Wanted>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// What is absent of spaces that are not served yet.
    planned: BTreeMap<SpaceId, PageSet>,
    served: BTreeMap<SpaceId, Caller>,
}

/// Speaks to a thread.
#[derive(Clone, Debug)]
struct Caller {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
}

/// A space as it is handed over to be served.
#[derive(Debug)]
pub struct Space {
    /// Which.
    pub id: SpaceId,
    /// The userfaultfd of its process.
    pub uffd: Uffd,
    /// The pages that are missing; all others are zero or there.
    pub pending: PageSet,
    /// Their contents.
    pub store: MemoryFile,
    /// Those of them whose contents have not come yet: known to [`Homes`] until it is served.
    pub(super) absent: PageSet,
}

impl Space {
    /// One whose pages are there, but for what [`Homes`] knows to be absent.
    pub fn new(id: SpaceId, uffd: Uffd, pending: PageSet, store: MemoryFile) -> Self {
        Self {
            id,
            uffd,
            pending,
            store,
            absent: PageSet::new(),
        }
    }
}

/// Why a space cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The kernel would not tell of everything that happens to the memory.
    #[error(
        "userfaultfd of space {} reports only {features:#x} of the events {EVENTS:#x}",
        space.0
    )]
    Events {
        /// Which space.
        space: SpaceId,
        /// What it has.
        features: u64,
    },
    /// A system call failed.
    #[error("cannot serve faults")]
    System(#[source] io::Error),
    /// Pages are planned to be filled where the process has no mapping to be filled.
    #[error("page {page} of space {} is planned but cannot be filled", space.0)]
    Unfillable {
        /// Which space.
        space: SpaceId,
        /// The first such page.
        page: PageIndex,
    },
    /// A serving thread has ended.
    #[error("a serving thread has ended")]
    Ended,
}

/// The serving threads.
#[derive(Debug)]
pub struct Server {
    threads: Vec<Thread>,
    counters: Arc<Counters>,
    homes: Arc<Homes>,
    /// Pages given to each thread.
    loads: Vec<u64>,
}

#[derive(Debug)]
struct Thread {
    caller: Caller,
    shared: Shared,
    handle: Option<JoinHandle<()>>,
}

/// What a thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve this space.
    Adopt(Box<Space>),
    /// Pages of its store that were absent are there.
    Arrived(SpaceId, PageSet),
    /// Say what is absent, and once more what threads wait for of that.
    Missing(oneshot::Sender<Vec<Missing>>),
    /// Look whether all that is missing can be filled.
    Probe(oneshot::Sender<Result<(), ServeError>>),
    /// The background fill may begin.
    Fill,
    /// Close everything and end.
    Stop,
}

/// What a thread shares with whoever started it.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    /// Readable when there is a command.
    pub(super) wake: Arc<EventFd>,
    pub(super) counters: Arc<Counters>,
    /// Told once, after `done` was set.
    pub(super) filled: tokio::sync::mpsc::UnboundedSender<()>,
    /// Told of absent pages that threads wait for.
    pub(super) wanted: Option<tokio::sync::mpsc::UnboundedSender<Wanted>>,
    /// Set by the thread when a fill has ended and nothing is left.
    pub(super) done: Arc<AtomicBool>,
}

impl Server {
    /// Starts the threads. `filled` is told, once per thread, when a thread has nothing left to
    /// fill. They are as nice as is said: they copy for as long as the workload runs beside them.
    pub fn start(
        filled: &tokio::sync::mpsc::UnboundedSender<()>,
        nice: i32,
        homes: Arc<Homes>,
    ) -> Result<Self, ServeError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let counters = Arc::new(Counters::default());
        let shared = || {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let wake = EventFd::from_flags(flags);
            Ok(Shared {
                wake: Arc::new(wake.map_err(|errno| ServeError::System(errno.into()))?),
                counters: counters.clone(),
                filled: filled.clone(),
                wanted: homes.wanted.clone(),
                done: Arc::new(AtomicBool::new(false)),
            })
        };
        let threads = (0..cores.min(THREADS_MAX))
            .map(|number| Thread::start(number, nice, shared()?))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            loads: vec![0; threads.len()],
            threads,
            counters,
            homes,
        })
    }

    /// Serves a space from now on.
    pub fn adopt(&mut self, mut space: Space) -> Result<(), ServeError> {
        let features = space.uffd.features().map_err(ServeError::System)?;
        if features & EVENTS != EVENTS {
            return Err(ServeError::Events {
                space: space.id,
                features,
            });
        }
        let pages = space.pending.len().0;
        self.counters.pending.fetch_add(pages, Ordering::Relaxed);
        let lightest = (0..self.loads.len())
            .min_by_key(|index| self.loads[*index])
            .unwrap_or(0);
        self.loads[lightest] += pages + 1;
        let caller = &self.threads[lightest].caller;
        // What arrives from here on goes to the thread, after the space itself.
        let mut homes = self.homes.lock();
        space.absent = homes.planned.remove(&space.id).unwrap_or_default();
        let absent = space.absent.len().0;
        self.counters.absent.fetch_add(absent, Ordering::Relaxed);
        homes.served.insert(space.id, caller.clone());
        caller.send(Command::Adopt(Box::new(space)))
    }

    /// Looks whether what is missing can be filled: mapped, and registered for it.
    pub async fn probe(&self) -> Result<(), ServeError> {
        for thread in &self.threads {
            let (answer, answered) = oneshot::channel();
            thread.caller.send(Command::Probe(answer))?;
            answered.await.map_err(|_| ServeError::Ended)??;
        }
        Ok(())
    }

    /// The background fill begins.
    pub fn fill(&self) -> Result<(), ServeError> {
        self.threads
            .iter()
            .try_for_each(|thread| thread.caller.send(Command::Fill))
    }

    /// Whether the fill has ended everywhere.
    pub fn is_filled(&self) -> bool {
        self.threads
            .iter()
            .all(|thread| thread.shared.done.load(Ordering::Acquire))
    }

    /// What has been done so far.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }
}

impl Drop for Server {
    /// Closes all descriptors. Whoever still waits for a page reads zeros then: the tree must be
    /// dead, or complete.
    fn drop(&mut self) {
        for thread in &mut self.threads {
            // A thread that has ended has closed them already.
            let _ = thread.caller.send(Command::Stop);
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

impl Thread {
    fn start(number: usize, nice: i32, shared: Shared) -> Result<Self, ServeError> {
        let (commands, received) = mpsc::channel();
        let worker = Worker::new(received, shared.clone()).map_err(ServeError::System)?;
        let handle = std::thread::Builder::new()
            .name(format!("serve-{number}"))
            .spawn(move || {
                // Without this thread its tasks wait for ever and nobody knows why. When the whole
                // process ends, the watcher freezes them and says so.
                let guard = AbortOnPanic;
                if let Err(error) = priority::set(nice) {
                    tracing::debug!(%error, "urgent without need");
                }
                worker.run();
                std::mem::forget(guard);
            })
            .map_err(ServeError::System)?;
        let wake = shared.wake.clone();
        Ok(Self {
            caller: Caller { commands, wake },
            shared,
            handle: Some(handle),
        })
    }
}

impl Caller {
    fn send(&self, command: Command) -> Result<(), ServeError> {
        self.commands.send(command).map_err(|_| ServeError::Ended)?;
        self.wake
            .write(1)
            .map_err(|errno| ServeError::System(errno.into()))?;
        Ok(())
    }
}

impl Homes {
    /// Of spaces of which this is absent. Whoever can bring it hears of `wanted`.
    pub fn new(
        absent: BTreeMap<SpaceId, PageSet>,
        wanted: tokio::sync::mpsc::UnboundedSender<Wanted>,
    ) -> Self {
        let inner = Inner {
            planned: absent,
            served: BTreeMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            wanted: Some(wanted),
        }
    }

    /// These pages of the store of a space are there now, whether or not they were absent.
    pub fn arrived(&self, space: SpaceId, pages: PageSet) -> Result<(), ServeError> {
        let mut homes = self.lock();
        if let Some(absent) = homes.planned.get_mut(&space) {
            absent.difference_with(&pages);
        }
        match homes.served.get(&space) {
            Some(caller) => caller.send(Command::Arrived(space, pages)),
            // It is not served yet.
            None => Ok(()),
        }
    }

    /// What is absent of the spaces that are served; and once more what threads wait for of it.
    pub async fn missing(&self) -> Result<Vec<Missing>, ServeError> {
        let callers: Vec<Caller> = {
            let homes = self.lock();
            let mut callers: Vec<Caller> = Vec::new();
            for caller in homes.served.values() {
                if !callers.iter().any(|it| Arc::ptr_eq(&it.wake, &caller.wake)) {
                    callers.push(caller.clone());
                }
            }
            callers
        };
        let mut missing = Vec::new();
        for caller in callers {
            let (answer, answered) = oneshot::channel();
            caller.send(Command::Missing(answer))?;
            missing.extend(answered.await.map_err(|_| ServeError::Ended)?);
        }
        missing.sort_by_key(|missing| missing.space);
        Ok(missing)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}
