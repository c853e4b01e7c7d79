//! Frames that came for a workload while it stood still, as a stream has them.
//!
//! A stream has some of them, in the order in which they came. They are numbered from 0 in each
//! attempt, through all streams of it, since streams overtake each other.

use crate::id::Generation;
use crate::wire::stream::{StreamError, take, take_generation};

/// Longest frame, in bytes, with what is before it: what the kernel hands on at once is at most
/// 64 KiB of packet.
pub const FRAME_BYTES_MAX: usize = 68 << 10; // 68 KiB

/// Shortest frame: `struct virtio_net_hdr`, and an Ethernet header.
pub const FRAME_BYTES_MIN: usize = 10 + 14;

/// Longest stream, in bytes, prefix and checksum aside (1 MiB).
pub const PARKED_BYTES_MAX: usize = 1 << 20;

/// Most links that a workload has.
pub const LINKS_MAX: u8 = 16;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkedFrame {
    /// Which of the workload's links it came by: its place in the offer.
    pub link: u8,
    /// Its bytes, behind a `struct virtio_net_hdr` of 10 bytes.
    pub bytes: Vec<u8>,
}

/// What a stream of them has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// The attempt in which they came.
    pub generation: Generation,
    /// The number of the first.
    pub first: u32,
    /// All of them.
    pub frames: Vec<ParkedFrame>,
}

impl ParkedFrame {
    /// What it takes of a stream, in bytes.
    pub fn wire_bytes(&self) -> usize {
        PER_FRAME + self.bytes.len()
    }
}

impl Parked {
    /// The bytes of a stream of the frames from number `first` on, without its checksum.
    pub fn encode<'a>(
        generation: Generation,
        first: u32,
        frames: impl IntoIterator<Item = &'a ParkedFrame>,
    ) -> Vec<u8> {
        let mut body = generation.number().to_le_bytes().to_vec();
        body.extend(first.to_le_bytes());
        for frame in frames {
            body.push(frame.link);
            let length = u32::try_from(frame.bytes.len()).expect("at most FRAME_BYTES_MAX");
            body.extend(length.to_le_bytes());
            body.extend(&frame.bytes);
        }
        body
    }

    /// The frames in these bytes, which are a stream without its checksum.
    pub fn decode(body: &[u8]) -> Result<Self, StreamError> {
        let mut rest = body;
        let generation = take_generation(&mut rest)?;
        let first = u32::from_le_bytes(take(&mut rest)?);
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let [link] = take(&mut rest)?;
            if LINKS_MAX <= link {
                return Err(StreamError::Link(link));
            }
            let length = u32::from_le_bytes(take(&mut rest)?) as usize;
            if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
                return Err(StreamError::Frame(length));
            }
            let truncated = StreamError::Truncated {
                length: rest.len(),
                needed: length,
            };
            let (bytes, behind) = rest.split_at_checked(length).ok_or(truncated)?;
            rest = behind;
            let bytes = bytes.to_vec();
            frames.push(ParkedFrame { link, bytes });
        }
        Ok(Self {
            generation,
            first,
            frames,
        })
    }
}

/// What precedes each frame: a link and a length.
const PER_FRAME: usize = 1 + 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(link: u8, length: usize) -> ParkedFrame {
        let bytes = vec![link; length];
        ParkedFrame { link, bytes }
    }

    fn decode(frames: &[ParkedFrame]) -> Result<Parked, StreamError> {
        Parked::decode(&Parked::encode(Generation::FIRST, 7, frames))
    }

    // clause: D-10
    #[test]
    fn frames_read_back_in_their_order_and_have_their_bounds() {
        let frames = [frame(0, FRAME_BYTES_MIN), frame(15, FRAME_BYTES_MAX)];
        let parked = decode(&frames).unwrap();
        assert_eq!((parked.generation, parked.first), (Generation::FIRST, 7));
        assert_eq!(parked.frames, frames);
        let body = Parked::encode(Generation::FIRST, 7, &frames);
        let bytes: usize = frames.iter().map(ParkedFrame::wire_bytes).sum();
        assert_eq!(body.len(), 8 + bytes);
        assert_eq!(decode(&[]).unwrap().frames, []);
        assert_eq!(decode(&[frame(16, 60)]), Err(StreamError::Link(16)));
        for length in [0, FRAME_BYTES_MIN - 1, FRAME_BYTES_MAX + 1] {
            assert_eq!(decode(&[frame(1, length)]), Err(StreamError::Frame(length)));
        }
        for length in [0, 7, 9, 12, body.len() - 1] {
            let cut = Parked::decode(&body[..length]);
            assert!(
                matches!(cut, Err(StreamError::Truncated { .. })),
                "{length}: {cut:?}"
            );
        }
    }
}
