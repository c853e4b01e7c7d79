//! Calls of a thread whose cgroup is frozen, and stays so.
//!
//! ```text
//!   seized, asked to stop ─► taken out of the cgroup: it stops ─► calls ─► registers restored
//!                                         let go ◄─ put back: frozen ◄───────┘
//! ```
//!
//! Invariants: no thread runs an instruction of its own. One that is taken out has a stop pending,
//! which it comes to on its way to user mode, and one that is put back is frozen on the same way.
//! If this program ends in between, the kernel kills the thread's process: a copy of it may run
//! elsewhere from then on. All the others are never thawed.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use pageferry_cgroup::aside::Aside;
use pageferry_cgroup::freezer::{CgroupError, Freezer};
use pageferry_sys::ptrace::{self, TracersEnd};
use pageferry_sys::task;

use crate::call::Borrowed;
use crate::stop::{Advance, Held, advance, pause, seize};
use crate::{InjectError, gadget, restart};

/// How long a thread that was taken out may take to its stop: some microseconds, and its turn on a
/// processor.
const STOP_MAX: Duration = Duration::from_secs(10);

/// How long the cgroup may take to be frozen again when all threads are back.
const FREEZE_MAX: Duration = Duration::from_secs(2);

/// After how long a thread that is being seized is looked at: it may be one that job control has
/// stopped, for which the v1 freezer has the kernel wait until it is thawed.
const SEIZE_LOOK: Duration = Duration::from_millis(2);

/// Makes `calls` with a thread of a process, which is in the frozen cgroup `freezer`, and reads
/// back that all of the cgroup is frozen. The process is given by its pid and a descriptor of it,
/// by which a stranger who has come to the number meanwhile is known, and left alone. Takes a
/// millisecond, and in cgroup v1 ten to twenty more if the kernel is not ready
/// ([`Freezer::keep_ready`]).
pub fn with_thread<T: Send>(
    (pid, pidfd): (i32, BorrowedFd<'_>),
    freezer: &Freezer,
    calls: impl FnOnce(&mut Borrowed<'_>) -> Result<T, InjectError> + Send,
) -> Result<T, InjectError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(InjectError::Architecture);
    }
    let gadget = gadget::find(pid)?;
    let aside = freezer.aside().map_err(in_cgroup(pid))?;
    let (tracer, traces) = mpsc::channel();
    let (seized, is_seized) = mpsc::channel::<()>();
    let attempt = || {
        // The other end is there as long as this runs.
        let _ = tracer.send(nix::unistd::gettid().as_raw());
        let mut taken = Taken::seize(pid, &aside)?;
        drop(seized);
        taken.check(pidfd)?;
        taken.take_out()?;
        let mut thread = Borrowed::take(taken.leader()?, gadget)?;
        let done = calls(&mut thread);
        thread.give_back()?;
        taken.put_back()?;
        done
    };
    let done = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("inject".to_owned());
        let thread = thread
            .spawn_scoped(scope, attempt)
            .map_err(InjectError::Thread)?;
        if let Ok(tracer) = traces.recv() {
            while let Err(RecvTimeoutError::Timeout) = is_seized.recv_timeout(SEIZE_LOOK) {
                unstick(pid, tracer, &aside);
            }
        }
        thread.join().expect("the tracing thread does not panic")
    });
    drop(aside);
    let is_frozen = freezer.wait_frozen(FREEZE_MAX).map_err(in_cgroup(pid))?;
    let done = done?;
    if is_frozen {
        return Ok(done);
    }
    let path = freezer.path().to_owned();
    Err(in_cgroup(pid)(CgroupError::FreezeTimeout { path }))
}

/// Takes threads out whose seizure is stuck. They are seized then, so that they come to their stop.
fn unstick(pid: i32, tracer: i32, aside: &Aside<'_>) {
    if !task::is_seizing(tracer) {
        return;
    }
    for tid in task::threads(pid).unwrap_or_default() {
        // What cannot be moved is tried again.
        if task::tracer(tid) == Some(tracer) && task::is_seizing(tracer) {
            let _ = aside.take_out(tid);
        }
    }
}

/// Threads that are seized, and put back before they are let go.
#[derive(Debug)]
struct Taken<'a> {
    pid: i32,
    aside: &'a Aside<'a>,
    threads: Vec<Held>,
    /// They are in the frozen cgroup.
    is_back: bool,
    /// They are of another process, which is not moved.
    is_strange: bool,
}

impl<'a> Taken<'a> {
    fn seize(pid: i32, aside: &'a Aside<'a>) -> Result<Self, InjectError> {
        let mut taken = Self {
            pid,
            aside,
            threads: Vec::new(),
            is_back: false,
            is_strange: false,
        };
        let threads = task::threads(pid).map_err(|source| InjectError::Inspect {
            tid: pid,
            what: "the threads",
            source,
        })?;
        let leader = threads.iter().copied().find(|tid| !task::has_ended(*tid));
        let leader = leader.ok_or(InjectError::NoThread { pid })?;
        for tid in aside.moved_with(leader, threads) {
            if seize(tid, TracersEnd::Kills)? {
                taken.threads.push(Held {
                    tid,
                    process: pid,
                    usable: false,
                    end: TracersEnd::Kills,
                });
            }
        }
        Ok(taken)
    }

    /// As long as the process has not ended, the number that was seized by was its own.
    fn check(&mut self, pidfd: BorrowedFd<'_>) -> Result<(), InjectError> {
        if ptrace::is_alive(pidfd) {
            return Ok(());
        }
        self.is_strange = true;
        Err(InjectError::Ended { tid: self.pid })
    }

    /// Takes them out, and waits until they stand still.
    fn take_out(&mut self) -> Result<(), InjectError> {
        for held in self.threads.iter().filter(|_| !self.is_strange) {
            let moved = self.aside.take_out(held.tid);
            moved.map_err(in_cgroup(held.tid))?;
        }
        let deadline = Instant::now() + STOP_MAX;
        let mut idle = 0;
        loop {
            self.threads.retain_mut(|held| {
                if held.usable {
                    return true;
                }
                let now = advance(held.tid);
                held.usable = now == Advance::Stopped;
                now != Advance::Ended
            });
            let Some(held) = self.threads.iter().find(|held| !held.usable) else {
                return Ok(());
            };
            if deadline < Instant::now() {
                let (tid, limit) = (held.tid, STOP_MAX);
                return Err(InjectError::NotStopped { tid, limit });
            }
            pause(&mut idle);
        }
    }

    /// The first of them: the leader of the process, or the first thread that has not ended.
    fn leader(&mut self) -> Result<&mut Held, InjectError> {
        let pid = self.pid;
        self.threads
            .first_mut()
            .ok_or(InjectError::NoThread { pid })
    }

    fn put_back(&mut self) -> Result<(), InjectError> {
        for held in self.threads.iter().filter(|_| !self.is_strange) {
            let moved = self.aside.put_back(held.tid);
            moved.map_err(in_cgroup(held.tid))?;
        }
        self.is_back = true;
        Ok(())
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.threads.iter().any(|held| !held.usable) {
            // Only one that stands still can be let go.
            let _ = self.take_out();
        }
        if !self.is_back && self.put_back().is_err() {
            // Let go it would run: this OS thread ends, and the kernel kills it.
            return;
        }
        for held in self.threads.iter().filter(|held| held.usable) {
            restart::mend(held.tid);
            // Fails only for a thread that has been killed.
            let _ = ptrace::detach(held.tid, 0);
        }
    }
}

pub(crate) fn in_cgroup(tid: i32) -> impl FnOnce(CgroupError) -> InjectError {
    move |source| InjectError::Cgroup { tid, source }
}
