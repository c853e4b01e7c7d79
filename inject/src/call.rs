//! Making a stopped thread call the kernel, and giving it back as it was.

use std::io;
use std::time::{Duration, Instant};

use pageferry_sys::process_vm::{self, RemoteRun};
use pageferry_sys::ptrace::{self, Registers, Resume, Stop};
use pageferry_sys::task;

use crate::stop::{Held, pause};
use crate::{InjectError, restart};

/// A stopped thread whose registers and signal mask are ours for a moment.
///
/// [`give_back`](Self::give_back) must be called; dropping gives back too, without telling whether
/// it worked.
#[derive(Debug)]
pub struct Borrowed<'a> {
    held: &'a mut Held,
    registers: Registers,
    mask: u64,
    gadget: u64,
    /// Where it stands: false when it must be brought back to a stop on its way to user mode.
    at_trap: bool,
    given_back: bool,
}

impl<'a> Borrowed<'a> {
    /// Takes a thread that stands still on its way to user mode.
    pub(crate) fn take(held: &'a mut Held, gadget: u64) -> Result<Self, InjectError> {
        let tid = held.tid;
        let mut registers = ptrace::registers(tid).map_err(tracing(tid, "read registers of"))?;
        if registers.cs != CODE_SEGMENT_64 {
            return Err(InjectError::Unfit {
                tid,
                why: "runs 32-bit code",
            });
        }
        if ptrace::dispatches_syscalls(tid) {
            return Err(InjectError::Unfit {
                tid,
                why: "dispatches its own system calls",
            });
        }
        let status = task::Status::read(tid).map_err(|source| InjectError::Inspect {
            tid,
            what: "the status",
            source,
        })?;
        if status.seccomp {
            ptrace::suspend_seccomp(tid, held.end).map_err(tracing(tid, "suspend seccomp of"))?;
        }
        restart::mend_registers(&mut registers);
        abort_restartable_sequence(held.process, tid, &mut registers);
        let mask = ptrace::signal_mask(tid).map_err(tracing(tid, "read the signal mask of"))?;
        let borrowed = Self {
            held,
            registers,
            mask,
            gadget,
            at_trap: true,
            given_back: false,
        };
        ptrace::set_signal_mask(tid, u64::MAX).map_err(tracing(tid, "block signals of"))?;
        Ok(borrowed)
    }

    /// Its id.
    pub fn tid(&self) -> i32 {
        self.held.tid
    }

    /// Makes the thread call the kernel with up to three arguments; returns the result.
    pub fn call(
        &mut self,
        name: &'static str,
        number: i64,
        arguments: [u64; 3],
    ) -> Result<u64, InjectError> {
        let tid = self.held.tid;
        let mut registers = self.registers;
        registers.rip = self.gadget;
        registers.rax = number.cast_unsigned();
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        // Not in a system call: what is in rax is no result for the kernel to restart by.
        registers.orig_rax = u64::MAX;
        ptrace::set_registers(tid, &registers).map_err(tracing(tid, "set registers of"))?;
        self.run_to_syscall_stop()?;
        self.run_to_syscall_stop()?;
        let after = ptrace::registers(tid).map_err(tracing(tid, "read registers of"))?;
        if after.rip != self.gadget + SYSCALL_BYTES || after.orig_rax != number.cast_unsigned() {
            return Err(InjectError::Unfit {
                tid,
                why: "was elsewhere than it was sent",
            });
        }
        let result = after.rax.cast_signed();
        if (-ERRNO_MAX..0).contains(&result) {
            let errno = i32::try_from(-result).expect("bounded by ERRNO_MAX");
            let source = io::Error::from_raw_os_error(errno);
            return Err(InjectError::Call {
                tid,
                call: name,
                source,
            });
        }
        Ok(after.rax)
    }

    /// The same with `bytes` in its memory, whose address is the third argument. They lie for that
    /// time where the thread keeps what it needs, at the top of its stack: below it there may be no
    /// memory, or another's.
    pub fn call_with(
        &mut self,
        name: &'static str,
        number: i64,
        [first, second]: [u64; 2],
        bytes: &[u8],
    ) -> Result<u64, InjectError> {
        let (process, tid, address) = (self.held.process, self.held.tid, self.registers.rsp);
        let memory = |source| InjectError::Memory { tid, source };
        let mut kept = vec![0; bytes.len()];
        let len = bytes.len();
        let read = process_vm::read(process, &[RemoteRun { address, len }], &mut kept);
        if read.map_err(memory)? < len {
            return Err(memory(io::Error::from_raw_os_error(libc::EFAULT)));
        }
        process_vm::write(process, address, bytes).map_err(memory)?;
        let result = self.call(name, number, [first, second, address]);
        process_vm::write(process, address, &kept).map_err(memory)?;
        result
    }

    /// The calls do not block, so all they take is a turn on a processor; a thread that gets none
    /// would not run without us either.
    fn run_to_syscall_stop(&mut self) -> Result<(), InjectError> {
        let tid = self.held.tid;
        let deadline = Instant::now() + CALL_MAX;
        let mut signal = 0;
        loop {
            self.at_trap = false;
            ptrace::resume(tid, Resume::ToSyscall, signal).map_err(tracing(tid, "resume"))?;
            signal = match self.wait(Some(deadline))? {
                Stop::Syscall => return Ok(()),
                // A group stop. It cannot be blocked; it holds again when the thread is let go.
                Stop::Signal(libc::SIGSTOP) => libc::SIGSTOP,
                Stop::Trap | Stop::Event(_) => 0,
                Stop::Signal(signal) => return Err(InjectError::Interfered { tid, signal }),
                Stop::Ended => return Err(InjectError::Ended { tid }),
            };
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<Stop, InjectError> {
        let tid = self.held.tid;
        let mut idle = 0;
        loop {
            match ptrace::poll(tid) {
                Ok(Some(stop)) => return Ok(stop),
                Ok(None) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    return Err(InjectError::Stuck { tid });
                }
                Ok(None) => pause(&mut idle),
                Err(source) => {
                    return Err(InjectError::Trace {
                        tid,
                        what: "wait for",
                        source,
                    });
                }
            }
        }
    }

    /// Puts registers and mask back, with the thread on its way to user mode, so that the kernel
    /// restarts the call it was in.
    pub(crate) fn give_back(mut self) -> Result<(), InjectError> {
        self.restore()
    }

    fn restore(&mut self) -> Result<(), InjectError> {
        self.given_back = true;
        let tid = self.held.tid;
        if !self.at_trap {
            self.settle()?;
        }
        ptrace::set_registers(tid, &self.registers).map_err(tracing(tid, "restore"))?;
        ptrace::set_signal_mask(tid, self.mask).map_err(tracing(tid, "restore signals of"))
    }

    /// From a stop at a system call to one on the way to user mode: only there are restart codes
    /// looked at.
    fn settle(&mut self) -> Result<(), InjectError> {
        let tid = self.held.tid;
        ptrace::interrupt(tid).map_err(tracing(tid, "interrupt"))?;
        let mut signal = 0;
        loop {
            // Fails with ESRCH while the thread runs, which it may after an error above.
            let resumed = ptrace::resume(tid, Resume::Freely, signal);
            // Without a limit: let go with our registers the thread would run into nowhere, and its
            // process would die. It stands still or is about to, or it has been killed.
            match self.wait(None) {
                Ok(Stop::Trap) => break,
                Ok(Stop::Signal(libc::SIGSTOP)) => signal = libc::SIGSTOP,
                Ok(Stop::Ended) => return Err(InjectError::Ended { tid }),
                Ok(Stop::Signal(_) | Stop::Syscall | Stop::Event(_)) => signal = 0,
                Err(error) => {
                    resumed.map_err(tracing(tid, "resume"))?;
                    return Err(error);
                }
            }
        }
        self.at_trap = true;
        Ok(())
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if !self.given_back {
            // The error that led here is the one worth telling.
            let _ = self.restore();
        }
    }
}

/// Sends a thread that is inside a restartable sequence to its abort handler, as a preemption does.
/// Without this the kernel would look for the sequence at the place of our call, not find it, and
/// let the thread finish a sequence that was in fact interrupted.
fn abort_restartable_sequence(pid: i32, tid: i32, registers: &mut Registers) {
    let Some(rseq) = ptrace::rseq_address(tid) else {
        return;
    };
    // struct rseq: cpu_id_start and cpu_id, u32 each, then the address of the sequence.
    let Some(sequence) = read_u64(pid, rseq + 8).filter(|&address| address != 0) else {
        return;
    };
    // struct rseq_cs: version and flags, u32 each, then start, length, abort address.
    let field = |index: u64| read_u64(pid, sequence + 8 * index);
    if let (Some(start), Some(len), Some(abort)) = (field(1), field(2), field(3))
        && registers.rip.wrapping_sub(start) < len
    {
        registers.rip = abort;
    }
}

fn read_u64(pid: i32, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let run = RemoteRun {
        address,
        len: bytes.len(),
    };
    let read = process_vm::read(pid, &[run], &mut bytes).ok()?;
    (read == bytes.len()).then_some(u64::from_ne_bytes(bytes))
}

fn tracing(tid: i32, what: &'static str) -> impl FnOnce(io::Error) -> InjectError {
    move |source| InjectError::Trace { tid, what, source }
}

/// Selector of the 64-bit user code segment (`__USER_CS` of x86-64).
const CODE_SEGMENT_64: u64 = 0x33;

/// Length of the `syscall` instruction.
const SYSCALL_BYTES: u64 = 2;

/// Results from `-ERRNO_MAX` to -1 are errors (`MAX_ERRNO`).
const ERRNO_MAX: i64 = 4095;

/// How long a thread may take to get its turn on a processor.
const CALL_MAX: Duration = Duration::from_secs(10);
