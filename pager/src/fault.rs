//! One member's userfaultfd: what is read from it, in which order it is believed, and how a thread
//! that waits for a page gets it.
//!
//! Invariants, each from how the kernel works (`fs/userfaultfd.c`):
//! - Between the last reading of a userfaultfd and a copy into its memory nothing is read from it.
//!   Reading an event lets the thread behind it go on, so a copy that was decided before and made
//!   after would put old contents where zeros belong. One thread does both, hence no lock.
//! - While an event is unread, or its cause at work, the kernel refuses copies
//!   ([`Stop::Changing`]); the fault is kept and looked up anew after the event. A fault that was
//!   read is never forgotten: the kernel does not tell it twice.
//! - A fault for a page that nobody waits for gets the zero page. If the page is there already
//!   the kernel says so and the thread is woken to look again.
//!
//! **Order.** The kernel queues an event after its cause has let go of the mappings, so two
//! threads' events may be queued in the wrong order: a child is forked, another thread gives up
//! memory, and the second is told first; the child would read zeros for what it inherited. The
//! other way round the two look the same: memory is given up, the thread goes on and forks, and the
//! child must read zeros. What tells them apart is that in between nothing was at work. So after an
//! event the descriptor is watched without a break until nothing is at work any more ([`gather`]);
//! what is told meanwhile was at work at the same time, and is put into the one order in which it
//! can have happened ([`order`]). A break in the watching (this thread was off its processor) could
//! hide the calm, so what is told after one happened later. What remains is a fork whose thread is
//! stopped between letting go and queueing, some hundred nanoseconds, while another thread's event
//! is told.

use std::io;
use std::time::{Duration, Instant};

use pageferry_pages::store::MemoryFile;
use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use pageferry_sys::uffd::{Message, Stop, Uffd};
use tracing::warn;

use crate::absent::Absent;
use crate::space::{Family, MemberId};

/// How long after an event others are taken to have been at work at the same time. A thread that
/// goes on after its event cannot cause a fork to be told within this time: it must be woken and
/// fork, 30 µs at the least.
const GATHER_MAX: Duration = Duration::from_micros(20);

/// Longest time between two looks that counts as watching without a break: shorter than what is
/// between the end of one event's cause and a fork's beginning to be at work. A look takes 0.3 µs.
const LOOK_MAX: Duration = Duration::from_micros(5);

/// What one more message may add to a look.
const MESSAGE_MAX: Duration = Duration::from_nanos(500);

/// Pages copied for one fault: the one waited for and those behind it, if they are missing too.
/// 16 KiB cost 2 µs more than one page and spare a sequential reader three of four faults.
pub const FAULT_PAGES: u64 = 4;

/// What was read from a userfaultfd.
#[derive(Debug, Default)]
pub struct Batch {
    /// Pages that threads wait for.
    pub faults: Vec<PageIndex>,
    /// What happened to the memory, in the order in which it is to be applied.
    pub changes: Vec<Change>,
}

/// What happened to a member's memory.
#[derive(Debug)]
pub enum Change {
    /// A child was forked; its userfaultfd.
    Fork(Uffd),
    /// Pages moved.
    Remap {
        /// Where they were.
        from: PageRun,
        /// Where the first is now.
        to: PageIndex,
    },
    /// Pages were given up and read as zero from now on.
    Remove(PageRun),
    /// Pages are not mapped any more.
    Unmap(PageRun),
}

/// How serving a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The thread goes on.
    Done,
    /// Not before the events have been read.
    Later,
    /// Not before this page of the store has arrived.
    Absent(PageIndex),
    /// The process is gone.
    Gone,
}

/// Why a page could not be filled although its process is there.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The store could not be read.
    #[error("cannot read page {page} of the store")]
    Read {
        /// The page.
        page: PageIndex,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused for a reason that is not part of normal work.
    #[error("cannot fill page {page}: {stop:?}")]
    Refused {
        /// Where in the process.
        page: PageIndex,
        /// What it said.
        stop: Stop,
    },
    /// The userfaultfd could not be used.
    #[error("cannot use a userfaultfd")]
    Descriptor(#[source] io::Error),
}

/// Reads everything that waits at `uffd`, in batches to be applied one after the other. What is in
/// one batch was at work at the same time.
pub fn gather(uffd: &Uffd) -> io::Result<Vec<Batch>> {
    let registered = |page: PageIndex| uffd.is_registered(page.address()) == Some(true);
    let mut look = Look::new();
    let mut together = Vec::new();
    uffd.read(&mut together)?;
    if !together.iter().any(is_event) {
        return Ok(vec![sort(together, registered)]);
    }
    let mut apart = Vec::new();
    if look.is_broken(together.len()) {
        apart = std::mem::take(&mut together);
    }
    let start = look.at;
    while apart.is_empty() && look.at - start < GATHER_MAX && uffd.is_changing() {
        let mut more = Vec::new();
        // What was read already must not be lost; an error will be met again.
        if uffd.read(&mut more).is_err() {
            break;
        }
        let broken = look.is_broken(more.len());
        if broken { &mut apart } else { &mut together }.append(&mut more);
        if broken {
            break;
        }
    }
    let apart = apart.into_iter().map(|message| vec![message]);
    let batches = std::iter::once(together).chain(apart);
    Ok(batches.map(|messages| sort(messages, registered)).collect())
}

/// When something was last looked at.
struct Look {
    at: Instant,
}

impl Look {
    fn new() -> Self {
        Self { at: Instant::now() }
    }

    /// Whether so much time has passed since the last look that something may have begun and ended
    /// unseen. `messages` were read meanwhile.
    fn is_broken(&mut self, messages: usize) -> bool {
        let now = Instant::now();
        let taken = now - self.at;
        self.at = now;
        let reading = MESSAGE_MAX * u32::try_from(messages).unwrap_or(u32::MAX);
        LOOK_MAX + reading < taken
    }
}

fn is_event(message: &Message) -> bool {
    !matches!(message, Message::Fault { .. })
}

fn sort(messages: Vec<Message>, registered: impl Fn(PageIndex) -> bool) -> Batch {
    let mut batch = Batch::default();
    let mut changes = Vec::new();
    for message in messages {
        match message {
            Message::Fault { address } => batch.faults.push(PageIndex::containing(address)),
            Message::Fork(uffd) => changes.push(Change::Fork(uffd)),
            Message::Remap { from, to, len } => {
                let from = PageRun::touching(&(from..from.saturating_add(len)));
                let to = PageIndex::containing(to);
                changes.extend(from.map(|from| Change::Remap { from, to }));
            }
            Message::Remove { start, end } => {
                changes.extend(PageRun::touching(&(start..end)).map(Change::Remove));
            }
            Message::Unmap { start, end } => {
                changes.extend(PageRun::touching(&(start..end)).map(Change::Unmap));
            }
            Message::Unknown(event) => warn!(event, "a userfaultfd told what was not asked for"),
        }
    }
    batch.changes = order(changes, registered);
    batch
}

/// The order in which changes that were all under way at the same time happened.
///
/// - A fork was first: a child has what its parent had when it forked, and a parent that forked
///   after another event would have had to see that event's thread go on before.
/// - A place was vacated before something moved to it. When both are told and there is a mapping
///   at the place now, what vacated it was first, whatever the order of telling; when there is
///   none, it was vacated last.
fn order(changes: Vec<Change>, registered: impl Fn(PageIndex) -> bool) -> Vec<Change> {
    let is_fork = |change: &Change| matches!(change, Change::Fork(_));
    let (mut ordered, rest): (Vec<_>, Vec<_>) = changes.into_iter().partition(is_fork);
    for change in rest {
        let vacated = match &change {
            Change::Remap { from, .. } => Some(*from),
            Change::Unmap(run) => Some(*run),
            Change::Fork(_) | Change::Remove(_) => None,
        };
        let moved_there = |earlier: &Change| match (earlier, vacated) {
            (Change::Remap { from, to }, Some(vacated)) => {
                PageRun::new(*to, from.count())
                    .ok()
                    .and_then(|target| target.intersection(&vacated))
                    .is_some_and(|overlap| registered(overlap.start()))
                    && from.intersection(&vacated).is_none()
            }
            _ => false,
        };
        let position = ordered.iter().position(moved_there);
        ordered.insert(position.unwrap_or(ordered.len()), change);
    }
    ordered
}

/// Gives the page at `page` to the threads of `member` that wait for it.
pub fn serve(
    family: &mut Family,
    member: MemberId,
    uffd: &Uffd,
    (store, absent): (&MemoryFile, &Absent),
    page: PageIndex,
) -> Result<Served, FillError> {
    let Some(piece) = family.at(member, page) else {
        return serve_zero(uffd, page);
    };
    let piece = match absent.held_part(piece) {
        Some(held) if held.run.start() == page => held,
        Some(_) | None => return Ok(Served::Absent(piece.store)),
    };
    let count = piece.run.count().0.min(FAULT_PAGES);
    let mut buffer = [0; FAULT_PAGES as usize * PAGE_SIZE];
    let mut bytes = &mut buffer[..PageCount(count).bytes() as usize];
    store
        .read(piece.store, bytes)
        .map_err(|source| FillError::Read {
            page: piece.store,
            source,
        })?;
    loop {
        let progress = uffd.copy(page.address(), bytes);
        if let Ok(done) = PageRun::new(page, PageCount::covering(progress.done)) {
            family.settle(member, done);
            return Ok(Served::Done);
        }
        match progress.stop {
            Some(Stop::Unmapped) if PAGE_SIZE < bytes.len() => bytes = &mut bytes[..PAGE_SIZE],
            Some(Stop::Present | Stop::Unmapped) => {
                family.settle(member, one(page)?);
                return wake(uffd, page);
            }
            Some(Stop::Changing | Stop::Partial) | None => return Ok(Served::Later),
            Some(Stop::Gone) => return Ok(Served::Gone),
            Some(stop @ (Stop::NoMemory | Stop::Failed(_))) => {
                return Err(FillError::Refused { page, stop });
            }
        }
    }
}

fn serve_zero(uffd: &Uffd, page: PageIndex) -> Result<Served, FillError> {
    match uffd.zero(page.address(), PAGE_SIZE as u64).stop {
        None => Ok(Served::Done),
        Some(Stop::Present | Stop::Unmapped) => wake(uffd, page),
        Some(Stop::Changing | Stop::Partial) => Ok(Served::Later),
        Some(Stop::Gone) => Ok(Served::Gone),
        Some(stop @ (Stop::NoMemory | Stop::Failed(_))) => Err(FillError::Refused { page, stop }),
    }
}

fn wake(uffd: &Uffd, page: PageIndex) -> Result<Served, FillError> {
    uffd.wake(page.address(), PAGE_SIZE as u64)
        .map_err(FillError::Descriptor)?;
    Ok(Served::Done)
}

fn one(page: PageIndex) -> Result<PageRun, FillError> {
    let beyond = |_| FillError::Refused {
        page,
        stop: Stop::Unmapped,
    };
    PageRun::new(page, PageCount(1)).map_err(beyond)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex(start), PageCount(count)).unwrap()
    }

    fn remap(from: u64, to: u64) -> Change {
        let (from, to) = (run(from, 10), PageIndex(to));
        Change::Remap { from, to }
    }

    /// What `order` makes of `changes`, each named by its place among them.
    fn check(changes: Vec<Change>, mapped: &[u64], expected: &[&str]) {
        let ordered = order(changes, |page| mapped.contains(&page.0));
        let names: Vec<String> = ordered
            .iter()
            .map(|change| match change {
                Change::Fork(_) => "fork".to_owned(),
                Change::Remap { from, to } => format!("{}-{}", from.start().0, to.0),
                Change::Remove(run) => format!("remove {}", run.start().0),
                Change::Unmap(run) => format!("unmap {}", run.start().0),
            })
            .collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_fork_comes_before_what_was_given_up_beside_it() {
        let fork = Change::Fork(Uffd::new().unwrap());
        let changes = vec![Change::Remove(run(1, 2)), Change::Unmap(run(7, 1)), fork];
        check(changes, &[], &["fork", "remove 1", "unmap 7"]);
    }

    #[test]
    fn a_place_is_vacated_before_something_else_moves_there() {
        let told = || vec![remap(300, 100), Change::Unmap(run(100, 10))];
        check(told(), &[100], &["unmap 100", "300-100"]);
        check(told(), &[], &["300-100", "unmap 100"]);
        let told = || vec![remap(300, 100), remap(100, 200)];
        check(told(), &[100, 200], &["100-200", "300-100"]);
        check(told(), &[200], &["300-100", "100-200"]);
    }

    #[test]
    fn what_a_move_leaves_behind_is_unmapped_after_it() {
        let told = vec![remap(100, 200), Change::Unmap(run(100, 10))];
        check(told, &[200], &["100-200", "unmap 100"]);
        let told = vec![remap(100, 200), Change::Unmap(run(50, 300))];
        check(told, &[200], &["100-200", "unmap 50"]);
    }
}
