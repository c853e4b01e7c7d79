//! The threads of a process, as the kernel holds them: whether one is traced.
//!
//! Absent: who traces it. That is in `status`, which takes 10 us for each thread.

use std::io;
use std::os::fd::OwnedFd;

use pageferry_sys::bpf::Whose;

use super::types::Types;
use super::{ELEMENT, R1, Records, load, load_half, odd, program, put, unknown};

/// Reads the threads of processes.
#[derive(Debug)]
pub struct Threads {
    program: OwnedFd,
}

impl Threads {
    /// Loads the program. The error says why there is none on this node.
    pub fn load(types: &Types) -> io::Result<Self> {
        let instructions = instructions(types).ok_or_else(unknown)?;
        let probe = Self {
            program: load(types, ITERATOR, &instructions)?,
        };
        // A kernel that ignores whom it is asked about would tell of others.
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let told = probe.read(own)?;
        let first = told.first().ok_or_else(odd)?[0];
        if told.iter().any(|[process, _]| *process != first) {
            return Err(odd());
        }
        Ok(probe)
    }

    /// Whether any thread of a process is traced; false if it has ended.
    pub fn any_traced(&self, pid: i32) -> io::Result<bool> {
        Ok(self.read(pid)?.iter().any(|[_, traced]| *traced != 0))
    }

    fn read(&self, pid: i32) -> io::Result<Vec<[u64; WORDS]>> {
        Records::begin(&self.program, Whose::Process(pid))?.all(THREADS_MAX)
    }
}

/// For every thread: its process, and the flags of ptrace.
fn instructions(types: &Types) -> Option<Vec<u64>> {
    let copy = |index, name| {
        let place = types.member("task_struct", name)?;
        put(WORDS, index, vec![load_half(R1, ELEMENT, place)])
    };
    let copies = [copy(0, "tgid")?, copy(1, "ptrace")?];
    program(types, "bpf_iter__task", "task", &copies)
}

const ITERATOR: &str = "bpf_iter_task";
const WORDS: usize = 2;
/// As many as there can be on one node (`PID_MAX_LIMIT`).
const THREADS_MAX: usize = 4 << 20;
