//! Stopping every thread that can see a process's descriptors, and letting all go again.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use pageferry_sys::ptrace::{self, Resume, Stop, TracersEnd};
use pageferry_sys::task;

use crate::{InjectError, restart};

/// One seized thread.
#[derive(Debug)]
pub(crate) struct Held {
    /// Its thread id.
    pub(crate) tid: i32,
    /// The process it belongs to.
    pub(crate) process: i32,
    /// Stands still on its way to user mode. False for a thread in an uninterruptible call, which
    /// will stop before it runs another instruction of its own.
    pub(crate) usable: bool,
    /// What it was seized with.
    pub(crate) end: TracersEnd,
}

/// Threads that are seized and stand still. All are let go on drop, in a state from which they go
/// on as if nothing had happened.
#[derive(Debug)]
pub(crate) struct Stopped {
    threads: Vec<Held>,
}

impl Stopped {
    /// Stops all threads of `processes`, or none.
    pub(crate) fn stop(
        processes: &[i32],
        deadline: Instant,
        limit: Duration,
    ) -> Result<Self, InjectError> {
        let mut stopped = Self {
            threads: Vec::new(),
        };
        let mut known = HashSet::new();
        // A running thread may make others while we ask it to stop: list again until nobody is new.
        for _ in 0..PASSES_MAX {
            let first_new = stopped.threads.len();
            for &process in processes {
                stopped.seize_new(process, &mut known)?;
            }
            if stopped.threads.len() == first_new {
                stopped.threads.retain(|held| held.tid != 0);
                return Ok(stopped);
            }
            stopped.await_stops(first_new, deadline, limit)?;
        }
        Err(InjectError::TooManyThreads { pid: processes[0] })
    }

    /// Stops one thread of process `pid`.
    pub(crate) fn stop_one(
        pid: i32,
        tid: i32,
        deadline: Instant,
        limit: Duration,
    ) -> Result<Self, InjectError> {
        let mut stopped = Self {
            threads: Vec::new(),
        };
        if !seize(tid, TracersEnd::LetsGo)? {
            return Err(InjectError::Ended { tid });
        }
        stopped.threads.push(Held {
            tid,
            process: pid,
            usable: false,
            end: TracersEnd::LetsGo,
        });
        stopped.await_stops(0, deadline, limit)?;
        Ok(stopped)
    }

    pub(crate) fn len(&self) -> usize {
        self.threads.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Held> {
        self.threads.iter_mut()
    }

    fn seize_new(&mut self, process: i32, known: &mut HashSet<i32>) -> Result<(), InjectError> {
        let tids = task::threads(process).map_err(|source| InjectError::Inspect {
            tid: process,
            what: "the threads",
            source,
        })?;
        for tid in tids {
            if !known.insert(tid) {
                continue;
            }
            if THREADS_MAX < known.len() {
                return Err(InjectError::TooManyThreads { pid: process });
            }
            if seize(tid, TracersEnd::LetsGo)? {
                self.threads.push(Held {
                    tid,
                    process,
                    usable: false,
                    end: TracersEnd::LetsGo,
                });
            }
        }
        Ok(())
    }

    /// Waits until the threads from index `first` on stand still. The tid of one that ends instead
    /// becomes 0.
    fn await_stops(
        &mut self,
        first: usize,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), InjectError> {
        let began = Instant::now();
        let mut pending: Vec<usize> = (first..self.threads.len()).collect();
        let mut idle = 0;
        while !pending.is_empty() {
            let before = pending.len();
            let threads = &mut self.threads;
            pending.retain(|&index| match advance(threads[index].tid) {
                Advance::Running => true,
                Advance::Stopped => {
                    threads[index].usable = true;
                    false
                }
                Advance::Ended => {
                    threads[index].tid = 0;
                    false
                }
            });
            if pending.len() < before {
                idle = 0;
                continue;
            }
            if began + UNINTERRUPTIBLE_AFTER <= Instant::now() {
                // It has a trap pending, so it will not run user code before we have let go of it.
                pending.retain(|&index| !task::is_uninterruptible(threads[index].tid));
            }
            if let Some(&index) = pending.first()
                && deadline <= Instant::now()
            {
                return Err(InjectError::NotStopped {
                    tid: threads[index].tid,
                    limit,
                });
            }
            pause(&mut idle);
        }
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for held in self.threads.iter().filter(|held| held.tid != 0) {
            if !held.usable && !matches!(advance(held.tid), Advance::Stopped) {
                // Still on its way: the kernel lets go of it when this OS thread ends.
                continue;
            }
            restart::mend(held.tid);
            // Fails only for a thread that has been killed.
            let _ = ptrace::detach(held.tid, 0);
        }
    }
}

/// Seizes and interrupts one thread; false when it has ended.
pub(crate) fn seize(tid: i32, end: TracersEnd) -> Result<bool, InjectError> {
    match ptrace::seize_until(tid, end) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
        Err(source) => {
            // EPERM says nothing: ask who it is.
            return match task::Status::read(tid) {
                Ok(status) if status.has_ended() => Ok(false),
                Ok(status) if status.tracer != 0 => Err(InjectError::Traced {
                    tid,
                    tracer: status.tracer,
                }),
                // It has ended between the two.
                Err(error) if is_gone(&error) => Ok(false),
                Ok(_) | Err(_) => Err(InjectError::Seize { tid, source }),
            };
        }
    }
    match ptrace::interrupt(tid) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(source) => Err(InjectError::Trace {
            tid,
            what: "interrupt",
            source,
        }),
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Where a thread that was asked to stop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    Running,
    Stopped,
    Ended,
}

/// Sends a thread that stops for another reason on its way, until it stops for ours.
pub(crate) fn advance(tid: i32) -> Advance {
    loop {
        let resumed = match ptrace::poll(tid) {
            Ok(None) => return Advance::Running,
            Ok(Some(Stop::Trap)) => return Advance::Stopped,
            Ok(Some(Stop::Ended)) | Err(_) => return Advance::Ended,
            // Its signal is its own: it gets it now, and our trap comes after.
            Ok(Some(Stop::Signal(signal))) => ptrace::resume(tid, Resume::Freely, signal),
            Ok(Some(Stop::Syscall | Stop::Event(_))) => ptrace::resume(tid, Resume::Freely, 0),
        };
        if resumed.is_err() {
            return Advance::Ended;
        }
    }
}

/// Gives the processor away between two looks, first for nothing, then for a moment.
pub(crate) fn pause(idle: &mut u32) {
    *idle += 1;
    if *idle < YIELDS {
        std::thread::yield_now();
    } else {
        std::thread::sleep(PAUSE);
    }
}

/// How often the threads are listed. Each pass stops everybody the one before found, so a second
/// finds those made during the first; more are needed only against a storm of them.
const PASSES_MAX: usize = 8;

/// Most threads that are stopped for one space: far above what can be stopped in 20 ms.
const THREADS_MAX: usize = 16384;

/// After how long a thread in state D counts as standing still. A short one will come by itself.
pub(super) const UNINTERRUPTIBLE_AFTER: Duration = Duration::from_millis(2);

/// How often the processor is given away before the first pause.
const YIELDS: u32 = 64;

/// Length of a pause between two looks. The kernel adds its timer slack, 50 µs.
const PAUSE: Duration = Duration::from_micros(20);
