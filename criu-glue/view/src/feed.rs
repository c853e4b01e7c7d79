//! The mapped feed, read with doubt: whatever does not fit is answered with `None`, and then the
//! kernel is asked.

use std::ffi::{CStr, CString, OsString, c_void};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};

use crate::layout::{
    CAPACITY, COUNTERS_AT, Counter, FEED_VARIABLE, GENERATION_AT, Header, Range, SPACES_AT, Space,
};

/// Start of the mapping; null until the constructor has found a feed. It stays mapped until the
/// process ends or execs.
static MAPPING: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// A published feed at one generation.
pub struct Feed {
    base: *const u8,
    header: Header,
}

/// Takes the feed named in the environment and makes the environment forget it and us, so that
/// nothing CRIU starts is preloaded.
///
/// The descriptor is closed: it must not be among CRIU's own when it moves those about.
///
/// True if there is a feed of this version.
pub fn attach() -> bool {
    let Some(fd) = feed_descriptor() else {
        return false;
    };
    let mut known = false;
    if let Some(base) = map(fd) {
        MAPPING.store(base, Ordering::Release);
        // The other side refuses to dump if nobody says so.
        known = read(base, 0).is_some_and(|bytes| Header::is_known(&bytes));
        if known {
            count(Counter::Attached);
        }
    }
    // SAFETY: a descriptor meant for us alone; closing a wrong number only fails.
    unsafe { libc::close(fd) };
    known
}

fn feed_descriptor() -> Option<i32> {
    // SAFETY: the process has one thread while its libraries are initialised.
    unsafe { libc::unsetenv(c"LD_PRELOAD".as_ptr()) };
    variable(FEED_VARIABLE)?.to_str()?.parse().ok()
}

/// The value of a variable of the environment, which forgets it. In a process that has one thread.
pub fn variable(name: &str) -> Option<OsString> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string; the value is copied before the environment is changed, by the
    // one thread there is while libraries are initialised.
    unsafe {
        let value = libc::getenv(name.as_ptr());
        if value.is_null() {
            return None;
        }
        let value = OsString::from_vec(CStr::from_ptr(value).to_bytes().to_vec());
        libc::unsetenv(name.as_ptr());
        Some(value)
    }
}

fn map(fd: i32) -> Option<*mut u8> {
    // Without the seal a shrinking file would turn a read into SIGBUS.
    // SAFETY: fcntl takes numbers only.
    let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return None;
    }
    // SAFETY: a zeroed stat is a valid one to be written to.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and of the right type.
    let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
    let length = usize::try_from(CAPACITY).ok()?;
    if !known || u64::try_from(stat.st_size).ok()? < CAPACITY {
        return None;
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    (base != libc::MAP_FAILED).then_some(base.cast())
}

/// Counts, if there is a feed.
pub fn count(counter: Counter) {
    let base = MAPPING.load(Ordering::Acquire);
    if base.is_null() {
        return;
    }
    let Ok(at) = usize::try_from(COUNTERS_AT + 8 * counter as u64) else {
        return;
    };
    // SAFETY: inside the mapping, which is page-aligned, so the counter is aligned to 8; the other
    // side only reads it.
    let counter = unsafe { AtomicU64::from_ptr(base.add(at).cast()) };
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Feed {
    /// The feed, if there is one and it is published.
    pub fn current() -> Option<Self> {
        let base = MAPPING.load(Ordering::Acquire);
        if base.is_null() { None } else { Self::at(base) }
    }

    fn at(base: *const u8) -> Option<Self> {
        let generation = read(base, GENERATION_AT).map(u64::from_ne_bytes)?;
        fence(Ordering::Acquire);
        let header = Header::from_bytes(&read(base, 0)?)?;
        (header.generation == generation).then_some(Self { base, header })
    }

    /// Whether everything read since [`Self::current`] belongs to one published state.
    pub fn is_unchanged(&self) -> bool {
        fence(Ordering::Acquire);
        read(self.base, GENERATION_AT)
            .is_some_and(|now| u64::from_ne_bytes(now) == self.header.generation)
    }

    pub fn space(&self, pid: i32) -> Option<Space> {
        (0..u64::from(self.header.spaces))
            .filter_map(|index| read(self.base, SPACES_AT + index * Space::SIZE as u64))
            .filter_map(|bytes| Space::from_bytes(&bytes, CAPACITY))
            .find(|space| space.pid == pid)
    }

    /// Hidden ranges that overlap `start..end`, or `None` if the table is malformed.
    pub fn hidden(&self, space: &Space, start: u64, end: u64) -> Option<Vec<Range>> {
        self.overlapping(space.ranges_at, space.ranges, start, end)
    }

    /// Guard regions within hidden ranges that overlap `start..end`, or `None` if the table is
    /// malformed or there is none.
    pub fn guards(&self, space: &Space, start: u64, end: u64) -> Option<Vec<Range>> {
        if space.guards_at == 0 {
            return None;
        }
        self.overlapping(space.guards_at, space.guards, start, end)
    }

    /// What of a table of `count` ranges overlaps `start..end`.
    fn overlapping(&self, table: u64, count: u32, start: u64, end: u64) -> Option<Vec<Range>> {
        let first = self.first_ending_after(table, count, start)?;
        let mut found: Vec<Range> = Vec::new();
        for index in first..count {
            let range = self.range(table, index)?;
            if range.start >= end {
                break;
            }
            let sorted = found.last().is_none_or(|last| last.end <= range.start);
            if range.start >= range.end || !sorted || found.try_reserve(1).is_err() {
                return None;
            }
            found.push(range);
        }
        Some(found)
    }

    fn first_ending_after(&self, table: u64, count: u32, address: u64) -> Option<u32> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.range(table, middle)?.end <= address {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Some(low)
    }

    fn range(&self, table: u64, index: u32) -> Option<Range> {
        let at = table.checked_add(u64::from(index) * Range::SIZE as u64)?;
        read(self.base, at).map(|bytes| Range::from_bytes(&bytes))
    }

    /// Where the smaps text of `space` lies, for a system call to read.
    pub fn smaps(&self, space: &Space) -> Option<(*const c_void, usize)> {
        if space.smaps_length == 0 || space.smaps_at.checked_add(space.smaps_length)? > CAPACITY {
            return None;
        }
        let at = usize::try_from(space.smaps_at).ok()?;
        let length = usize::try_from(space.smaps_length).ok()?;
        // SAFETY: `at` and `at + length` lie inside the mapping, checked above.
        Some((unsafe { self.base.add(at) }.cast(), length))
    }
}

/// Copies `N` bytes out of the feed, `None` outside of it.
fn read<const N: usize>(base: *const u8, at: u64) -> Option<[u8; N]> {
    if at.checked_add(N as u64)? > CAPACITY {
        return None;
    }
    let at = usize::try_from(at).ok()?;
    // SAFETY: inside the mapping, checked above; it is never unmapped and its file cannot shrink.
    // A byte array has no alignment and no invalid values; volatile, because the other side may
    // write at any time, which `is_unchanged` finds out.
    Some(unsafe { base.add(at).cast::<[u8; N]>().read_volatile() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::VERSION;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::FileExt;

    /// A memory file as the writer makes it, and its mapping.
    fn memory() -> (File, *const u8) {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string; the descriptor is new and owned by the file alone.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"feed".as_ptr(), flags)) };
        file.set_len(CAPACITY).expect("a sparse file");
        assert!(
            map(file.as_raw_fd()).is_none(),
            "an unsealed file is not trusted"
        );
        // SAFETY: numbers only.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        let base = map(file.as_raw_fd()).expect("a sealed file is mapped");
        (file, base)
    }

    fn write(file: &File, header: Header, space: Space, ranges: &[(u64, u64)]) {
        for (index, &(start, end)) in (0..).zip(ranges) {
            let bytes = Range { start, end }.to_bytes();
            file.write_all_at(&bytes, space.ranges_at + 16 * index)
                .expect("room");
        }
        file.write_all_at(&space.to_bytes(), SPACES_AT)
            .expect("room");
        file.write_all_at(&header.to_bytes(), 0).expect("room");
    }

    const HEADER: Header = Header {
        spaces: 1,
        generation: 1,
    };
    const SPACE: Space = Space {
        pid: 7,
        ranges: 3,
        ranges_at: 8192,
        smaps_at: 0,
        smaps_length: 0,
        guards_at: 0,
        guards: 0,
    };

    #[test]
    fn overlapping_ranges_are_found() {
        let (file, base) = memory();
        write(&file, HEADER, SPACE, &[(10, 20), (30, 40), (50, 60)]);
        let feed = Feed::at(base).expect("published");
        let space = feed.space(7).expect("known process");
        let check = |start, end, expected: &[(u64, u64)]| {
            let found = feed.hidden(&space, start, end).expect("well formed");
            let found: Vec<_> = found.iter().map(|range| (range.start, range.end)).collect();
            assert_eq!(found, expected);
        };
        check(0, 10, &[]);
        check(0, 11, &[(10, 20)]);
        check(19, 31, &[(10, 20), (30, 40)]);
        check(20, 30, &[]);
        check(0, 100, &[(10, 20), (30, 40), (50, 60)]);
        check(60, 100, &[]);
        assert!(feed.space(8).is_none());
        assert!(feed.smaps(&space).is_none());
    }

    #[test]
    fn an_unpublished_or_changed_feed_is_not_used() {
        let (file, base) = memory();
        assert!(Feed::at(base).is_none(), "all zero");
        write(
            &file,
            Header {
                generation: 0,
                ..HEADER
            },
            SPACE,
            &[],
        );
        assert!(Feed::at(base).is_none(), "unpublished");
        write(
            &file,
            Header {
                spaces: u32::MAX,
                ..HEADER
            },
            SPACE,
            &[],
        );
        assert!(Feed::at(base).is_none(), "absurd count");
        write(&file, HEADER, SPACE, &[]);
        let feed = Feed::at(base).expect("published");
        assert!(feed.is_unchanged());
        write(
            &file,
            Header {
                generation: 2,
                ..HEADER
            },
            SPACE,
            &[],
        );
        assert!(!feed.is_unchanged());
        file.write_all_at(&(VERSION + 1).to_ne_bytes(), 8)
            .expect("room");
        assert!(Feed::at(base).is_none(), "another version");
    }

    #[test]
    fn a_malformed_table_is_not_used() {
        let (file, base) = memory();
        let hidden = |space: Space, ranges: &[(u64, u64)]| {
            write(&file, HEADER, space, ranges);
            let feed = Feed::at(base).expect("published");
            feed.space(7)
                .and_then(|space| feed.hidden(&space, 0, u64::MAX))
        };
        assert!(
            hidden(SPACE, &[(10, 20), (15, 40), (50, 60)]).is_none(),
            "overlapping"
        );
        assert!(
            hidden(SPACE, &[(10, 20), (40, 30), (50, 60)]).is_none(),
            "backwards"
        );
        for broken in [
            Space {
                ranges_at: u64::MAX,
                ..SPACE
            },
            Space {
                ranges_at: CAPACITY - 16,
                ..SPACE
            },
            Space {
                ranges: u32::MAX,
                ..SPACE
            },
            Space {
                smaps_at: CAPACITY,
                smaps_length: 1,
                ..SPACE
            },
            Space {
                smaps_at: u64::MAX,
                smaps_length: u64::MAX,
                ..SPACE
            },
        ] {
            file.write_all_at(&broken.to_bytes(), SPACES_AT)
                .expect("room");
            file.write_all_at(&HEADER.to_bytes(), 0).expect("room");
            let feed = Feed::at(base).expect("published");
            assert!(feed.space(7).is_none(), "{broken:?}");
        }
    }
}
