//! What CRIU is going to ask of a thread that has stopped, told with the stop.
//!
//! CRIU asks these of every thread. They hold until anything is done to the thread. How they come
//! to CRIU stands in `told`.

use crate::kernel;

/// One answer in a list of them: a head, then its bytes.
struct Head {
    request: u32,
    length: u32,
    address: u64,
    result: i64,
}

impl Head {
    const SIZE: usize = 24;

    fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.length.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.address.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.result.to_ne_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let half = |at: usize| {
            let mut half = [0; 4];
            half.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(half)
        };
        Self {
            request: half(0),
            length: half(4),
            address: word(8),
            result: word(16).cast_signed(),
        }
    }
}

/// What is asked of a thread that comes with its own registers: requests, addresses, and how much
/// is told where `data` points.
const AT_HOME: [(u32, u64, usize); 5] = [
    (kernel::GETSIGMASK, 8, 8),
    (kernel::GET_RSEQ_CONFIGURATION, RSEQ_BYTES, 24),
    // GDT_ENTRY_TLS_MIN and the next ones
    (kernel::GET_THREAD_AREA, 12, 16),
    (kernel::GET_THREAD_AREA, 13, 16),
    (kernel::GET_THREAD_AREA, 14, 16),
];

/// `sizeof(struct ptrace_rseq_configuration)`.
pub const RSEQ_BYTES: u64 = 24;

/// Fills `into` with what is known of the stopped thread `tid`: its signal and its registers, and
/// if it is at home, where CRIU has asked for nothing yet, the rest. Gives the length, which is 0
/// for want of room.
pub fn collect(tid: i32, is_home: bool, into: &mut [u8]) -> usize {
    if into.len() < ROOM {
        return 0;
    }
    let mut list = List { into, end: 0 };
    list.ask(tid, kernel::GETSIGINFO, 0, kernel::SIGINFO_BYTES);
    list.ask_registers(tid, kernel::NT_PRSTATUS);
    if is_home {
        for (request, address, size) in AT_HOME {
            list.ask(tid, request, address, size);
        }
        let extended = list.ask_registers(tid, kernel::NT_X86_XSTATE);
        // The legacy part of it is not told while it is in its first state: CRIU asks again then.
        if extended.is_some_and(|at| list.into[at + XSTATE_BV_AT] & LEGACY != LEGACY) {
            list.ask(tid, kernel::GETFPREGS, 0, kernel::FPREGS_BYTES);
        }
    }
    list.end
}

/// What [`collect`] may need, in bytes.
pub const ROOM: usize = (2 << 10) + kernel::EXTENDED_BYTES;

/// `xstate_bv` in the header behind the legacy part, and the bits of that: x87 and SSE.
const XSTATE_BV_AT: usize = 512;
const LEGACY: u8 = 3;

/// Answers, as they are asked for.
struct List<'a> {
    into: &'a mut [u8],
    end: usize,
}

impl List<'_> {
    /// For requests that are given a pointer in `data`.
    fn ask(&mut self, tid: i32, request: u32, address: u64, size: usize) {
        let mut bytes = [0_u64; kernel::FPREGS_BYTES / 8];
        let result = kernel::ptrace(request, tid, address, bytes.as_mut_ptr() as u64);
        if result >= 0 {
            let bytes = bytes.map(u64::to_ne_bytes);
            let bytes = &bytes.as_flattened()[..size];
            self.end += append(&mut self.into[self.end..], request, address, result, bytes);
        }
    }

    /// Where in the list they are, if the kernel tells them. Zeros at their end, of registers that
    /// nobody uses, are left out.
    fn ask_registers(&mut self, tid: i32, set: u64) -> Option<usize> {
        let at = self.end + Head::SIZE;
        let place = self.into.get_mut(at..at + kernel::EXTENDED_BYTES)?;
        let length = kernel::register_set(tid, set, place)?;
        let last = place[..length].iter().rposition(|byte| *byte != 0);
        let kept = last
            .map_or(0, |last| last + 1)
            .max(length.min(XSTATE_BV_AT + 1));
        let head = Head {
            request: kernel::GETREGSET,
            length: u32::try_from(kept).ok()?,
            address: set,
            result: i64::try_from(length).ok()?,
        };
        self.into[self.end..at].copy_from_slice(&head.to_bytes());
        self.end = at + kept;
        Some(at)
    }
}

/// Adds an answer to a list of them; how much longer that is, 0 for want of room.
pub fn append(into: &mut [u8], request: u32, address: u64, result: i64, bytes: &[u8]) -> usize {
    let head = Head {
        request,
        length: u32::try_from(bytes.len()).unwrap_or_default(),
        address,
        result,
    };
    let end = Head::SIZE + bytes.len();
    let Some(place) = into.get_mut(..end) else {
        return 0;
    };
    place[..Head::SIZE].copy_from_slice(&head.to_bytes());
    place[Head::SIZE..].copy_from_slice(bytes);
    end
}

/// The answer to a request in a list of them: its result and its bytes. For registers the result is
/// how many bytes there are, and those that are not told are zeros.
pub fn find(mut known: &[u8], request: u32, address: u64) -> Option<(i64, &[u8])> {
    while let Some((head, rest)) = known.split_first_chunk() {
        let head = Head::from_bytes(*head);
        let (bytes, rest) = rest.split_at_checked(usize::try_from(head.length).ok()?)?;
        if (head.request, head.address) == (request, address) {
            return Some((head.result, bytes));
        }
        known = rest;
    }
    None
}

/// Takes the answer to a request out of a list of them.
pub fn forget(known: &mut Vec<u8>, request: u32, address: u64) {
    let mut at = 0;
    while let Some(head) = known[at..].first_chunk() {
        let head = Head::from_bytes(*head);
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        let end = (at + Head::SIZE).saturating_add(length).min(known.len());
        if (head.request, head.address) == (request, address) {
            known.drain(at..end);
            return;
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_by_request_and_address() {
        let mut buffer = [0; 128];
        let mut length = append(&mut buffer, 7, 1, 0, b"first");
        length += append(&mut buffer[length..], 7, 2, 5, b"second");
        let known = &buffer[..length];
        assert_eq!(find(known, 7, 1), Some((0, &b"first"[..])));
        assert_eq!(find(known, 7, 2), Some((5, &b"second"[..])));
        assert_eq!(find(known, 8, 1), None);
        assert_eq!(find(&known[..30], 7, 2), None, "cut off");
        assert_eq!(append(&mut [0; 8], 1, 1, 0, b"too long"), 0);
        let mut known = known.to_vec();
        forget(&mut known, 7, 3);
        forget(&mut known, 7, 1);
        assert_eq!(find(&known, 7, 1), None);
        assert_eq!(find(&known, 7, 2), Some((5, &b"second"[..])));
    }
}
