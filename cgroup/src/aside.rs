//! A place beside a frozen cgroup, where a thread of it stands thawed.
//!
//! A thread must not be frozen to make a call for somebody who traces it, and all others must stay
//! so. In the v1 hierarchy the thread alone is moved; in cgroup v2 its process is, and whoever
//! moves it has seized all of its threads before.
//!
//! Invariants: a thread is moved only while it is held by a trace that does not let it run, and is
//! put back before that ends. Absent: tracing.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::freezer::{CgroupError, Freezer, FreezerVersion};

/// How the name of the place ends, behind that of the frozen cgroup.
const ASIDE: &str = "-aside";

/// How often the kernel is asked whether all are frozen again.
const POLL: Duration = Duration::from_micros(100);

/// How often it is asked to freeze, meanwhile: a task on its way into a stop of job control does
/// not notice the v1 freezer, and once it is stopped it is frozen only when it is asked for anew.
const AGAIN: Duration = Duration::from_millis(3);

/// The place. It is removed on drop, unless somebody is in it.
#[derive(Debug)]
pub struct Aside<'a> {
    frozen: &'a Freezer,
    place: Freezer,
}

impl Freezer {
    /// Makes a place beside this one. One that was left there is used again.
    pub fn aside(&self) -> Result<Aside<'_>, CgroupError> {
        let place = self.beside();
        place.make()?;
        Ok(Aside {
            frozen: self,
            place,
        })
    }

    /// Waits until the kernel says that every task is frozen. Unlike [`Freezer::freeze`] it never
    /// thaws: false if they are not all frozen within `limit`.
    pub fn wait_frozen(&self, limit: Duration) -> Result<bool, CgroupError> {
        let deadline = Instant::now() + limit;
        let mut asked = Instant::now();
        while !self.is_frozen()? {
            if deadline < Instant::now() {
                return Ok(false);
            }
            std::thread::sleep(POLL);
            if AGAIN < asked.elapsed() {
                self.begin_freeze()?;
                asked = Instant::now();
            }
        }
        Ok(true)
    }

    /// Whether process `pid` is in it, or stands beside it.
    pub fn holds(&self, pid: i32) -> Result<bool, CgroupError> {
        if self.processes()?.contains(&pid) {
            return Ok(true);
        }
        let beside = self.beside();
        match beside.processes() {
            Ok(pids) => Ok(pids.contains(&pid)),
            Err(_) if !beside.exists() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn beside(&self) -> Self {
        let mut name = self.path().file_name().unwrap_or_default().to_owned();
        name.push(ASIDE);
        self.like(self.path().with_file_name(name))
    }

    /// Removes a place beside this one that a dead daemon has left; not one that somebody is in.
    pub(crate) fn remove_aside(&self) {
        // Usually there is none.
        let _ = self.beside().remove_folder();
    }
}

/// Keeps the kernel ready to move threads between cgroups, until it is dropped or for
/// [`READY_MAX`]. The first move in a while waits until all processors have come to rest once (a
/// grace period of RCU, 10 to 20 ms), and one that follows within that time does not.
///
/// It must be dropped before a thread of its process is taken out: it would put it back.
#[derive(Debug)]
pub struct Ready {
    until_dropped: Option<mpsc::Sender<()>>,
    keeping: Option<JoinHandle<()>>,
}

/// How long it is kept ready at most.
pub const READY_MAX: Duration = Duration::from_secs(10);

/// How often a move is asked for that moves nothing.
const READY_EVERY: Duration = Duration::from_millis(3);

impl Freezer {
    /// Begins to keep ready for moves; `pid` is a process that is in this cgroup, and stays as it
    /// is.
    pub fn keep_ready(&self, pid: i32) -> Ready {
        let (until_dropped, over) = mpsc::channel::<()>();
        let (cgroup, began) = (self.clone(), Instant::now());
        let keep = move || {
            // What goes wrong costs some milliseconds, and nothing else.
            while began.elapsed() < READY_MAX
                && cgroup.write("cgroup.procs", &pid.to_string()).is_ok()
                && over.recv_timeout(READY_EVERY) == Err(RecvTimeoutError::Timeout)
            {}
        };
        let thread = std::thread::Builder::new().name("ready".to_owned());
        Ready {
            until_dropped: Some(until_dropped),
            keeping: thread.spawn(keep).ok(),
        }
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        drop(self.until_dropped.take());
        if let Some(keeping) = self.keeping.take() {
            // It does not panic. A move that it has asked for is over then.
            let _ = keeping.join();
        }
    }
}

impl Aside<'_> {
    /// The threads of process `pid` that must be seized for thread `tid` to be taken out.
    pub fn moved_with(&self, tid: i32, threads: Vec<i32>) -> Vec<i32> {
        match self.frozen.version() {
            FreezerVersion::V1 => vec![tid],
            FreezerVersion::V2 => threads,
        }
    }

    /// Takes a thread out of the frozen cgroup. It is thawed now.
    pub fn take_out(&self, tid: i32) -> Result<(), CgroupError> {
        self.place.take_in(tid)
    }

    /// Puts it back. It is frozen before it does anything of its own.
    pub fn put_back(&self, tid: i32) -> Result<(), CgroupError> {
        self.frozen.take_in(tid)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.place.path().to_owned()
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        // Found again by its name.
        let _ = self.place.remove_folder();
    }
}
