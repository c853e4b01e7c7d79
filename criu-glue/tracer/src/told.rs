//! Lists that go through the channel: calls that CRIU has posted, and what the tracer tells besides
//! the answer.
//!
//! A call to the tracer takes ten times as long as one to the kernel. So a change whose result CRIU
//! does not look at waits for the next call ([`Post`]), and an answer has with it what CRIU will
//! ask next, of the same thread and of the next ones ([`Told`]).

use crate::channel::Shape;

/// A call that CRIU does not wait for: of its result only an error is told, instead of the result
/// of the call it comes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Post {
    pub request: u32,
    pub shape: Shape,
    pub pid: i32,
    pub address: u64,
    pub data: u64,
    /// Of what it points to, which follows it in the list.
    pub length: usize,
}

impl Post {
    const SIZE: usize = 32;

    /// Adds it and its bytes to `list` unless that would become longer than `limit`.
    pub fn append(&self, list: &mut Vec<u8>, bytes: &[u8], limit: usize) -> bool {
        if limit < list.len() + Self::SIZE + bytes.len() {
            return false;
        }
        let shape = self.shape as u32;
        let length = u32::try_from(bytes.len()).unwrap_or_default();
        list.extend(self.request.to_ne_bytes());
        list.extend(shape.to_ne_bytes());
        list.extend(self.pid.to_ne_bytes());
        list.extend(length.to_ne_bytes());
        list.extend(self.address.to_ne_bytes());
        list.extend(self.data.to_ne_bytes());
        list.extend_from_slice(bytes);
        true
    }

    /// The first of `list`, its bytes, and the rest.
    pub fn first(list: &mut [u8]) -> Option<(Self, &mut [u8], &mut [u8])> {
        let (head, rest) = list.split_first_chunk_mut::<{ Self::SIZE }>()?;
        let length = usize::try_from(half(head, 12)).ok()?;
        let (bytes, rest) = rest.split_at_mut_checked(length)?;
        let post = Self {
            request: half(head, 0),
            shape: Shape::from_number(half(head, 4))?,
            pid: half(head, 8).cast_signed(),
            address: word(head, 16),
            data: word(head, 24),
            length,
        };
        Some((post, bytes, rest))
    }
}

/// Something about a thread that CRIU has not asked for yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told<'a> {
    pub tid: i32,
    /// It has stopped, with this status. Nobody will hear of that by waiting any more.
    pub stop: Option<i32>,
    /// Answers, see [`crate::known`]: all there are if it has stopped, else some more.
    pub known: &'a [u8],
}

impl<'a> Told<'a> {
    pub const SIZE: usize = HEAD_BYTES;

    /// Puts a head at the start of `into`, for the `length` bytes of answers that are behind it
    /// already. Gives what of `into` is used.
    pub fn head(into: &mut [u8], tid: i32, stop: Option<i32>, length: usize) -> usize {
        let Some(head) = into.first_chunk_mut::<HEAD_BYTES>() else {
            return 0;
        };
        head[0..4].copy_from_slice(&tid.to_ne_bytes());
        head[4..8].copy_from_slice(&stop.unwrap_or_default().to_ne_bytes());
        head[8..12].copy_from_slice(&u32::from(stop.is_some()).to_ne_bytes());
        let told = u32::try_from(length).unwrap_or_default();
        head[12..16].copy_from_slice(&told.to_ne_bytes());
        Self::SIZE + length
    }

    /// The first of `list`, and the rest.
    pub fn first(list: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (head, rest) = list.split_first_chunk::<HEAD_BYTES>()?;
        let (known, rest) = rest.split_at_checked(usize::try_from(half(head, 12)).ok()?)?;
        let status = half(head, 4).cast_signed();
        let told = Self {
            tid: half(head, 0).cast_signed(),
            stop: (half(head, 8) != 0).then_some(status),
            known,
        };
        Some((told, rest))
    }
}

const HEAD_BYTES: usize = 16;

fn half(head: &[u8], at: usize) -> u32 {
    let mut half = [0; 4];
    half.copy_from_slice(&head[at..at + 4]);
    u32::from_ne_bytes(half)
}

fn word(head: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&head[at..at + 8]);
    u64::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posts_come_in_their_order_with_their_bytes() {
        let post = |pid, shape| Post {
            request: 7,
            shape,
            pid,
            address: 1 << 40,
            data: u64::MAX,
            length: 0,
        };
        let mut list = Vec::new();
        assert!(post(1, Shape::Vector).append(&mut list, b"some", 100));
        assert!(post(-2, Shape::Plain).append(&mut list, b"", 100));
        assert!(
            !post(3, Shape::Plain).append(&mut list, &[0; 64], 100),
            "full"
        );
        let (first, bytes, rest) = Post::first(&mut list).expect("two");
        assert_eq!((first.length, &*bytes), (4, &b"some"[..]));
        assert_eq!(Post { length: 0, ..first }, post(1, Shape::Vector));
        let (second, bytes, rest) = Post::first(rest).expect("one");
        assert_eq!((second, bytes.len()), (post(-2, Shape::Plain), 0));
        assert!(Post::first(rest).is_none());
        assert!(Post::first(&mut list[..34]).is_none(), "cut off");
    }

    #[test]
    fn what_is_told_of_threads_is_read_as_it_was_written() {
        let mut list = [0; 64];
        list[Told::SIZE..][..3].copy_from_slice(b"one");
        let mut end = Told::head(&mut list, 5, Some(-1), 3);
        end += Told::head(&mut list[end..], 6, None, 0);
        let (first, rest) = Told::first(&list[..end]).expect("two");
        assert_eq!(
            (first.tid, first.stop, first.known),
            (5, Some(-1), &b"one"[..])
        );
        let (second, rest) = Told::first(rest).expect("one");
        assert_eq!((second.tid, second.stop, second.known.len()), (6, None, 0));
        assert_eq!(Told::first(rest), None);
        assert_eq!(
            Told::first(&list[..end - 1]).map(|(_, rest)| Told::first(rest)),
            Some(None)
        );
        assert_eq!(Told::head(&mut [0; 8], 1, None, 0), 0, "no room");
    }
}
