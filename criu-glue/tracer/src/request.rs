//! What the requests of `ptrace(2)` mean for the memory of whoever makes them, and which of them
//! are answered without the tracer.

use std::ptr;

use crate::ahead::Peeked;
use crate::channel::{BUFFER_BYTES, Call, PEEK_BYTES, Shape};
use crate::{kernel, known};

/// What is known already, or can be had without being the tracer.
pub fn answer_at_once(
    known: &mut Vec<u8>,
    (request, pid, address, data): (u32, i32, u64, u64),
) -> Option<i64> {
    if request == kernel::PEEKDATA {
        return kernel::peek(pid, address).map(u64::cast_signed);
    }
    if request != kernel::INTERRUPT && !keeps_known(request, data) {
        return None;
    }
    let passed = passed(request, address, data)?;
    let key = match request {
        kernel::GETSIGINFO | kernel::GETFPREGS | kernel::INTERRUPT => 0,
        // SAFETY: the caller passes a `ptrace_peeksiginfo_args`.
        kernel::PEEKSIGINFO => Peeked::kind(unsafe { &*(address as *const [u8; PEEK_BYTES]) })?,
        _ => address,
    };
    let (result, bytes) = known::find(known, request, key)?;
    let whole = match passed.shape {
        Shape::Vector => usize::try_from(result).ok()?.min(passed.length),
        _ => bytes.len(),
    };
    if passed.length < whole || !passed.length.is_multiple_of(REGISTER_BYTES) {
        return None;
    }
    let told = &bytes[..bytes.len().min(whole)];
    if 0 < whole {
        // SAFETY: the caller has room for what this request tells, and that is no more.
        let place = unsafe { std::slice::from_raw_parts_mut(passed.at, whole) };
        place[..told.len()].copy_from_slice(told);
        place[told.len()..].fill(0);
    }
    if passed.shape == Shape::Vector {
        let vector = data as *mut libc::iovec;
        // SAFETY: the caller passes an iovec with this shape.
        unsafe { (*vector).iov_len = whole };
        return Some(0);
    }
    // What may change by itself is told once.
    if matches!(request, kernel::INTERRUPT | kernel::PEEKSIGINFO) {
        known::forget(known, request, key);
    }
    Some(result)
}

/// Whether what is known of a thread is true after the request, too.
pub fn keeps_known(request: u32, data: u64) -> bool {
    let reads_shadow_stack = request == kernel::ARCH_PRCTL && data == ARCH_SHSTK_STATUS;
    reads_shadow_stack
        || matches!(
            request,
            kernel::PEEKTEXT
                | kernel::PEEKDATA
                | kernel::PEEKUSER
                | kernel::GETREGSET
                | kernel::GETFPREGS
                | kernel::GETSIGINFO
                | kernel::GETSIGMASK
                | kernel::GETEVENTMSG
                | kernel::GET_THREAD_AREA
                | kernel::PEEKSIGINFO
                | kernel::SECCOMP_GET_FILTER
                | kernel::SECCOMP_GET_METADATA
                | kernel::GET_RSEQ_CONFIGURATION
                | kernel::GET_SYSCALL_USER_DISPATCH_CONFIG
                | kernel::SETOPTIONS
        )
}

/// What of the caller's memory goes to the tracer and back.
pub struct Passed {
    pub shape: Shape,
    pub at: *mut u8,
    pub length: usize,
}

/// Copies to the caller what the kernel told.
pub fn take_back(request: u32, passed: &Passed, call: &Call, data: u64) {
    let records = usize::try_from(call.result).unwrap_or_default();
    let (from, length) = match (passed.shape, request) {
        (Shape::Plain, _) => return,
        (Shape::Both, _) => (PEEK_BYTES, records * kernel::SIGINFO_BYTES),
        (_, kernel::SECCOMP_GET_FILTER) => (0, records * FILTER_BYTES),
        (Shape::Vector, _) => (0, call.length.min(passed.length)),
        _ => (0, passed.length),
    };
    let Some(bytes) = call.buffer.get(from..from + length) else {
        return;
    };
    if !passed.at.is_null() {
        // SAFETY: the caller has room for what this request tells.
        unsafe { ptr::copy(bytes.as_ptr(), passed.at, bytes.len()) };
    }
    if passed.shape == Shape::Vector {
        let vector = data as *mut libc::iovec;
        // SAFETY: the caller passes an iovec with this shape.
        unsafe { (*vector).iov_len = call.length };
    }
}

/// `None` for a request nobody makes of a tracee, or one with more than there is room for.
pub fn passed(request: u32, address: u64, data: u64) -> Option<Passed> {
    let at = |shape, at: u64, length: usize| Passed {
        shape,
        at: at as *mut u8,
        length,
    };
    let sized = usize::try_from(address).unwrap_or(usize::MAX);
    let passed = match request {
        kernel::POKEDATA
        | kernel::POKEUSER
        | kernel::CONT
        | kernel::DETACH
        | kernel::SYSCALL
        | kernel::SETOPTIONS
        | kernel::SEIZE
        | kernel::INTERRUPT => at(Shape::Plain, 0, 0),
        kernel::PEEKTEXT | kernel::PEEKDATA | kernel::PEEKUSER => at(Shape::Data, 0, 8),
        kernel::GETFPREGS | kernel::SETFPREGS => at(Shape::Data, data, 512),
        kernel::GET_THREAD_AREA => at(Shape::Data, data, 16),
        kernel::GETEVENTMSG => at(Shape::Data, data, 8),
        kernel::GETSIGINFO => at(Shape::Data, data, kernel::SIGINFO_BYTES),
        kernel::GETSIGMASK
        | kernel::SETSIGMASK
        | kernel::SECCOMP_GET_METADATA
        | kernel::GET_RSEQ_CONFIGURATION
        | kernel::GET_SYSCALL_USER_DISPATCH_CONFIG => at(Shape::Data, data, sized),
        // Without a place for it, only its length is asked for.
        kernel::SECCOMP_GET_FILTER if data == 0 => at(Shape::Plain, 0, 0),
        kernel::SECCOMP_GET_FILTER => Passed {
            shape: Shape::Data,
            at: data as *mut u8,
            length: 0,
        },
        // The place for the answer comes first in this one.
        kernel::ARCH_PRCTL => at(Shape::Address, address, 8),
        kernel::GETREGSET | kernel::SETREGSET => {
            // SAFETY: the caller passes an iovec with these.
            let vector = unsafe { &*(data as *const libc::iovec) };
            at(Shape::Vector, vector.iov_base as u64, vector.iov_len)
        }
        kernel::PEEKSIGINFO => {
            // SAFETY: the caller passes a `ptrace_peeksiginfo_args`: u64, u32, and the number.
            let wanted = unsafe { ((address + 12) as *const i32).read_unaligned() };
            let length = usize::try_from(wanted)
                .ok()?
                .checked_mul(kernel::SIGINFO_BYTES)?;
            at(Shape::Both, data, PEEK_BYTES.checked_add(length)?)
        }
        _ => return None,
    };
    (passed.length <= BUFFER_BYTES).then_some(passed)
}

/// The kernel writes the word where `data` points; the C library returns it.
pub fn tells_a_word(request: u32) -> bool {
    matches!(
        request,
        kernel::PEEKTEXT | kernel::PEEKDATA | kernel::PEEKUSER
    )
}

/// From arch/x86/include/uapi/asm/prctl.h.
const ARCH_SHSTK_STATUS: u64 = 0x5005;

/// Of the registers in every set of them, on x86-64.
const REGISTER_BYTES: usize = 8;

/// `sizeof(struct sock_filter)`.
const FILTER_BYTES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for 64 bytes of registers; what the answer says, its length and its bytes.
    fn registers(known: &mut Vec<u8>) -> (Option<i64>, usize, [u8; 64]) {
        let mut place = [0xff; 64];
        let mut vector = libc::iovec {
            iov_base: place.as_mut_ptr().cast(),
            iov_len: place.len(),
        };
        let call = (kernel::GETREGSET, 1, 5, (&raw mut vector) as u64);
        (answer_at_once(known, call), vector.iov_len, place)
    }

    #[test]
    fn registers_that_are_not_told_are_zeros() {
        let mut buffer = [0; 128];
        let length = known::append(&mut buffer, kernel::GETREGSET, 5, 24, b"told");
        let (result, told, place) = registers(&mut buffer[..length].to_vec());
        assert_eq!((result, told), (Some(0), 24));
        assert_eq!((&place[..4], &place[4..24]), (&b"told"[..], &[0; 20][..]));
        assert_eq!(place[24..], [0xff; 40], "not the caller's rest");
        // More than there is room for is cut, as the kernel does.
        let length = known::append(&mut buffer, kernel::GETREGSET, 5, 80, &[7; 80]);
        let (result, told, place) = registers(&mut buffer[..length].to_vec());
        assert_eq!((result, told, place), (Some(0), 64, [7; 64]));
    }

    #[test]
    fn what_was_done_ahead_is_answered_once_with_its_own_result() {
        let mut buffer = [0; 64];
        let failed = -i64::from(libc::ESRCH);
        let length = known::append(&mut buffer, kernel::INTERRUPT, 0, failed, &[]);
        let known = &mut buffer[..length].to_vec();
        let interrupt = (kernel::INTERRUPT, 1, 0, 0);
        assert_eq!(answer_at_once(known, interrupt), Some(failed));
        assert_eq!(answer_at_once(known, interrupt), None);
        assert_eq!(answer_at_once(known, (kernel::CONT, 1, 0, 0)), None);
    }
}
