//! Seizing a thread that job control has stopped, in a frozen cgroup of the v1 hierarchy.
//!
//! The kernel does not return from `PTRACE_SEIZE` of a stopped thread before the thread has turned
//! its stop into a trap, and a frozen thread does that when it is thawed. CRIU seizes all first and
//! thaws then, so it would wait for ever. A thread whose seizure is stuck is therefore moved out of
//! the frozen cgroup, and back when it has trapped. It is seized at that moment, which is what
//! makes this safe: neither SIGCONT nor anything else gets it further than to its trap.
//!
//! In cgroup v2 nobody waits: a frozen thread traps.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::kernel;

static FREEZER: OnceLock<Freezer> = OnceLock::new();

/// Files that threads are moved by.
struct Freezer {
    frozen: PathBuf,
    /// Of the cgroup above, which is thawed.
    aside: PathBuf,
}

/// From now on the cgroup that holds the tree is known; one of v2 needs nothing done.
pub fn attach(cgroup: &Path) {
    let aside = cgroup.parent().map(|above| above.join(THREADS));
    if let Some(aside) = aside
        && cgroup.join(STATE).exists()
    {
        let frozen = cgroup.join(THREADS);
        // Set once, by the constructor.
        let _ = FREEZER.set(Freezer { frozen, aside });
    }
}

/// A seizure that CRIU waits for.
pub struct Seizure {
    tid: i32,
    tracer: i32,
    is_aside: bool,
}

impl Seizure {
    pub fn new(tid: i32, tracer: i32) -> Self {
        Self {
            tid,
            tracer,
            is_aside: false,
        }
    }

    /// To be called when it has taken long.
    pub fn look(&mut self) {
        if let Some(freezer) = FREEZER.get()
            && !self.is_aside
            && self.is_stuck()
        {
            self.is_aside = put(self.tid, &freezer.aside);
        }
    }

    /// The kernel sets the tracer and waits then, for nothing else: a tracer that is set, and waits
    /// in its call later, waits for the thread to trap.
    fn is_stuck(&self) -> bool {
        let (tid, tracer) = (self.tid, self.tracer);
        let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        let traced = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        if traced.and_then(|pid| pid.trim().parse().ok()) != Some(tracer) {
            return false;
        }
        let call = fs::read_to_string(format!("/proc/{tracer}/syscall")).unwrap_or_default();
        let seizes = format!("{} {:#x} {tid:#x} ", libc::SYS_ptrace, kernel::SEIZE);
        call.starts_with(&seizes)
    }

    /// When the kernel has returned. False if the thread could not be put back: it must not be
    /// kept, since the freezer holds it no more.
    pub fn end(self) -> bool {
        !self.is_aside
            || FREEZER
                .get()
                .is_some_and(|freezer| put(self.tid, &freezer.frozen))
    }
}

/// Puts those of `tids` back that a CRIU which was killed has left outside.
pub fn put_back(tids: impl Iterator<Item = i32>) {
    let Some(freezer) = FREEZER.get() else { return };
    let inside = fs::read_to_string(&freezer.frozen).unwrap_or_default();
    let inside: Vec<&str> = inside.lines().collect();
    for tid in tids.filter(|tid| !inside.contains(&tid.to_string().as_str())) {
        put(tid, &freezer.frozen);
    }
}

fn put(tid: i32, threads: &Path) -> bool {
    fs::write(threads, tid.to_string()).is_ok()
}

/// Of the v1 hierarchy: one thread at a time can be moved by it.
const THREADS: &str = "tasks";
const STATE: &str = "freezer.state";
