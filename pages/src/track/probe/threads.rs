//! The threads of a process, as the kernel holds them: whether one is traced, whether one has an
//! io_uring that no descriptor and no mapping leads to (`IORING_SETUP_REGISTERED_FD_ONLY`), and
//! whether semaphores are changed when one ends (`SEM_UNDO`).
//!
//! Absent: who traces it. That is in `status`, which takes 10 us for each thread.

use std::io;
use std::os::fd::OwnedFd;

use pageferry_sys::bpf::Whose;

use super::types::Types;
use super::{
    ELEMENT, JUMP_IF_ZERO, MOVE_NUMBER, R1, R2, R3, Records, instruction, load, load_half,
    load_word, odd, program, put, unknown,
};

/// Reads the threads of processes.
#[derive(Debug)]
pub struct Threads {
    program: OwnedFd,
    /// Where in a list of what is undone its elements begin, if the kernel has such lists.
    elements: Option<u64>,
}

/// What some thread of a process has; nothing if it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// A tracer.
    pub tracer: bool,
    /// An io_uring that it has registered with itself.
    pub ring: bool,
    /// What has been done to semaphores and is to be undone; none if the kernel does not tell.
    pub undo: Option<bool>,
}

impl Threads {
    /// Loads the program. The error says why there is none on this node.
    pub fn load(types: &Types) -> io::Result<Self> {
        let instructions = instructions(types).ok_or_else(unknown)?;
        let probe = Self {
            program: load(types, ITERATOR, &instructions)?,
            elements: undo(types).map(|(_, elements)| elements.unsigned_abs().into()),
        };
        // A kernel that ignores whom it is asked about would tell of others.
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let told = probe.read(own)?;
        let first = told.first().ok_or_else(odd)?[0];
        if told.iter().any(|[process, ..]| *process != first) {
            return Err(odd());
        }
        Ok(probe)
    }

    /// What any thread of a process has.
    pub fn of(&self, pid: i32) -> io::Result<Found> {
        let mut found = Found::default();
        let mut undo = false;
        for [_, traced, ring, list, first] in self.read(pid)? {
            found.tracer |= traced != 0;
            found.ring |= ring != 0;
            // Threads have a list together, whether they need it or not. An empty one leads to
            // itself.
            undo |= list != 0 && Some(first) != self.elements.map(|elements| list + elements);
        }
        found.undo = self.elements.map(|_| undo);
        Ok(found)
    }

    fn read(&self, pid: i32) -> io::Result<Vec<[u64; WORDS]>> {
        Records::begin(&self.program, Whose::Process(pid))?.all(THREADS_MAX)
    }
}

/// For every thread: its process, the flags of ptrace, whether it has a ring, where its list of
/// what is undone is, and the first element of that.
fn instructions(types: &Types) -> Option<Vec<u64>> {
    let copy = |index, name| {
        let place = types.member("task_struct", name)?;
        put(WORDS, index, vec![load_half(R1, ELEMENT, place)])
    };
    let none = || vec![instruction(MOVE_NUMBER, R1, 0, 0, 0)];
    let ring = put(WORDS, 2, ring(types).unwrap_or_else(none))?;
    let (list, first) = match undo(types) {
        Some((list, elements)) => {
            let list = load_word(R1, ELEMENT, list);
            let skip = instruction(JUMP_IF_ZERO, R1, 0, 1, 0);
            (vec![list], vec![list, skip, load_word(R1, R1, elements)])
        }
        None => (none(), none()),
    };
    let (list, first) = (put(WORDS, 3, list)?, put(WORDS, 4, first)?);
    let copies = [copy(0, "tgid")?, copy(1, "ptrace")?, ring, list, first];
    program(types, "bpf_iter__task", "task", &copies)
}

/// 1 if the thread has registered a ring, else 0. None where the kernel has no such rings.
fn ring(types: &Types) -> Option<Vec<u64>> {
    let own = types.member("task_struct", "io_uring")?;
    let first = types.member("io_uring_task", "registered_rings")?;
    let looks = (0..RINGS_MAX).flat_map(|index| {
        [
            load_word(R3, R2, first + 8 * index),
            instruction(JUMP_IF_ZERO, R3, 0, 1, 0),
            instruction(MOVE_NUMBER, R1, 0, 0, 1),
        ]
    });
    let mut ring = vec![
        instruction(MOVE_NUMBER, R1, 0, 0, 0),
        load_word(R2, ELEMENT, own),
        // It has never used one.
        instruction(JUMP_IF_ZERO, R2, 0, 3 * RINGS_MAX, 0),
    ];
    ring.extend(looks);
    Some(ring)
}

/// Where a thread's list of what is undone is, and where in that the elements begin. None where the
/// kernel has no semaphores of System V.
fn undo(types: &Types) -> Option<(i16, i16)> {
    let semaphores = types.member("task_struct", "sysvsem")?;
    let list = types.member("sysv_sem", "undo_list")?;
    let elements = types.member("sem_undo_list", "list_proc")?;
    Some((semaphores.checked_add(list)?, elements))
}

const ITERATOR: &str = "bpf_iter_task";
const WORDS: usize = 5;
/// `IO_RINGFD_REG_MAX`: if there were fewer, the kernel would not load the program.
const RINGS_MAX: i16 = 16;
/// As many as there can be on one node (`PID_MAX_LIMIT`).
const THREADS_MAX: usize = 4 << 20;
