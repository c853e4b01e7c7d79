//! One serving thread. See [`crate::serve`].

mod arrivals;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use pageferry_pages::store::MemoryFile;
use pageferry_proto::id::SpaceId;
use pageferry_proto::page::{PageCount, PageIndex};
use pageferry_sys::uffd::Uffd;
use tracing::{error, warn};

use crate::absent::{Absent, Waiter};
use crate::fault::{self, Batch, Change, FillError, Served};
use crate::fill::{self, Chunk, Cursor};
use crate::serve::{Command, ServeError, Shared, Space};
use crate::space::{Family, MemberId};

/// Turns with faults after which a chunk is filled nevertheless, so that faults that go on for
/// ever (a growing heap) do not keep the fill from ending.
const FAULT_TURNS_MAX: u32 = 32;

/// Chunks are small for so long after a fault.
const BUSY: Duration = Duration::from_millis(10);

/// Pause before something is tried again that cannot be done now, in milliseconds.
const RETRY_MS: u16 = 1;

/// Pause after an error, in milliseconds: the page stays missing and its thread waits.
const TROUBLE_MS: u64 = 50;

/// How often it is looked whether those who wait for what is absent are still there, in
/// milliseconds: their end is no event.
const LOOK_MS: u16 = 1000;

/// Most descriptors told ready in one turn.
const READY_MAX: usize = 64;

/// Most pages that are tried before the restored tree may go on, per space.
const PROBES_MAX: usize = 4096;

/// The token of the descriptor that wakes a thread.
const WAKE_TOKEN: u64 = 0;

/// The thread's state.
#[derive(Debug)]
pub(super) struct Worker {
    epoll: Epoll,
    commands: mpsc::Receiver<Command>,
    shared: Shared,
    families: BTreeMap<SpaceId, Household>,
    /// Whose a ready descriptor is.
    tokens: BTreeMap<u64, (SpaceId, MemberId)>,
    token: u64,
    filling: bool,
    last_fault: Option<Instant>,
    fault_turns: u32,
    last_filled: (SpaceId, MemberId),
    /// When it was last looked who still needs what is absent.
    looked: Instant,
    buffer: Vec<u8>,
}

/// A family with its store and its descriptors.
#[derive(Debug)]
struct Household {
    family: Family,
    store: MemoryFile,
    absent: Absent,
    members: BTreeMap<MemberId, Member>,
}

#[derive(Debug)]
struct Member {
    uffd: Uffd,
    token: u64,
    /// Pages that threads wait for and that could not be served yet, but for what is absent; and
    /// since when, where that has been.
    waiting: Vec<(PageIndex, Option<Instant>)>,
    cursor: Cursor,
    /// Nothing is copied before this, after an error.
    trouble_until: Option<Instant>,
}

impl Household {
    /// Whether the fill of a member has anything to do before something arrives.
    fn is_fillable(&self, member: &Member) -> bool {
        !member.cursor.is_starved() || self.absent.is_empty()
    }
}

impl Worker {
    /// A thread's state with nothing to serve.
    pub(super) fn new(commands: mpsc::Receiver<Command>, shared: Shared) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let interest = EpollEvent::new(EpollFlags::EPOLLIN, WAKE_TOKEN);
        epoll.add(&*shared.wake, interest)?;
        Ok(Self {
            epoll,
            commands,
            shared,
            families: BTreeMap::new(),
            tokens: BTreeMap::new(),
            token: WAKE_TOKEN + 1,
            filling: false,
            last_fault: None,
            fault_turns: 0,
            last_filled: (SpaceId(0), MemberId(0)),
            looked: Instant::now(),
            buffer: vec![0; fill::BUFFER_BYTES],
        })
    }

    /// Serves until it is told to stop.
    pub(super) fn run(mut self) {
        let mut ready = [EpollEvent::empty(); READY_MAX];
        loop {
            let count = match self.epoll.wait(&mut ready, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    error!(%errno, "cannot wait for faults");
                    std::process::abort();
                }
            };
            for event in &ready[..count] {
                match self.tokens.get(&event.data()).copied() {
                    Some((space, member)) => self.gather(space, member),
                    None if !self.obey() => return,
                    None => {}
                }
            }
            self.look();
            let faults = self.serve_waiting();
            self.fault_turns = if faults == 0 { 0 } else { self.fault_turns + 1 };
            if 0 < faults {
                self.last_fault = Some(Instant::now());
            }
            if self.filling && (faults == 0 || FAULT_TURNS_MAX < self.fault_turns) {
                self.fault_turns = 0;
                self.fill();
            }
        }
    }

    /// How long to wait for descriptors: not at all while there is something to fill.
    fn timeout(&self) -> EpollTimeout {
        let now = Instant::now();
        let mut timeout = EpollTimeout::NONE;
        let members = self
            .families
            .values()
            .flat_map(|house| house.members.values().map(move |member| (house, member)));
        for (house, member) in members {
            let troubled = member.trouble_until.is_some_and(|until| now < until);
            if self.filling && !troubled && house.is_fillable(member) {
                return EpollTimeout::ZERO;
            }
            if troubled || !member.waiting.is_empty() {
                timeout = EpollTimeout::from(RETRY_MS);
            } else if self.filling && timeout.is_none() {
                timeout = EpollTimeout::from(LOOK_MS);
            }
        }
        timeout
    }

    /// Does what was commanded; false means to end.
    fn obey(&mut self) -> bool {
        // Only resets the counter; the commands are in the channel.
        let _ = self.shared.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Adopt(space) => self.adopt(*space),
                Command::Arrived(space, pages) => self.arrived(space, &pages),
                Command::Missing(answer) => {
                    // As for a probe.
                    let _ = answer.send(self.missing());
                }
                Command::Probe(answer) => {
                    // Whoever asked may have given up.
                    let _ = answer.send(self.probe());
                }
                Command::Fill => self.filling = true,
                Command::Stop => return false,
            }
        }
        self.retire();
        true
    }

    fn adopt(&mut self, space: Space) {
        let (family, founder) = Family::new(&space.pending);
        let house = Household {
            family,
            store: space.store,
            absent: Absent::new(space.absent),
            members: BTreeMap::new(),
        };
        self.families.insert(space.id, house);
        self.register(space.id, founder, space.uffd);
    }

    fn register(&mut self, space: SpaceId, member: MemberId, uffd: Uffd) {
        let token = self.token;
        self.token += 1;
        let interest = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if let Err(errno) = self.epoll.add(uffd.as_fd(), interest) {
            // The descriptor must stay open whatever happens, and its tasks must not wait unseen.
            error!(%errno, space = space.0, "cannot watch a userfaultfd");
            std::process::abort();
        }
        self.tokens.insert(token, (space, member));
        if let Some(house) = self.families.get_mut(&space) {
            let (waiting, cursor) = (Vec::new(), Cursor::default());
            let member_state = Member {
                uffd,
                token,
                waiting,
                cursor,
                trouble_until: None,
            };
            house.members.insert(member, member_state);
        }
    }

    fn probe(&self) -> Result<(), ServeError> {
        for (id, house) in &self.families {
            for (member, state) in &house.members {
                let pieces = house.family.pieces(*member);
                let step = pieces.count().div_ceil(PROBES_MAX).max(1);
                for piece in house.family.pieces(*member).step_by(step) {
                    let last = PageIndex(piece.run.end().0 - 1);
                    for page in [piece.run.start(), last] {
                        if state.uffd.is_registered(page.address()) == Some(false) {
                            return Err(ServeError::Unfillable { space: *id, page });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads what waits at a member's descriptor and applies it.
    fn gather(&mut self, space: SpaceId, member: MemberId) {
        let Some(state) = self.member(space, member) else {
            return;
        };
        let batches = match fault::gather(&state.uffd) {
            Ok(batches) => batches,
            Err(source) => {
                // Out of descriptors for a forked child: its parent waits until there is one. The
                // descriptor stays ready, so without a pause this would be asked without end.
                self.trouble(space, member, &FillError::Descriptor(source));
                std::thread::sleep(Duration::from_millis(RETRY_MS.into()));
                return;
            }
        };
        for batch in batches {
            self.apply(space, member, batch);
        }
    }

    fn apply(&mut self, space: SpaceId, member: MemberId, batch: Batch) {
        let mut children = Vec::new();
        let Some(house) = self.families.get_mut(&space) else {
            return;
        };
        let before = house.family.missing();
        if !batch.changes.is_empty() {
            // It may be told by none of them where what threads wait for is now.
            let waiters = house.absent.look_again(member);
            if let Some(state) = house.members.get_mut(&member) {
                let waiting = waiters.iter().map(|it| (it.page, Some(it.since)));
                state.waiting.extend(waiting);
                state.cursor.look_again();
            }
        }
        for change in batch.changes {
            match change {
                Change::Fork(uffd) => children.push((house.family.fork(member), uffd)),
                Change::Remap { from, to } => {
                    house.family.relocate(member, from, to);
                }
                Change::Remove(run) | Change::Unmap(run) => {
                    house.family.settle(member, run);
                }
            }
        }
        let after = house.family.missing();
        if let Some(state) = house.members.get_mut(&member) {
            let faults = batch.faults.into_iter().map(|page| (page, None));
            state.waiting.extend(faults);
        }
        self.count(before, after);
        for (child, uffd) in children {
            self.register(space, child, uffd);
        }
    }

    /// Serves what threads wait for; answers how many faults were met.
    fn serve_waiting(&mut self) -> u64 {
        let now = Instant::now();
        let mut waiting = Vec::new();
        for (space, house) in &self.families {
            for (member, state) in &house.members {
                let troubled = state.trouble_until.is_some_and(|until| now < until);
                if !state.waiting.is_empty() && !troubled {
                    waiting.push((*space, *member));
                }
            }
        }
        waiting
            .iter()
            .map(|(space, member)| self.serve(*space, *member))
            .sum()
    }

    fn serve(&mut self, space: SpaceId, member: MemberId) -> u64 {
        let Some(house) = self.families.get_mut(&space) else {
            return 0;
        };
        let before = house.family.missing();
        let Household {
            family,
            store,
            absent,
            members,
        } = house;
        let Some(state) = members.get_mut(&member) else {
            return 0;
        };
        let mut served = 0;
        let mut end = None;
        let mut wanted = Vec::new();
        while let Some((page, since)) = state.waiting.last().copied() {
            let near = family.at(member, page).map(|piece| piece.store);
            match fault::serve(family, member, &state.uffd, (store, absent), page) {
                Ok(Served::Done) => {
                    state.waiting.pop();
                    state.trouble_until = None;
                    served += 1;
                    let waited = since.map(|since| since.elapsed());
                    let counters = &self.shared.counters;
                    waited.into_iter().for_each(|it| counters.waited.note(it));
                    near.into_iter().for_each(|near| punch(family, store, near));
                }
                Ok(Served::Absent(page_of_store)) => {
                    state.waiting.pop();
                    let since = since.unwrap_or_else(Instant::now);
                    let waiter = Waiter {
                        member,
                        page,
                        since,
                    };
                    if absent.wait(page_of_store, waiter) {
                        wanted.push(page_of_store);
                    }
                }
                Ok(Served::Later) => break,
                Ok(Served::Gone) => {
                    end = Some(Ok(()));
                    break;
                }
                Err(error) => {
                    end = Some(Err(error));
                    break;
                }
            }
        }
        let after = house.family.missing();
        self.count(before, after);
        wanted.into_iter().for_each(|page| self.want(space, page));
        self.shared
            .counters
            .faults
            .fetch_add(served, Ordering::Relaxed);
        match end {
            Some(Ok(())) => self.forget(space, member),
            Some(Err(error)) => self.trouble(space, member, &error),
            None => {}
        }
        served
    }

    /// One chunk for one member, in turn; members that are complete are closed.
    fn fill(&mut self) {
        let now = Instant::now();
        let busy = self.last_fault.is_some_and(|last| now - last < BUSY);
        let pages_max = if busy {
            fill::CHUNK_PAGES_BUSY
        } else {
            fill::CHUNK_PAGES
        };
        let Some((space, member)) = self.next_to_fill(now) else {
            return;
        };
        let Some(house) = self.families.get_mut(&space) else {
            return;
        };
        let before = house.family.missing();
        let Household {
            family,
            store,
            absent,
            members,
        } = house;
        let Some(state) = members.get_mut(&member) else {
            return;
        };
        let (uffd, cursor) = (&state.uffd, &mut state.cursor);
        let end = fill::chunk(
            family,
            member,
            uffd,
            (store, absent),
            cursor,
            pages_max,
            &mut self.buffer,
        );
        punch(family, store, cursor.near);
        let unmapped = std::mem::take(&mut state.cursor.unmapped);
        self.shared
            .counters
            .unmapped
            .fetch_add(unmapped.0, Ordering::Relaxed);
        let after = house.family.missing();
        self.count(before, after);
        self.last_filled = (space, member);
        match end {
            Ok(Chunk::Some | Chunk::Starved) => {}
            Ok(Chunk::Later) => std::thread::yield_now(),
            Ok(Chunk::Complete | Chunk::Gone) => self.forget(space, member),
            Err(error) => self.trouble(space, member, &error),
        }
    }

    /// The member after the one that was filled last. Parent and child in turn keep their places
    /// in the store close together, so that it can be punched behind both.
    fn next_to_fill(&self, now: Instant) -> Option<(SpaceId, MemberId)> {
        let is_ready = |state: &Member| state.trouble_until.is_none_or(|until| until <= now);
        let candidates = || {
            self.families.iter().flat_map(|(space, house)| {
                let fillable = move |state: &Member| is_ready(state) && house.is_fillable(state);
                let members = house.members.iter();
                let members = members.filter(move |(_, state)| fillable(state));
                members.map(move |(member, _)| (*space, *member))
            })
        };
        let after = candidates().find(|candidate| self.last_filled < *candidate);
        after.or_else(|| candidates().next())
    }

    /// Ends a member that is complete or gone: its descriptor is closed.
    fn forget(&mut self, space: SpaceId, member: MemberId) {
        let Some(house) = self.families.get_mut(&space) else {
            return;
        };
        let before = house.family.missing();
        house.family.forget(member);
        drop(house.absent.look_again(member));
        if let Some(state) = house.members.remove(&member) {
            self.tokens.remove(&state.token);
            // Closing removes it from the epoll set only when no duplicate is open anywhere.
            let _ = self.epoll.delete(state.uffd.as_fd());
        }
        let after = house.family.missing();
        if house.members.is_empty() {
            // The daemon may still have the store open.
            for run in house.family.take_unpunched() {
                warn_unpunched(house.store.punch(run));
            }
            let absent = house.absent.len().0;
            let counter = &self.shared.counters.absent;
            counter.fetch_sub(absent, Ordering::Relaxed);
            self.families.remove(&space);
        }
        self.count(before, after);
        self.retire();
    }

    /// Says so when a fill has ended.
    fn retire(&self) {
        if self.filling
            && self.families.is_empty()
            && !self.shared.done.swap(true, Ordering::AcqRel)
        {
            // Nobody listens any more when the process is about to end.
            let _ = self.shared.filled.send(());
        }
    }

    fn trouble(&mut self, space: SpaceId, member: MemberId, error: &FillError) {
        let count = self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
        if count.is_power_of_two() || count == 0 {
            let source = std::error::Error::source(error).map(ToString::to_string);
            warn!(space = space.0, %error, source, count, "a page stays missing for now");
        }
        if let Some(state) = self.member(space, member) {
            state.trouble_until = Some(Instant::now() + Duration::from_millis(TROUBLE_MS));
        }
    }

    fn member(&mut self, space: SpaceId, member: MemberId) -> Option<&mut Member> {
        self.families.get_mut(&space)?.members.get_mut(&member)
    }

    fn count(&self, before: PageCount, after: PageCount) {
        if before < after {
            self.shared
                .counters
                .pending
                .fetch_add(after.0 - before.0, Ordering::Relaxed);
        } else {
            let settled = before.0 - after.0;
            self.shared
                .counters
                .pending
                .fetch_sub(settled, Ordering::Relaxed);
            self.shared
                .counters
                .settled
                .fetch_add(settled, Ordering::Relaxed);
        }
    }
}

fn punch(family: &mut Family, store: &MemoryFile, near: PageIndex) {
    warn_unpunched(fill::punch(family, store, near));
}

fn warn_unpunched(punched: io::Result<()>) {
    if let Err(error) = punched {
        warn!(%error, "cannot give back memory of a store");
    }
}
