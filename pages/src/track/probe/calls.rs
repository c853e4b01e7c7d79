//! Where the threads of a process are, as the kernel holds them: which system call each one is in
//! or comes from, with what result so far, and whether it is frozen.
//!
//! `/proc` tells the call of one thread for 5 us, and the result of none.
//!
//! Absent: what follows from it.

use std::io;
use std::os::fd::OwnedFd;

use pageferry_sys::bpf::Whose;
use pageferry_sys::task;

use super::types::Types;
use super::{
    CALL, ELEMENT, JUMP_IF_ZERO, MOVE, MOVE_NUMBER, R0, R1, R2, Records, instruction, load,
    load_half, load_word, odd, program, put, unknown,
};

/// Reads where the threads of processes are.
#[derive(Debug)]
pub struct Calls {
    program: OwnedFd,
}

/// One thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its id.
    pub tid: i32,
    /// The kernel's `__state`: 0 while it runs or waits for a processor.
    pub state: u32,
    /// The state that the freezer found it in and froze it in, if it did; else 0.
    pub frozen_in: u32,
    /// It has ended.
    pub ended: bool,
    /// Job control has stopped it.
    pub stopped: bool,
    /// The number of the call by which it last entered the kernel; negative if by none.
    pub call: i64,
    /// What is in the register of the result: the result, once there is one.
    pub result: i64,
}

impl Calls {
    /// Loads the program. The error says why there is none on this node.
    pub fn load(types: &Types) -> io::Result<Self> {
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        // A thread has a number in every pid namespace it is in; wanted is that of ours.
        let level = level(types).ok_or_else(unknown)?;
        let level = load(types, ITERATOR, &level)?;
        let levels = Records::begin(&level, Whose::Process(own))?.all(THREADS_MAX)?;
        let &[level] = levels.first().ok_or_else(odd)?;
        let instructions = instructions(types, level).ok_or_else(unknown)?;
        let probe = Self {
            program: load(types, ITERATOR, &instructions)?,
        };
        // Fields that are not where they should be would not be these.
        let (known, own_thread) = (probe.of(own)?, nix::unistd::gettid().as_raw());
        let is_own = |place: &&Place| place.tid == own_thread;
        let found = known.iter().find(is_own).ok_or_else(odd)?;
        let threads = task::threads(own)?;
        // It reads the iterator.
        let reads = found.state == 0 && found.call == libc::SYS_read && !found.ended;
        // Threads of ours may begin and end meanwhile.
        let strangers = known
            .iter()
            .filter(|place| !threads.contains(&place.tid) && !task::has_ended(place.tid));
        if reads && strangers.count() == 0 {
            Ok(probe)
        } else {
            Err(odd())
        }
    }

    /// Those of a process; none if it has ended.
    pub fn of(&self, pid: i32) -> io::Result<Vec<Place>> {
        let records = Records::begin(&self.program, Whose::Process(pid))?;
        let places = records.all::<WORDS>(THREADS_MAX)?.into_iter().map(place);
        places.collect()
    }
}

fn place(record: [u64; WORDS]) -> io::Result<Place> {
    let [tid, state, frozen_in, exit_state, jobctl, call, result] = record;
    let small = |word: u64| u32::try_from(word).map_err(|_| odd());
    Ok(Place {
        tid: small(tid)?.cast_signed(),
        state: small(state)?,
        frozen_in: small(frozen_in)?,
        ended: exit_state != 0,
        stopped: jobctl & STOPPED != 0,
        call: call.cast_signed(),
        result: result.cast_signed(),
    })
}

/// In how many pid namespaces above its own each thread is.
fn level(types: &Types) -> Option<Vec<u64>> {
    let identity = types.member("task_struct", "thread_pid")?;
    let level = types.member("pid", "level")?;
    let copy = put(
        1,
        0,
        vec![load_word(R2, ELEMENT, identity), load_half(R1, R2, level)],
    )?;
    program(types, CONTEXT_TYPE, "task", &[copy])
}

/// For every thread: its number in the pid namespace of this level, and where it is.
fn instructions(types: &Types, level: u64) -> Option<Vec<u64>> {
    let task = |name| types.member("task_struct", name);
    let number = types.member("pid", "numbers")?;
    let number = number.checked_add(NUMBER_BYTES.checked_mul(i16::try_from(level).ok()?)?)?;
    let number = number.checked_add(types.member("upid", "nr")?)?;
    let register = |name| {
        Some(vec![
            instruction(MOVE, R1, ELEMENT, 0, 0),
            instruction(CALL, 0, 0, 0, TASK_REGISTERS),
            instruction(MOVE_NUMBER, R1, 0, 0, 0),
            // As far as the kernel's own checks know there may be none.
            instruction(JUMP_IF_ZERO, R0, 0, 1, 0),
            load_word(R1, R0, types.member("pt_regs", name)?),
        ])
    };
    let loads = [
        vec![
            load_word(R2, ELEMENT, task("thread_pid")?),
            load_half(R1, R2, number),
        ],
        vec![load_half(R1, ELEMENT, task("__state")?)],
        vec![load_half(R1, ELEMENT, task("saved_state")?)],
        vec![load_half(R1, ELEMENT, task("exit_state")?)],
        vec![load_word(R1, ELEMENT, task("jobctl")?)],
        register("orig_ax")?,
        register("ax")?,
    ];
    let copies = loads.into_iter().enumerate();
    let copies: Option<Vec<_>> = copies
        .map(|(index, loads)| put(WORDS, index, loads))
        .collect();
    program(types, CONTEXT_TYPE, "task", &copies?)
}

const ITERATOR: &str = "bpf_iter_task";
const CONTEXT_TYPE: &str = "bpf_iter__task";
const WORDS: usize = 7;
/// As many as there can be on one node (`PID_MAX_LIMIT`).
const THREADS_MAX: usize = 4 << 20;
/// Bytes of `struct upid`: a number, and the namespace it is in.
const NUMBER_BYTES: i16 = 16;
/// `bpf_task_pt_regs`, of Linux 5.15.
const TASK_REGISTERS: i32 = 175;
/// `JOBCTL_STOPPED`.
const STOPPED: u64 = 1 << 26;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::probe::{KERNEL_TYPES, kernel_types};
    use crate::track::tests::{eventually, start};

    #[test]
    fn the_iterator_tells_of_the_calls_that_proc_tells_of() {
        if !std::path::Path::new(KERNEL_TYPES).exists() {
            eprintln!("this kernel does not tell its types");
            return;
        }
        let probe = Calls::load(&kernel_types().unwrap()).unwrap();
        let mut trial = start();
        trial.tell("threads 40");
        for call in ["epoll", "read", "nanosleep"] {
            trial.tell(&format!("block {call}"));
        }
        let told = || {
            let mut told = Vec::new();
            for tid in task::threads(trial.pid()).unwrap() {
                let text = std::fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap();
                let call = text.split(' ').next().unwrap().trim().parse::<i64>();
                told.push((tid, call.ok()));
            }
            told.sort_unstable();
            told
        };
        let known = || {
            let places = probe.of(trial.pid()).unwrap();
            let call = |place: &Place| (place.state != 0).then_some(place.call);
            let mut known: Vec<_> = places
                .iter()
                .map(|place| (place.tid, call(place)))
                .collect();
            known.sort_unstable();
            known
        };
        let calls = [
            libc::SYS_epoll_wait,
            libc::SYS_read,
            libc::SYS_clock_nanosleep,
        ];
        eventually("the calls", || {
            let told = told();
            calls
                .iter()
                .all(|call| told.iter().any(|(_, told)| told == &Some(*call)))
                && told == known()
        });
        assert!(42 < known().len());
    }
}
