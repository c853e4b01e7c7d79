//! Where frames wait for a workload: read from what they are diverted to by a thread of its own,
//! kept in order, and given to the workload's link, or to whoever sends them on.
//!
//! Invariant: all is done under one lock, so that no frame overtakes another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_proto::id::Generation;
use pageferry_proto::migration::parked::{Kept, is_neighbours, is_tcp, travels};
use pageferry_proto::wire::parked::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, ParkedFrame};
use pageferry_sys::packet::{Capture, Injector};
use pageferry_sys::tap::{Tap, VNET_BYTES};
use tokio::sync::Notify;

/// Where frames wait for a workload. Its thread ends with it.
#[derive(Debug)]
pub struct Lot {
    shared: Arc<Shared>,
    /// Ends the thread when it is closed.
    _life: UnixStream,
}

/// One link of the workload.
#[derive(Debug)]
pub(super) struct Spot {
    link: u8,
    from: Where,
    to: Injector,
    /// The hardware address that frames are for, and that of the workload's link here.
    macs: ([u8; 6], [u8; 6]),
    /// Nothing can be read any more: the link is gone.
    is_gone: AtomicBool,
}

/// Where frames are read that come by it.
#[derive(Debug)]
pub(super) enum Where {
    /// They are diverted to it.
    Tap(Tap),
    /// They pass it, and no port.
    Bridge(Capture),
    /// They go to the workload.
    Nowhere,
}

#[derive(Debug)]
struct Shared {
    spots: Vec<Spot>,
    state: Mutex<State>,
    came: Notify,
}

#[derive(Debug)]
struct State {
    course: Course,
    kept: Kept,
    /// What may not reach the workload twice is not kept.
    repeatable: bool,
    buffer: Vec<u8>,
}

/// What becomes of a frame that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// It goes to the workload, unless it went there anyway.
    Passes,
    Waits,
    /// It waits, but for what neighbours say of addresses: the workload's kernel asks for them.
    WaitsButNeighbours,
}

impl Lot {
    /// One in which nothing waits yet.
    pub(super) fn new(spots: Vec<Spot>) -> io::Result<Self> {
        let state = State {
            course: Course::Passes,
            kept: Kept::default(),
            repeatable: false,
            buffer: vec![0; FRAME_BYTES_MAX + 1],
        };
        let shared = Arc::new(Shared {
            spots,
            state: Mutex::new(state),
            came: Notify::new(),
        });
        let (life, end) = UnixStream::pair()?;
        let thread = std::thread::Builder::new().name("parked".to_owned());
        let watched = Arc::clone(&shared);
        thread.spawn(move || watched.watch(&end))?;
        Ok(Self {
            shared,
            _life: life,
        })
    }

    /// From here on what comes waits.
    pub(super) fn hold(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        for spot in &self.shared.spots {
            if let Where::Bridge(capture) = &spot.from {
                capture.begin()?;
            }
        }
        // What was seen before its port was closed has gone there.
        self.shared.read(&mut state);
        state.course = Course::Waits;
        state.repeatable = false;
        Ok(())
    }

    pub(super) fn hold_but_neighbours(&self) {
        self.shared.lock().course = Course::WaitsButNeighbours;
    }

    pub(super) fn keep_repeatable(&self) {
        self.shared.lock().repeatable = true;
    }

    /// What waits stays, and what is seen from here on is nothing to keep.
    pub(super) fn stop(&self) {
        let mut state = self.shared.lock();
        self.shared.read(&mut state);
        state.course = Course::Passes;
    }

    /// Gives the workload all that waits. Then `open` lets everything pass, and what came while it
    /// did so is given to the workload, too.
    pub(super) fn deliver<T>(&self, open: impl FnOnce() -> T) -> T {
        let mut state = self.shared.lock();
        let (mut rounds, mut count) = (0, 0);
        loop {
            self.shared.read(&mut state);
            let waiting: Vec<_> = state.kept.take().collect();
            count += waiting.len();
            // Whoever sends without end is not waited for.
            if waiting.is_empty() || ROUNDS_MAX < rounds {
                break;
            }
            rounds += 1;
            waiting.iter().for_each(|frame| self.shared.give(frame));
        }
        state.course = Course::Passes;
        let opened = open();
        self.shared.read(&mut state);
        tracing::debug!(frames = count, "given to the workload");
        opened
    }

    /// Gives the workload a frame of its source. What is not for its link goes nowhere.
    pub(super) fn inject(&self, mut frame: ParkedFrame) {
        let spot = self
            .shared
            .spots
            .iter()
            .find(|spot| spot.link == frame.link);
        let Some(spot) = spot.filter(|spot| travels(&frame.bytes, spot.macs.0)) else {
            tracing::debug!(link = frame.link, "a frame for nobody here");
            return;
        };
        frame.bytes[VNET_BYTES..VNET_BYTES + 6].copy_from_slice(&spot.macs.1);
        spot.give(&frame.bytes);
    }

    /// Keeps what the workload, which is frozen, has not read yet, for the target alone.
    pub fn put_unread(&self, frames: Vec<ParkedFrame>) {
        self.shared.lock().kept.put_unread(frames);
    }

    /// The next stream for the target, without its checksum, if anything waits for it.
    pub fn stream(&self, generation: Generation) -> Option<Vec<u8>> {
        self.shared.lock().kept.stream(generation)
    }

    /// Takes in what has come, though its thread may not have had its turn yet.
    pub fn catch_up(&self) {
        self.shared.read(&mut self.shared.lock());
    }

    /// A stream that says that all was sent that was kept so far, when there is nothing to send.
    pub fn mark(&self, generation: Generation) -> Vec<u8> {
        self.shared.lock().kept.mark(generation)
    }

    /// Waits until something may have come.
    pub async fn came(&self) {
        self.shared.came.notified().await;
    }

    /// The workload runs at the target: what comes is for that alone.
    pub fn relay(&self) {
        self.shared.lock().kept.relay();
    }

    /// How many frames wait, and for how many there was no room.
    pub fn counts(&self) -> (usize, u64) {
        self.shared.lock().kept.counts()
    }
}

impl Spot {
    pub(super) const fn new(link: u8, from: Where, to: Injector, macs: ([u8; 6], [u8; 6])) -> Self {
        Self {
            link,
            from,
            to,
            macs,
            is_gone: AtomicBool::new(false),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.from {
            _ if self.is_gone.load(Ordering::Relaxed) => None,
            Where::Tap(tap) => Some(tap.as_fd()),
            Where::Bridge(capture) => Some(capture.as_fd()),
            Where::Nowhere => None,
        }
    }

    /// The next frame that is to be read, if one is.
    fn read(&self, buffer: &mut [u8]) -> Option<usize> {
        let read = match &self.from {
            Where::Tap(tap) => tap.read(buffer),
            Where::Bridge(capture) => capture.read(buffer),
            Where::Nowhere => Ok(None),
        };
        read.unwrap_or_else(|error| {
            tracing::debug!(link = self.link, %error, "nothing is kept of a link any more");
            self.is_gone.store(true, Ordering::Relaxed);
            None
        })
    }

    fn give(&self, frame: &[u8]) {
        if let Err(error) = self.to.send(frame) {
            tracing::debug!(link = self.link, %error, "a frame is lost");
        }
    }

    /// Whether what was read and does not wait has still to be given to the workload.
    const fn diverts(&self) -> bool {
        matches!(self.from, Where::Tap(_))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what comes, until `end` is closed at its other end.
    fn watch(&self, end: &UnixStream) {
        loop {
            let spots = self.spots.iter().filter_map(Spot::descriptor);
            let all = std::iter::once(end.as_fd()).chain(spots);
            let mut all: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            match poll(&mut all, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "what comes for a frozen workload is not read");
                    return;
                }
            }
            if all[0].any() == Some(true) {
                return;
            }
            self.read(&mut self.lock());
        }
    }

    /// Reads all there is.
    fn read(&self, state: &mut State) {
        let mut came = false;
        let mut buffer = std::mem::take(&mut state.buffer);
        for spot in &self.spots {
            for _ in 0..READ_MAX {
                let Some(length) = spot.read(&mut buffer) else {
                    break;
                };
                if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
                    continue;
                }
                let frame = &buffer[..length];
                match state.course {
                    Course::Passes if spot.diverts() => spot.give(frame),
                    Course::Passes => {}
                    Course::WaitsButNeighbours if is_neighbours(frame) => spot.give(frame),
                    Course::Waits | Course::WaitsButNeighbours => {
                        let travels =
                            travels(frame, spot.macs.0) && (!state.repeatable || is_tcp(frame));
                        let (link, bytes) = (spot.link, frame.to_vec());
                        state.kept.put(ParkedFrame { link, bytes }, travels);
                        came |= travels;
                    }
                }
            }
        }
        state.buffer = buffer;
        if came {
            self.came.notify_one();
        }
    }

    fn give(&self, frame: &ParkedFrame) {
        if let Some(spot) = self.spots.iter().find(|spot| spot.link == frame.link) {
            spot.give(&frame.bytes);
        }
    }
}

/// Most frames that are read of one link before another has its turn.
const READ_MAX: usize = 8192;

/// How often it is looked whether more has come for a workload, before everything passes.
const ROUNDS_MAX: u32 = 16;
