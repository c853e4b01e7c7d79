//! What CRIU is going to ask of a thread that has stopped, told with the stop.
//!
//! A call to the tracer takes ten times as long as one to the kernel, and CRIU asks these of every
//! thread. They hold until anything is done to the thread.

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

/// Requests and addresses; those that are given a pointer in `data`.
const ASKED: [(u32, u64, usize); 6] = [
    (kernel::GETSIGINFO, 0, kernel::SIGINFO_BYTES),
    (kernel::GETSIGMASK, 8, 8),
    (kernel::GET_RSEQ_CONFIGURATION, RSEQ_BYTES, 24),
    // GDT_ENTRY_TLS_MIN and the next ones
    (kernel::GET_THREAD_AREA, 12, 16),
    (kernel::GET_THREAD_AREA, 13, 16),
    (kernel::GET_THREAD_AREA, 14, 16),
];

/// `sizeof(struct ptrace_rseq_configuration)`.
pub const RSEQ_BYTES: u64 = 24;

/// Fills `buffer` with what is known of the stopped thread `tid`; its length, and the registers.
pub fn collect(tid: i32, buffer: &mut [u8]) -> (usize, Option<kernel::Registers>) {
    let mut length = 0;
    for (request, address, size) in ASKED {
        let mut bytes = [0_u64; kernel::SIGINFO_BYTES / 8];
        let result = kernel::ptrace(request, tid, address, bytes.as_mut_ptr() as u64);
        if result >= 0 {
            let bytes = bytes.map(u64::to_ne_bytes);
            let bytes = &bytes.as_flattened()[..size];
            length += append(&mut buffer[length..], request, address, result, bytes);
        }
    }
    let registers = kernel::registers(tid);
    if let Some(registers) = &registers {
        let bytes = kernel::bytes_of(registers);
        let into = &mut buffer[length..];
        length += append(into, kernel::GETREGSET, kernel::NT_PRSTATUS, 0, bytes);
    }
    (length, registers)
}

fn append(into: &mut [u8], request: u32, address: u64, result: i64, bytes: &[u8]) -> usize {
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

/// The answer to a request in a list of them: its result and its bytes.
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
    }
}
