//! Blocks: the pieces in which files are compared, each with a hash of its own.

use std::ops::Range;

/// Length of a block, in bytes (32 KiB): what is sent for one byte that has changed. Its 16 bytes
/// of hash are a two thousandth.
pub const BLOCK_BYTES: usize = 32 << 10;

/// Length of the pieces of a block that may be holes, in bytes.
pub const PIECE_BYTES: usize = 4 << 10; // 4 KiB

/// Pieces of a block: one bit each.
const PIECES: usize = BLOCK_BYTES / PIECE_BYTES;
const _: () = assert!(PIECES <= u32::BITS as usize);

/// The hash of a block's bytes, their number included.
pub type Hash = [u8; 16];

/// How many blocks a file of this size has.
pub const fn count(size: u64) -> u64 {
    size.div_ceil(BLOCK_BYTES as u64)
}

/// How many bytes of a file of this size are in this block.
pub fn length(size: u64, block: u64) -> usize {
    let left = size.saturating_sub(block.saturating_mul(BLOCK_BYTES as u64));
    usize::try_from(left)
        .unwrap_or(BLOCK_BYTES)
        .min(BLOCK_BYTES)
}

/// The hash of a block, or none if it is all zero.
pub fn hash(bytes: &[u8]) -> Option<Hash> {
    if is_zero(bytes) {
        return None;
    }
    let (hash, _) = blake3::hash(bytes)
        .as_bytes()
        .split_first_chunk()
        .map(|(head, rest)| (*head, rest.len()))?;
    Some(hash)
}

/// Which pieces of a block hold something.
pub fn pieces(bytes: &[u8]) -> u32 {
    let held = bytes.chunks(PIECE_BYTES).map(|piece| !is_zero(piece));
    held.enumerate()
        .fold(0, |all, (at, held)| all | u32::from(held) << at)
}

/// Runs of pieces in a block of `length` bytes: those that hold something, or the others.
pub fn runs(pieces: u32, held: bool, length: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for at in 0..length.div_ceil(PIECE_BYTES) {
        if (pieces >> at & 1 == 1) != held {
            continue;
        }
        let (start, end) = (at * PIECE_BYTES, length.min((at + 1) * PIECE_BYTES));
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            Some(_) | None => runs.push(start..end),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_cut_into_what_holds_something_and_what_does_not() {
        let mut bytes = vec![0; 3 * PIECE_BYTES + 10];
        assert_eq!(hash(&bytes), None);
        bytes[PIECE_BYTES] = 1;
        bytes[3 * PIECE_BYTES + 9] = 1;
        let held = pieces(&bytes);
        assert_eq!(held, 0b1010);
        let last = 3 * PIECE_BYTES;
        let expected = [PIECE_BYTES..2 * PIECE_BYTES, last..last + 10];
        assert_eq!(runs(held, true, bytes.len()), expected);
        let expected = [0..PIECE_BYTES, 2 * PIECE_BYTES..last];
        assert_eq!(runs(held, false, bytes.len()), expected);
    }

    #[test]
    fn the_same_bytes_and_zeroes_after_them_are_another_block() {
        assert_ne!(hash(&[1, 0]), hash(&[1]));
        assert_eq!(length(BLOCK_BYTES as u64 + 5, 1), 5);
        assert_eq!(length(BLOCK_BYTES as u64 + 5, 2), 0);
        assert_eq!(count(BLOCK_BYTES as u64 + 5), 2);
        assert_eq!(count(0), 0);
    }
}
