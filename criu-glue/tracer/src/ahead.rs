//! What the tracer does before CRIU asks for it, because it will.
//!
//! Each of these is a call that CRIU makes next in any case, made a little earlier; and CRIU sees
//! its result, whatever it is, when it asks. So it sees nothing that it could not have seen had it
//! been quicker itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::channel::PEEK_BYTES;
use crate::kernel::{self, Stop};
use crate::known;
use crate::told::Told;
use crate::tracee::Tracee;

/// Asks a thread to stop that has just been seized. The result, and how much of `into` tells it.
pub fn interrupt(tid: i32, into: &mut [u8]) -> Option<(i64, usize)> {
    let place = into.get_mut(Told::SIZE..)?;
    let result = kernel::ptrace(kernel::INTERRUPT, tid, 0, 0);
    let length = known::append(place, kernel::INTERRUPT, 0, result, &[]);
    Some((result, Told::head(into, tid, None, length)))
}

/// Takes note of a stop of thread `tid`, and tells what is known of it. `stop` is its status, if
/// CRIU has still to wait for it.
pub fn hear(
    tid: i32,
    status: i32,
    tracee: &mut Tracee,
    into: &mut [u8],
    stop: Option<i32>,
) -> usize {
    let Some(place) = into.get_mut(Told::SIZE..) else {
        return 0;
    };
    let length = known::collect(tid, tracee.is_home(), place);
    tracee.stopped(tid, Stop::from_status(status), &place[..length]);
    tracee.shows(|| kernel::registers(tid));
    Told::head(into, tid, stop, length)
}

/// Tells of the stops of those behind `tid` whom CRIU is going to wait for, as far as they have
/// stopped and there is room.
pub fn next_stops(tid: i32, tracees: &mut BTreeMap<i32, Tracee>, into: &mut [u8]) -> usize {
    let (mut told, mut missed) = (0, 0);
    let behind = tracees.range_mut(tid + 1..);
    for (tid, tracee) in behind.filter(|(_, tracee)| tracee.is_expected()) {
        let place = &mut into[told..];
        if place.len() < Told::SIZE + known::ROOM || missed == MISSED_MAX {
            break;
        }
        match kernel::stop_of(*tid) {
            Some(status) => told += hear(*tid, status, tracee, place, Some(status)),
            None => missed += 1,
        }
    }
    told
}

/// Waits for the stop of a thread that was sent on an errand, and tells of it.
pub fn next_stop(tid: i32, tracee: &mut Tracee, into: &mut [u8]) -> usize {
    let deadline = Instant::now() + ERRAND_TIME_MAX;
    loop {
        if let Some(status) = kernel::stop_of(tid) {
            return hear(tid, status, tracee, into, Some(status));
        }
        if deadline <= Instant::now() {
            return 0;
        }
        // It may have to run on this processor.
        kernel::give_way();
    }
}

/// A look into a thread's queue of signals that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peeked {
    tid: i32,
    /// `ptrace_peeksiginfo_args`.
    arguments: [u8; PEEK_BYTES],
}

impl Peeked {
    /// `buffer` has the arguments first. `None` if it found something.
    pub fn empty(tid: i32, buffer: &[u8], result: i64) -> Option<Self> {
        let arguments = *buffer.first_chunk()?;
        (result == 0).then_some(Self { tid, arguments })
    }

    /// Whether another thread was looked at in the same way.
    pub fn is_like(&self, other: &Self) -> bool {
        self.tid != other.tid && self.arguments == other.arguments
    }

    /// What kind of look it is, as one number: only looks from the start have one.
    pub fn kind(arguments: &[u8; PEEK_BYTES]) -> Option<u64> {
        let (from, rest) = arguments.split_first_chunk()?;
        let kind = rest.first_chunk().map(|kind| u64::from_ne_bytes(*kind))?;
        (u64::from_ne_bytes(*from) == 0).then_some(kind)
    }
}

/// Looks at the next threads in the same way as at the last one, and tells which queues are empty.
pub fn peek(last: &Peeked, tracees: &BTreeMap<i32, Tracee>, into: &mut [u8]) -> usize {
    let Some(kind) = Peeked::kind(&last.arguments) else {
        return 0;
    };
    let mut told = 0;
    let behind = tracees.range(last.tid + 1..);
    let stopped = behind.filter(|(_, tracee)| tracee.is_stopped());
    for (tid, _) in stopped.take(PEEKED_MAX) {
        let Some(place) = into[told..].get_mut(Told::SIZE..) else {
            break;
        };
        if is_empty(*tid, last.arguments) {
            let length = known::append(place, kernel::PEEKSIGINFO, kind, 0, &[]);
            told += Told::head(&mut into[told..], *tid, None, length);
        }
    }
    told
}

/// Whether a look would find nothing; for that one signal is enough.
fn is_empty(tid: i32, mut arguments: [u8; PEEK_BYTES]) -> bool {
    arguments[PEEK_BYTES - 4..].copy_from_slice(&1_u32.to_ne_bytes());
    let mut info = [0_u64; kernel::SIGINFO_BYTES / 8];
    let (asked, found) = (arguments.as_mut_ptr() as u64, info.as_mut_ptr() as u64);
    kernel::ptrace(kernel::PEEKSIGINFO, tid, asked, found) == 0
}

/// How many threads may still run before it is too early to look for others.
const MISSED_MAX: usize = 4;

/// How long CRIU is kept from what else it might do: an errand takes a tenth of that.
const ERRAND_TIME_MAX: Duration = Duration::from_micros(300);

/// So that what is told is no older than some dozen microseconds when CRIU asks for it.
const PEEKED_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(from: u64, flags: u32, wanted: u32) -> [u8; PEEK_BYTES] {
        let mut arguments = [0; PEEK_BYTES];
        arguments[..8].copy_from_slice(&from.to_ne_bytes());
        arguments[8..12].copy_from_slice(&flags.to_ne_bytes());
        arguments[12..].copy_from_slice(&wanted.to_ne_bytes());
        arguments
    }

    #[test]
    fn only_the_same_look_at_another_thread_is_a_loop() {
        let look = |tid, flags| Peeked::empty(tid, &arguments(0, flags, 32), 0).expect("empty");
        assert!(look(1, 0).is_like(&look(2, 0)));
        assert!(!look(1, 0).is_like(&look(1, 0)));
        assert!(!look(1, 0).is_like(&look(2, 1)), "the shared queue");
        assert_eq!(Peeked::empty(1, &arguments(0, 0, 32), 3), None);
        assert_eq!(Peeked::kind(&arguments(32, 0, 32)), None, "not its start");
        let private = Peeked::kind(&arguments(0, 0, 32));
        assert!(private.is_some() && private != Peeked::kind(&arguments(0, 1, 32)));
    }
}
