//! One thread that CRIU holds, and how it is let go when CRIU is no more.
//!
//! ```text
//! clean ── registers, mask or code changed ──► away ── all of them back ──► clean
//! ```
//!
//! When CRIU ends, a clean thread is simply let go. One that is away is brought home first. The
//! first thread of a process may be deep in CRIU's parasite: that cures itself when its socket
//! closes, and is accompanied until it has. What was mapped or opened in the process for CRIU is
//! taken away at last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::home::Home;
use crate::kernel::{self, Registers, Stop};
use crate::section::Section;

/// A traced thread.
#[derive(Debug, Default)]
pub struct Tracee {
    /// Set while it is away.
    home: Option<Home>,
    /// It was asked to stop, and nobody has heard yet that it has.
    is_interrupted: bool,
    registers_away: bool,
    mask_away: bool,
    /// Code that is replaced, by address.
    code: BTreeMap<u64, u64>,
    /// Where CRIU puts its system call instruction.
    gadget: Option<u64>,
    /// It was sent off to the parasite, not to a single system call.
    in_parasite: bool,
    /// `None` while it runs.
    stop: Option<Stop>,
    /// The system call its registers are set for, with the first two arguments.
    called_next: Option<(i64, [u64; 2])>,
    /// The one it was sent off to make.
    calling: Option<(i64, [u64; 2])>,
    left: Leftovers,
    section: Option<Section>,
    /// Signals that it was stopped for and has not got.
    owed: Vec<i32>,
}

/// What CRIU's own calls left in the process: mappings with their lengths, and descriptors.
#[derive(Debug, Default)]
struct Leftovers {
    mappings: BTreeMap<u64, u64>,
    descriptors: Vec<u64>,
}

impl Tracee {
    /// Thread `tid` has stopped; `known` is what was collected of it.
    pub fn stopped(&mut self, tid: i32, stop: Stop, known: &[u8]) {
        self.stop = Some(stop);
        self.is_interrupted = false;
        if self.is_home() {
            self.section = Section::of(tid, known);
        }
    }

    /// Whether its registers and its mask are its own.
    pub fn is_home(&self) -> bool {
        self.home.is_none()
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.is_some()
    }

    /// It was asked to stop.
    pub fn interrupted(&mut self) {
        self.is_interrupted = !self.is_stopped();
    }

    /// Whether CRIU is going to wait for its stop.
    pub fn is_expected(&self) -> bool {
        self.is_interrupted
    }

    /// Whether thread `tid` was sent off for microseconds, to one system call or one command.
    pub fn is_on_errand(&self, tid: i32) -> bool {
        !self.is_stopped() && !self.is_home() && !self.serves_in_parasite(tid)
    }

    /// Whether it answers CRIU in the parasite, and may end there.
    pub fn serves(&self, tid: i32) -> bool {
        !self.is_stopped() && self.serves_in_parasite(tid)
    }

    pub fn resumed(&mut self) {
        self.stop = None;
        self.calling = self.called_next.take();
    }

    /// To be called before anything of the stopped thread `tid` is changed.
    pub fn leaves(&mut self, tid: i32) {
        if self.home.is_none() {
            self.home = Home::of(tid);
        }
    }

    /// Registers were set.
    pub fn has_registers(&mut self, registers: &Registers) {
        let Some(home) = &self.home else { return };
        self.registers_away = !home.has_registers(registers);
        self.called_next = None;
        if self.registers_away {
            let calls = self.gadget == Some(registers.rip) && !self.code.is_empty();
            let call = (registers.rax.cast_signed(), [registers.rdi, registers.rsi]);
            self.called_next = calls.then_some(call);
            self.in_parasite = !calls;
        }
        self.settle();
    }

    /// The signal mask was set.
    pub fn has_mask(&mut self, mask: u64) {
        let Some(home) = &self.home else { return };
        self.mask_away = !home.has_mask(mask);
        self.settle();
    }

    /// `word` replaced `before` at `address`.
    pub fn has_word(&mut self, address: u64, before: u64, word: u64) {
        let original = *self.code.entry(address).or_insert(before);
        if original == word {
            self.code.remove(&address);
        }
        if word.to_le_bytes().starts_with(&SYSCALL) {
            self.gadget = Some(address);
        }
    }

    /// It has stopped: its registers have the result of the call that was made, if one was.
    pub fn shows(&mut self, registers: impl FnOnce() -> Option<Registers>) {
        if let Some((number, arguments)) = self.calling.take()
            && let Some(registers) = registers()
        {
            self.left
                .add(number, arguments, registers.rax.cast_signed());
        }
    }

    fn settle(&mut self) {
        if !self.registers_away && !self.mask_away {
            self.home = None;
            self.in_parasite = false;
        }
    }

    /// Stops thread `tid` if it serves CRIU in the parasite: it must not leave that unseen.
    pub fn hold(&mut self, tid: i32) {
        if self.serves(tid) {
            kernel::ptrace(kernel::INTERRUPT, tid, 0, 0);
            self.stop = kernel::next_stop(tid, CALL_TIME_MAX);
        }
    }

    /// To be called before the stopped thread `tid` is let go, at home. False if a restartable
    /// sequence may go on in its middle.
    pub fn begins_section_anew(&mut self, tid: i32) -> bool {
        let section = self.section.take();
        section.is_none_or(|section| section.put_back(tid))
    }

    /// Sends the stopped thread `tid` the signals it was kept from, for when it is let go.
    pub fn send_owed(&mut self, tid: i32) {
        if let Some(Stop::Signal(signal)) = self.stop {
            self.owed.push(signal);
        }
        for signal in self.owed.drain(..) {
            kernel::send(tid, signal);
        }
    }

    /// Lets it go on by `request`; a signal it was stopped for has to wait.
    fn go_on(&mut self, tid: i32, request: u32) -> bool {
        if let Some(Stop::Signal(signal)) = self.stop.take() {
            self.owed.push(signal);
        }
        kernel::ptrace(request, tid, 0, 0) >= 0
    }

    /// Brings thread `tid` home; it stays stopped. False if that could not be done within the time.
    pub fn come_home(&mut self, tid: i32) -> bool {
        if self.serves_in_parasite(tid) {
            self.accompany(tid)
        } else {
            self.bring_home(tid)
        }
    }

    /// Other threads, and the first one at times, run a single command and end in a trap.
    fn serves_in_parasite(&self, tid: i32) -> bool {
        self.in_parasite && self.code.is_empty() && kernel::is_first_thread(tid)
    }

    /// A thread that runs is waited for: it comes to the end of what it was sent to do.
    fn bring_home(&mut self, tid: i32) -> bool {
        if self.home.is_none() && self.code.is_empty() {
            return true;
        }
        let stop = match self.stop {
            Some(stop) => Some(stop),
            None => kernel::next_stop(tid, CALL_TIME_MAX).or_else(|| {
                kernel::ptrace(kernel::INTERRUPT, tid, 0, 0);
                kernel::next_stop(tid, CALL_TIME_MAX)
            }),
        };
        let Some(stop) = stop.filter(|stop| *stop != Stop::Ended) else {
            return stop == Some(Stop::Ended);
        };
        self.stop = Some(stop);
        self.shows(|| kernel::registers(tid));
        let code = std::mem::take(&mut self.code);
        let whole = code
            .into_iter()
            .all(|(address, word)| kernel::set_word(tid, address, word));
        let home = self.home.take();
        whole && home.is_none_or(|mut home| home.put_back(tid, stop != Stop::Syscall))
    }

    /// Follows the first thread until it has left the parasite, which restores it by
    /// `rt_sigreturn`.
    fn accompany(&mut self, tid: i32) -> bool {
        let deadline = Instant::now() + CURE_TIME_MAX;
        loop {
            let stop = self.stop.or_else(|| {
                let left = deadline.saturating_duration_since(Instant::now());
                kernel::next_stop(tid, left)
            });
            match stop {
                None => return false,
                Some(Stop::Ended) => return true,
                Some(_) => self.stop = stop,
            }
            let Some(registers) = kernel::registers(tid) else {
                return false;
            };
            if !self.left.contain(registers.rip) {
                self.home = None;
                return true;
            }
            if !self.go_on(tid, kernel::SYSCALL) {
                return false;
            }
        }
    }

    /// Takes away what CRIU's calls left behind. Not before all threads of the process are home:
    /// one of them may run in what is taken away.
    pub fn clean_up(&mut self, tid: i32) -> bool {
        let left = std::mem::take(&mut self.left);
        let mappings = left.mappings.into_iter();
        let unmap = mappings.map(|(start, length)| (libc::SYS_munmap, [start, length]));
        let close = left.descriptors.into_iter();
        let close = close.map(|descriptor| (libc::SYS_close, [descriptor, 0]));
        unmap
            .chain(close)
            .all(|(number, arguments)| self.call(tid, number, arguments))
    }

    /// Has the stopped thread make one system call, as CRIU would.
    fn call(&mut self, tid: i32, number: i64, arguments: [u64; 2]) -> bool {
        let stop = match self.stop {
            Some(stop) => stop,
            // It was not stopped when CRIU ended, and is in its own code.
            None => {
                kernel::ptrace(kernel::INTERRUPT, tid, 0, 0);
                match kernel::next_stop(tid, CALL_TIME_MAX) {
                    Some(Stop::Ended) => return true,
                    Some(stop) => stop,
                    None => return false,
                }
            }
        };
        self.stop = Some(stop);
        let Some(gadget) = self.gadget else {
            return false;
        };
        let (Some(mut home), Some(code)) = (Home::of(tid), kernel::word(tid, gadget)) else {
            return false;
        };
        let sent = kernel::set_word(tid, gadget, SYSCALL_AND_TRAP)
            && kernel::set_mask(tid, !kernel::mask_of(&[libc::SIGTRAP]))
            && kernel::set_registers(tid, home.calling(gadget, number, arguments));
        let result = if sent { self.run(tid, gadget) } else { None };
        if self.stop.is_none() {
            // It is away for too long, and must not go on from there by itself.
            kernel::ptrace(kernel::INTERRUPT, tid, 0, 0);
            self.stop = kernel::next_stop(tid, CALL_TIME_MAX);
        }
        let whole = kernel::set_word(tid, gadget, code);
        let back = home.put_back(tid, stop != Stop::Syscall);
        whole && back && result == Some(0)
    }

    /// Lets a thread that is set for a system call at `gadget` make it; its result.
    fn run(&mut self, tid: i32, gadget: u64) -> Option<u64> {
        for _ in 0..STOPS_MAX {
            if !self.go_on(tid, kernel::CONT) {
                return None;
            }
            self.stop = kernel::next_stop(tid, CURE_TIME_MAX);
            self.stop.filter(|stop| *stop != Stop::Ended)?;
            let registers = kernel::registers(tid)?;
            // An interruption that was asked for earlier comes first.
            if registers.rip != gadget {
                return Some(registers.rax);
            }
        }
        None
    }
}

impl Leftovers {
    fn contain(&self, address: u64) -> bool {
        let below = self.mappings.range(..=address).next_back();
        below.is_some_and(|(start, length)| address - start < *length)
    }

    fn add(&mut self, number: i64, arguments: [u64; 2], result: i64) {
        let Ok(result) = u64::try_from(result) else {
            return;
        };
        match number {
            libc::SYS_mmap => {
                self.mappings.insert(result, arguments[1]);
            }
            libc::SYS_munmap => {
                self.mappings.remove(&arguments[0]);
            }
            libc::SYS_memfd_create => self.descriptors.push(result),
            libc::SYS_close => self.descriptors.retain(|open| *open != arguments[0]),
            _ => {}
        }
    }
}

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The same, and `int3` behind it.
const SYSCALL_AND_TRAP: u64 = u64::from_le_bytes([0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc]);

/// For a system call or a command of the parasite, which take microseconds, on a busy machine.
const CALL_TIME_MAX: Duration = Duration::from_secs(2);

/// How often a thread may stop before it makes a call, for what came before.
const STOPS_MAX: usize = 8;

/// For the parasite to notice that nobody speaks to it any more, and to cure itself.
const CURE_TIME_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_and_not_taken_away_is_left() {
        let mut left = Leftovers::default();
        left.add(libc::SYS_memfd_create, [0, 0], 7);
        left.add(libc::SYS_mmap, [0, 4096], 0x10000);
        left.add(libc::SYS_mmap, [0, 4096], -12);
        assert_eq!((left.mappings.len(), left.descriptors.len()), (1, 1));
        assert!(left.contain(0x10000) && left.contain(0x10fff));
        assert!(!left.contain(0xffff) && !left.contain(0x11000));
        left.add(libc::SYS_close, [7, 0], 0);
        left.add(libc::SYS_munmap, [0x10000, 4096], -22);
        assert_eq!((left.mappings.len(), left.descriptors.len()), (1, 0));
        left.add(libc::SYS_munmap, [0x10000, 4096], 0);
        assert!(left.mappings.is_empty());
    }

    #[test]
    fn code_is_remembered_as_it_was_first() {
        let mut tracee = Tracee::default();
        let instruction = u64::from_le_bytes([0x0f, 0x05, 0xcc, 0, 0, 0, 0, 0]);
        tracee.has_word(0x1000, 1, instruction);
        tracee.has_word(0x1000, instruction, 3);
        assert_eq!(tracee.code.get(&0x1000), Some(&1));
        assert_eq!(tracee.gadget, Some(0x1000));
        tracee.has_word(0x1000, 3, 1);
        assert!(tracee.code.is_empty());
    }
}
