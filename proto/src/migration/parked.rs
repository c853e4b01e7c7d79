//! Frames that come for a workload while it stands still: what its source keeps of them, and in
//! which order its target has them.
//!
//! Invariants: both are bounded, in frames and in bytes; what the source has said to the target it
//! keeps until it is known where the workload runs, so that it can have them itself; the target has
//! each once, in the order in which they came, and none of an attempt that was given up.

use std::collections::{BTreeMap, VecDeque};

use crate::id::Generation;
use crate::wire::parked::{PARKED_BYTES_MAX, Parked, ParkedFrame};

/// Most frames that are kept, and most bytes of them (32 MiB): what comes then is lost, as where a
/// card's queue is full.
pub const FRAMES_MAX: usize = 16384;
/// See [`FRAMES_MAX`].
pub const BYTES_MAX: usize = 32 << 20;

/// What a source keeps.
#[derive(Debug, Default)]
pub struct Kept {
    frames: VecDeque<One>,
    bytes: usize,
    /// How many from the front on have been sent, or are not for the target.
    passed: usize,
    /// The number of the next that is sent.
    number: u32,
    /// Nothing is kept that has been sent.
    relays: bool,
    lost: u64,
}

#[derive(Debug)]
struct One {
    frame: ParkedFrame,
    /// Whether the target is to have it, too.
    travels: bool,
    /// Whether the workload has it at its source already, unread.
    is_there: bool,
}

impl Kept {
    /// Keeps another one, if there is room.
    pub fn put(&mut self, frame: ParkedFrame, travels: bool) {
        if self.relays && !travels {
            return;
        }
        let bytes = self.bytes + frame.bytes.len();
        if FRAMES_MAX <= self.frames.len() || BYTES_MAX < bytes {
            self.lost += 1;
            return;
        }
        self.bytes = bytes;
        self.frames.push_back(One {
            frame,
            travels,
            is_there: false,
        });
    }

    /// Keeps, before all others, what the workload has not read at its source, as far as there is
    /// room: that is for the target alone. Only before anything was sent.
    pub fn put_unread(&mut self, frames: Vec<ParkedFrame>) {
        let sum: usize = frames.iter().map(|frame| frame.bytes.len()).sum();
        let is_full = FRAMES_MAX < self.frames.len() + frames.len() || BYTES_MAX < self.bytes + sum;
        if is_full || 0 < self.number {
            self.lost += frames.len() as u64;
            return;
        }
        self.bytes += sum;
        for frame in frames.into_iter().rev() {
            self.frames.push_front(One {
                frame,
                travels: true,
                is_there: true,
            });
        }
    }

    /// The next stream for the target, without its checksum, if there is anything for it.
    pub fn stream(&mut self, generation: Generation) -> Option<Vec<u8>> {
        let (mut frames, mut bytes, mut passed) = (Vec::new(), PER_STREAM, self.passed);
        for One { frame, travels, .. } in self.frames.range(self.passed..) {
            if *travels {
                if PARKED_BYTES_MAX < bytes + frame.wire_bytes() {
                    break;
                }
                bytes += frame.wire_bytes();
                frames.push(frame);
            }
            passed += 1;
        }
        let count = u32::try_from(frames.len()).expect("at most FRAMES_MAX");
        let body = (0 < count).then(|| Parked::encode(generation, self.number, frames));
        self.number = self.number.saturating_add(count);
        self.passed = passed;
        if self.relays {
            self.forget();
        }
        body
    }

    /// A stream that says that all that was kept so far is in those before it. It is to be called
    /// when there is none any more of the others.
    pub fn mark(&self, generation: Generation) -> Vec<u8> {
        Parked::encode(generation, self.number, [])
    }

    /// All of them from the first on, for the workload at its source; nothing is kept then.
    pub fn take(&mut self) -> impl Iterator<Item = ParkedFrame> + use<> {
        let all = std::mem::take(self);
        let all = all.frames.into_iter().filter(|one| !one.is_there);
        all.map(|one| one.frame)
    }

    /// The workload runs at the target: from here on nothing is kept for itself.
    pub fn relay(&mut self) {
        self.relays = true;
        self.forget();
    }

    /// How many there are, and how many there was no room for.
    pub fn counts(&self) -> (usize, u64) {
        (self.frames.len(), self.lost)
    }

    fn forget(&mut self) {
        self.frames.drain(..self.passed);
        self.passed = 0;
        // What stays is on its way, and for the target.
        self.frames.retain(|one| one.travels);
        self.bytes = self.frames.iter().map(|one| one.frame.bytes.len()).sum();
    }
}

/// What has come to a target.
#[derive(Debug)]
pub struct Order {
    generation: Generation,
    /// The number of the next that is delivered.
    next: u32,
    /// The number of the first that came to the source only after it had heard that the workload
    /// runs, once the source has said so.
    mark: Option<u32>,
    waiting: BTreeMap<u32, ParkedFrame>,
    bytes: usize,
    lost: u64,
}

impl Default for Order {
    fn default() -> Self {
        Self::of(Generation::FIRST)
    }
}

impl Order {
    fn of(generation: Generation) -> Self {
        Self {
            generation,
            next: 0,
            mark: None,
            waiting: BTreeMap::new(),
            bytes: 0,
            lost: 0,
        }
    }

    /// A stream has come. One of a newer attempt says that the older was given up.
    pub fn put(&mut self, parked: Parked) {
        if parked.generation < self.generation {
            return;
        }
        if self.generation < parked.generation {
            *self = Self::of(parked.generation);
        }
        if parked.frames.is_empty() {
            self.mark = Some(parked.first);
        }
        for (frame, number) in parked.frames.into_iter().zip(parked.first..) {
            if number < self.next || self.waiting.contains_key(&number) {
                continue;
            }
            let bytes = self.bytes + frame.bytes.len();
            if FRAMES_MAX <= self.waiting.len() || BYTES_MAX < bytes {
                // Its place stays, so that those behind it are not held up for ever.
                self.lost += 1;
                let (link, bytes) = (frame.link, Vec::new());
                self.waiting.insert(number, ParkedFrame { link, bytes });
                if FRAMES_MAX * 2 <= self.waiting.len() {
                    return;
                }
                continue;
            }
            self.bytes = bytes;
            self.waiting.insert(number, frame);
        }
    }

    /// The next one, if it is here.
    pub fn pop(&mut self) -> Option<ParkedFrame> {
        loop {
            let frame = self.waiting.remove(&self.next)?;
            self.next = self.next.saturating_add(1);
            self.bytes -= frame.bytes.len();
            if !frame.bytes.is_empty() {
                return Some(frame);
            }
        }
    }

    /// Whether all were delivered that had come to the source when it heard that the workload runs.
    pub fn is_whole(&self) -> bool {
        self.mark.is_some_and(|mark| mark <= self.next)
    }

    /// How many there was no room for.
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}

/// Whether a frame, behind its `struct virtio_net_hdr`, is one that is carried to another node: an
/// IP packet for the hardware address `mac` alone.
///
/// What neighbours say of their own addresses (ARP, and what IPv6 has for it) is true of that
/// network only, and asked again; and what is for many reaches the target's link by itself.
pub fn travels(frame: &[u8], mac: [u8; 6]) -> bool {
    let Some(frame) = frame.get(VNET_BYTES..) else {
        return false;
    };
    if frame.get(..6) != Some(&mac[..]) {
        return false;
    }
    match frame.get(12..14) {
        Some([0x08, 0x00]) => true,
        Some([0x86, 0xdd]) => !is_discovery(&frame[14..]),
        _ => false,
    }
}

/// Whether a frame is what neighbours say of addresses.
pub fn is_neighbours(frame: &[u8]) -> bool {
    match frame.get(VNET_BYTES + 12..VNET_BYTES + 14) {
        Some([0x08, 0x06]) => true,
        Some([0x86, 0xdd]) => is_discovery(&frame[VNET_BYTES + 14..]),
        _ => false,
    }
}

/// Whether a frame is one of TCP, which takes each byte once, however often it comes.
pub fn is_tcp(frame: &[u8]) -> bool {
    let packet = frame.get(VNET_BYTES + 14..).unwrap_or_default();
    let protocol = match frame.get(VNET_BYTES + 12..VNET_BYTES + 14) {
        Some([0x08, 0x00]) => packet.get(9),
        Some([0x86, 0xdd]) => packet.get(6),
        _ => None,
    };
    protocol == Some(&6)
}

/// Whether an IPv6 packet is one of neighbour discovery (RFC 4861): none of these has another
/// header before it.
fn is_discovery(packet: &[u8]) -> bool {
    packet.get(6) == Some(&58) && matches!(packet.get(40), Some(133..=137))
}

/// Length of what is before a frame.
const VNET_BYTES: usize = 10;

/// What a stream has besides its frames.
const PER_STREAM: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Generation = Generation::FIRST;

    fn frame(byte: u8, length: usize) -> ParkedFrame {
        let bytes = vec![byte; length];
        ParkedFrame { link: 0, bytes }
    }

    fn stream(kept: &mut Kept) -> Option<(u32, Vec<u8>)> {
        let parked = Parked::decode(&kept.stream(FIRST)?).unwrap();
        let all = parked.frames.iter().map(|frame| frame.bytes[0]);
        Some((parked.first, all.collect()))
    }

    fn parked(generation: Generation, first: u32, bytes: &[u8]) -> Parked {
        let frames = bytes.iter().map(|byte| frame(*byte, 60)).collect();
        Parked {
            generation,
            first,
            frames,
        }
    }

    fn delivered(order: &mut Order) -> Vec<u8> {
        std::iter::from_fn(|| order.pop())
            .map(|frame| frame.bytes[0])
            .collect()
    }

    // clause: H-25
    #[test]
    fn a_source_sends_what_travels_and_has_all_of_it_itself_until_it_relays() {
        let mut kept = Kept::default();
        for byte in 0..6 {
            kept.put(frame(byte, 60), byte != 1);
        }
        assert_eq!(stream(&mut kept), Some((0, vec![0, 2, 3, 4, 5])));
        assert_eq!(stream(&mut kept), None);
        kept.put(frame(6, 60), false);
        kept.put(frame(7, 60), true);
        assert_eq!(stream(&mut kept), Some((5, vec![7])));
        let all: Vec<u8> = kept.take().map(|frame| frame.bytes[0]).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((kept.counts(), stream(&mut kept)), ((0, 0), None));
        // Of another attempt, numbers begin anew.
        kept.put(frame(8, 60), true);
        kept.put(frame(9, 60), false);
        assert_eq!(stream(&mut kept), Some((0, vec![8])));
        kept.put(frame(10, 60), true);
        kept.relay();
        assert_eq!(kept.counts(), (1, 0));
        kept.put(frame(11, 60), false);
        assert_eq!(stream(&mut kept), Some((1, vec![10])));
        assert_eq!((kept.counts(), kept.bytes), ((0, 0), 0));
    }

    #[test]
    fn what_was_not_read_comes_first_and_only_to_the_target() {
        let unread = || vec![frame(1, 60), frame(2, 60)];
        let mut kept = Kept::default();
        kept.put(frame(3, 60), true);
        kept.put_unread(unread());
        assert_eq!(stream(&mut kept), Some((0, vec![1, 2, 3])));
        kept.put_unread(unread());
        assert_eq!(kept.counts(), (3, 2));
        let all: Vec<u8> = kept.take().map(|frame| frame.bytes[0]).collect();
        assert_eq!(all, [3]);
    }

    #[test]
    fn what_is_kept_is_bounded_and_so_is_a_stream() {
        let mut kept = Kept::default();
        for _ in 0..FRAMES_MAX + 3 {
            kept.put(frame(1, 60), true);
        }
        assert_eq!(kept.counts(), (FRAMES_MAX, 3));
        let mut kept = Kept::default();
        let length = 64 << 10;
        for _ in 0..BYTES_MAX / length + 2 {
            kept.put(frame(1, length), true);
        }
        assert_eq!(kept.counts(), (BYTES_MAX / length, 2));
        let mut sent = 0;
        while let Some(body) = kept.stream(FIRST) {
            assert!(body.len() <= PARKED_BYTES_MAX);
            let parked = Parked::decode(&body).unwrap();
            assert_eq!(parked.first as usize, sent);
            sent += parked.frames.len();
        }
        assert_eq!(sent, BYTES_MAX / length);
    }

    // clause: H-25
    #[test]
    fn a_target_has_each_once_in_order_and_none_of_an_attempt_that_was_given_up() {
        let mut order = Order::default();
        order.put(parked(FIRST, 2, &[2, 3]));
        assert_eq!(delivered(&mut order), []);
        order.put(parked(FIRST, 0, &[0, 1]));
        order.put(parked(FIRST, 1, &[9, 9, 9]));
        assert_eq!(delivered(&mut order), [0, 1, 2, 3]);
        order.put(parked(FIRST, 3, &[9, 4]));
        assert_eq!(delivered(&mut order), [4]);
        order.put(parked(FIRST, 5, &[5]));
        order.put(parked(FIRST.next(), 1, &[7]));
        order.put(parked(FIRST, 6, &[9]));
        assert_eq!(delivered(&mut order), []);
        order.put(parked(FIRST.next(), 0, &[6]));
        assert_eq!(delivered(&mut order), [6, 7]);
    }

    // clause: H-25
    #[test]
    fn a_target_knows_when_nothing_is_on_its_way_that_came_before_the_workload_ran() {
        let mut kept = Kept::default();
        let mut order = Order::default();
        kept.put(frame(1, 60), true);
        kept.put(frame(2, 60), true);
        let sent = Parked::decode(&kept.stream(FIRST).unwrap()).unwrap();
        assert_eq!(kept.stream(FIRST), None);
        let mark = || Parked::decode(&kept.mark(FIRST)).unwrap();
        assert!(!order.is_whole());
        // It may overtake them.
        order.put(mark());
        assert_eq!((delivered(&mut order), order.is_whole()), (vec![], false));
        order.put(sent);
        assert!(!order.is_whole());
        assert_eq!(
            (delivered(&mut order), order.is_whole()),
            (vec![1, 2], true)
        );
        // Of another attempt it says nothing.
        order.put(parked(FIRST.next(), 0, &[3]));
        order.put(mark());
        assert_eq!((delivered(&mut order), order.is_whole()), (vec![3], false));
        let mut none = Order::default();
        none.put(Parked::decode(&Kept::default().mark(FIRST)).unwrap());
        assert!(none.is_whole());
    }

    #[test]
    fn what_there_is_no_room_for_holds_up_nothing() {
        let mut order = Order::default();
        let full = vec![1; FRAMES_MAX];
        order.put(parked(FIRST, 1, &full));
        order.put(parked(FIRST, 0, &[0]));
        let behind = u32::try_from(FRAMES_MAX).unwrap() + 1;
        order.put(parked(FIRST, behind, &[3]));
        assert_eq!(order.lost(), 2);
        assert_eq!(delivered(&mut order).len(), FRAMES_MAX);
        order.put(parked(FIRST, behind + 1, &[4]));
        assert_eq!((delivered(&mut order), order.bytes), (vec![4], 0));
    }

    #[test]
    fn only_ip_for_one_address_travels_and_nothing_that_neighbours_say() {
        let mac = [2, 0, 0, 0, 0, 7];
        let made = |to: [u8; 6], kind: [u8; 2], packet: &[u8]| {
            let parts = [&[0; 10][..], &to, &[2, 0, 0, 0, 0, 1], &kind, packet];
            parts.concat()
        };
        let (ip, arp, ip6) = ([8, 0], [8, 6], [0x86, 0xdd]);
        let mut discovery = [0; 64];
        discovery[6] = 58;
        discovery[40] = 135;
        let mut echo = discovery;
        echo[40] = 128;
        for (frame, is) in [
            (made(mac, ip, &[0; 40]), [true, false]),
            (made([0xff; 6], ip, &[0; 40]), [false, false]),
            (made(mac, arp, &[0; 28]), [false, true]),
            (made(mac, ip6, &discovery), [false, true]),
            (made(mac, ip6, &echo), [true, false]),
            (made(mac, ip6, &[]), [true, false]),
            (vec![0; 9], [false, false]),
            (vec![0; 20], [false, false]),
        ] {
            assert_eq!(
                [travels(&frame, mac), is_neighbours(&frame)],
                is,
                "{frame:?}"
            );
            assert!(!is_tcp(&frame));
        }
        let mut packet = [0; 40];
        packet[6] = 17;
        packet[9] = 6;
        assert!(is_tcp(&made(mac, ip, &packet)) && !is_tcp(&made(mac, ip6, &packet)));
        packet.swap(6, 9);
        assert!(!is_tcp(&made(mac, ip, &packet)) && is_tcp(&made(mac, ip6, &packet)));
    }
}
