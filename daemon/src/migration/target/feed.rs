//! Pages that have not come when the workload runs: asked of the source, put into the store, and
//! told to the pagers, until none is missing.
//!
//! ```text
//! pager ─► wanted ─┐                    ┌► urgent lane ─► take: store, pager, books
//!                  ├► books ─► Fetch ─► source
//! fill, once it runs ┘                  └► other lanes ─► the same
//! ```
//!
//! What is missing, what was asked for, and what is asked for next say the books of `proto` alone.
//! The truth of what has come is the pager's: a restarted daemon asks it, and goes on.
//!
//! Invariants: a page is put into the store only if it is one that was missing; the pager hears of
//! it after its contents are there, and the books after the pager; what was asked for on a
//! connection that is lost is asked for again on the next. So little is asked for at a time that
//! streams for which nobody waits do not keep others from being read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry_pager::client::{ClientError, PagerClient, Wanted};
use pageferry_proto::id::{Generation, MemberIndex, SpaceId};
use pageferry_proto::migration::absent::{Absent, Ask};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Fetch, TargetMessage};
use tokio::sync::{Notify, mpsc};

use crate::migration::text::chain;

/// Pages of a request that nobody waits for, 1 MiB, and how many such are under way: enough for a
/// link of 10 Gbit/s. Fewer than streams that are read at a time.
const FILL_PAGES: u64 = 256;
const FILLS_MAX: usize = 5;

/// The same while threads wait: 256 KiB, 1 of which takes 2 ms of a link of 1 Gbit/s, behind which
/// an urgent page may stand.
const FILL_PAGES_BUSY: u64 = 64;
const FILLS_MAX_BUSY: usize = 2;

/// It is busy for so long after a thread has had to wait.
const BUSY: Duration = Duration::from_millis(20);

/// Urgent requests under way. As many threads may wait as there are; the others' turn comes.
const URGENT_MAX: usize = 32;

/// Brings what has not come. Clones are of the same.
#[derive(Clone, Debug, Default)]
pub struct Feed(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    books: Mutex<Books>,
    /// Something may be asked for.
    work: Notify,
}

#[derive(Debug, Default)]
struct Books {
    absent: Option<Absent>,
    generation: Option<Generation>,
    /// By the number of the member.
    pagers: BTreeMap<usize, Arc<PagerClient>>,
    /// Not only what threads wait for is asked for.
    fills: bool,
    last_fault: Option<Instant>,
    /// What threads wait for and is to be asked for.
    urgent: VecDeque<Ask>,
    /// What was asked for on this connection, as far as it has not come.
    asked: Vec<Ask>,
}

/// Something is asked of the source.
type Asked = Option<(Generation, Ask)>;

impl Feed {
    /// These pages have not come.
    pub fn begin(&self, generation: Option<Generation>, missing: BTreeMap<SpaceId, PageSet>) {
        let mut books = self.lock();
        books.generation = generation.or(books.generation);
        books.absent = Some(Absent::new(missing, &BTreeMap::new()));
        (books.fills, books.last_fault) = (false, None);
        books.urgent.clear();
        books.asked.clear();
    }

    /// Whether pages are missing.
    pub fn is_needed(&self) -> bool {
        let books = self.lock();
        books
            .absent
            .as_ref()
            .is_some_and(|absent| !absent.is_empty())
    }

    /// Nobody waits for anything any more: the workload has all that it needs, or is no more.
    pub fn end(&self) {
        *self.lock() = Books::default();
    }

    /// How many pages are missing.
    pub fn left(&self) -> PageCount {
        let books = self.lock();
        books.absent.as_ref().map_or(PageCount::ZERO, Absent::left)
    }

    /// What of a space is missing.
    pub fn missing_of(&self, space: SpaceId) -> PageSet {
        let books = self.lock();
        let absent = books.absent.as_ref();
        let missing = absent.and_then(|absent| absent.missing(space));
        missing.cloned().unwrap_or_default()
    }

    /// Serves the pager of a member from now on; if nothing is missing, it does nothing.
    pub fn attach(&self, member: MemberIndex, pager: &Arc<PagerClient>) {
        if !self.is_needed() {
            return;
        }
        let number = member.number();
        self.lock().pagers.insert(number, Arc::clone(pager));
        let Some(mut wanted) = pager.wanted() else {
            return;
        };
        let feed = self.clone();
        // Ends with the connection to the pager.
        tokio::spawn(async move {
            while let Some(pages) = wanted.recv().await {
                feed.want(member, &pages);
            }
        });
    }

    fn want(&self, member: MemberIndex, pages: &[Wanted]) {
        let mut books = self.lock();
        books.last_fault = Some(Instant::now());
        for (space, page) in pages {
            let id = match SpaceId::of(member, space.0) {
                Ok(id) => id,
                Err(error) => {
                    tracing::error!(%member, "a pager wants pages of none: {error}");
                    continue;
                }
            };
            let Books { absent, urgent, .. } = &mut *books;
            urgent.extend(absent.as_mut().and_then(|absent| absent.fault(id, *page)));
        }
        drop(books);
        self.0.work.notify_one();
    }

    /// It runs: from here on all that is missing is asked for.
    pub fn fill(&self, generation: Generation) {
        let mut books = self.lock();
        books.generation = Some(generation);
        books.fills = true;
        drop(books);
        self.0.work.notify_one();
    }

    /// Asks over a new connection until it is lost; what was asked before is asked for again.
    pub async fn ask(self, messages: mpsc::Sender<TargetMessage>) {
        self.disconnected();
        loop {
            let (asked, again) = self.next();
            if let Some((generation, ask)) = asked {
                let fetch = TargetMessage::Fetch(Fetch {
                    generation,
                    space: ask.space,
                    pages: ask.pages,
                    urgent: ask.urgent,
                });
                if messages.send(fetch).await.is_err() {
                    return;
                }
                continue;
            }
            let work = self.0.work.notified();
            match again {
                Some(pause) => drop(tokio::time::timeout(pause, work).await),
                None => work.await,
            }
        }
    }

    /// What to ask for next, or when to look again if nothing tells.
    fn next(&self) -> (Asked, Option<Duration>) {
        let mut books = self.lock();
        let calm = books.last_fault.map(|last| last.elapsed());
        let busy_for = calm.and_then(|calm| BUSY.checked_sub(calm));
        let (pages, fills_max) = match busy_for {
            Some(_) => (FILL_PAGES_BUSY, FILLS_MAX_BUSY),
            None => (FILL_PAGES, FILLS_MAX),
        };
        let (Some(generation), fills) = (books.generation, books.fills) else {
            return (None, None);
        };
        let Books {
            absent: Some(absent),
            urgent,
            asked,
            ..
        } = &mut *books
        else {
            return (None, None);
        };
        let others = asked.iter().filter(|ask| !ask.urgent).count();
        let mut ask = None;
        if asked.len() - others < URGENT_MAX {
            ask = urgent.pop_front();
        }
        if ask.is_none() && fills && others < fills_max {
            ask = absent.next(PageCount(pages));
        }
        asked.extend(ask.clone());
        (ask.map(|ask| (generation, ask)), busy_for)
    }

    /// Nothing is under way: those for whom threads wait are asked for first.
    fn disconnected(&self) {
        let mut books = self.lock();
        let Books {
            absent,
            urgent,
            asked,
            ..
        } = &mut *books;
        if let Some(absent) = absent {
            absent.disconnected();
            let waited_for: Vec<Ask> = asked.drain(..).filter(|ask| ask.urgent).collect();
            urgent.extend(waited_for);
        }
    }

    /// Whether each of these pages is one that was missing.
    pub fn is_missing(&self, space: SpaceId, pages: &PageSet) -> bool {
        let books = self.lock();
        books
            .absent
            .as_ref()
            .is_some_and(|absent| absent.was_missing(space, pages))
    }

    /// Contents of these pages are in the store.
    pub async fn arrived(&self, space: SpaceId, pages: &PageSet) -> Result<(), Failure> {
        let pager = self.lock().pagers.get(&space.member()).cloned();
        if let Some(pager) = pager {
            let told = pager.arrived(SpaceId(space.vpid()), pages).await;
            match told {
                Ok(()) => {}
                // Whoever waits for its end hears of it.
                Err(ClientError::Lost) => return Ok(()),
                Err(error) => return Err(Failure::new(ErrorCode::FillLost, chain(&error))),
            }
        }
        let entered = {
            let mut books = self.lock();
            books.asked.retain_mut(|ask| {
                if ask.space == space {
                    ask.pages.difference_with(pages);
                }
                !ask.pages.is_empty()
            });
            match &mut books.absent {
                Some(absent) => absent.arrived(space, pages).map(drop),
                None => Ok(()),
            }
        };
        self.0.work.notify_one();
        entered.map_err(|error| Failure::new(ErrorCode::Unexpected, error.to_string()))
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
