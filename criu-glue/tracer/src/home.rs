//! What a thread was before CRIU began to use it, and the way back there.
//!
//! CRIU runs system calls and code of its own in the threads it dumps: with foreign registers, with
//! signals blocked, with eight bytes of the program's code replaced. All of it goes through the
//! tracer, which remembers the first of each.

use crate::kernel::{self, Registers};

/// Registers and signal mask a thread came with.
#[derive(Clone, Debug)]
pub struct Home {
    registers: Registers,
    mask: u64,
    extended: Vec<u8>,
}

impl Home {
    /// Of a stopped thread; `None` if it is not, or the kernel does not tell.
    pub fn of(tid: i32) -> Option<Self> {
        Some(Self {
            registers: kernel::registers(tid)?,
            mask: kernel::mask(tid)?,
            extended: kernel::extended(tid)?,
        })
    }

    pub fn has_registers(&self, registers: &Registers) -> bool {
        let now = words(*registers);
        now == words(self.registers) || now == words(restarted(self.registers))
    }

    pub fn has_mask(&self, mask: u64) -> bool {
        mask == self.mask
    }

    /// Puts everything back. `restarts`: the kernel will see to an interrupted system call when the
    /// thread goes on, which it does after every stop but those at system calls.
    pub fn put_back(&mut self, tid: i32, restarts: bool) -> bool {
        let registers = if restarts {
            self.registers
        } else {
            restarted(self.registers)
        };
        let done = [
            kernel::set_registers(tid, registers),
            kernel::set_extended(tid, &mut self.extended),
            kernel::set_mask(tid, self.mask),
        ];
        done == [true; 3]
    }

    /// Registers with which the thread makes a system call of ours at `address`.
    pub fn calling(&self, address: u64, number: i64, arguments: [u64; 2]) -> Registers {
        Registers {
            rip: address,
            rax: number.cast_unsigned(),
            rdi: arguments[0],
            rsi: arguments[1],
            // In no system call yet: nothing to restart.
            orig_rax: u64::MAX,
            ..self.registers
        }
    }
}

/// The registers as what they are: numbers.
fn words(registers: Registers) -> [u64; 27] {
    // SAFETY: a C struct of 27 unsigned longs.
    unsafe { std::mem::transmute(registers) }
}

/// What the kernel makes of registers with an interrupted system call in them: it is called again.
/// `ERESTART_RESTARTBLOCK` needs the kernel's own memory of it, and becomes `EINTR` as in CRIU.
fn restarted(registers: Registers) -> Registers {
    if registers.orig_rax.cast_signed() < 0 {
        return registers;
    }
    match -registers.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Registers {
            rax: registers.orig_rax,
            rip: registers.rip.wrapping_sub(SYSCALL_BYTES),
            ..registers
        },
        ERESTART_RESTARTBLOCK => Registers {
            rax: (-i64::from(libc::EINTR)).cast_unsigned(),
            ..registers
        },
        _ => registers,
    }
}

// From include/linux/errno.h.
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
/// Of the instruction `syscall`.
const SYSCALL_BYTES: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(call: i64, result: i64) -> Registers {
        // SAFETY: all integers, for which zero is a value.
        let zero: Registers = unsafe { std::mem::zeroed() };
        Registers {
            orig_rax: call.cast_unsigned(),
            rax: result.cast_unsigned(),
            rip: 0x1002,
            ..zero
        }
    }

    #[test]
    fn an_interrupted_call_is_made_again() {
        let mended = restarted(registers(libc::SYS_futex, -ERESTARTSYS));
        assert_eq!(
            (mended.rax.cast_signed(), mended.rip),
            (libc::SYS_futex, 0x1000)
        );
        let mended = restarted(registers(libc::SYS_nanosleep, -ERESTART_RESTARTBLOCK));
        assert_eq!(mended.rax.cast_signed(), -i64::from(libc::EINTR));
        for finished in [registers(libc::SYS_read, 5), registers(-1, -ERESTARTSYS)] {
            assert_eq!(words(restarted(finished)), words(finished));
        }
    }

    #[test]
    fn both_forms_of_the_same_registers_are_home() {
        let home = Home {
            registers: registers(libc::SYS_futex, -ERESTARTSYS),
            mask: 4,
            extended: Vec::new(),
        };
        assert!(home.has_registers(&home.registers));
        assert!(home.has_registers(&restarted(home.registers)));
        let away = home.calling(0x4000, libc::SYS_munmap, [1, 2]);
        assert!(!home.has_registers(&away));
        assert!(home.has_mask(4) && !home.has_mask(5));
    }
}
