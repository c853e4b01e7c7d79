//! A preload library that shows CRIU less memory than there is.
//!
//! A dump asks the kernel which pages a process has (`PAGEMAP_SCAN`) and which mappings
//! (`/proc/PID/smaps`, for which the kernel walks all page tables). Both take time in proportion
//! to memory, while the process is frozen. Where somebody else has already moved pages, this
//! library answers in the kernel's place: such ranges hold no pages, and smaps is a text prepared
//! before the freeze.
//!
//! It interposes `ioctl` and `openat` in a dynamically linked `criu`. The rule is *the real call on
//! any doubt*: no feed, a feed that is unpublished, malformed or changes while it is read, a
//! descriptor that is not what it should be, a scan that CRIU does not make today. A scan for guard
//! regions goes to the kernel for everything that is not hidden, and for all of it unless the
//! guards within the hidden ranges were told.
//!
//! It also answers for limits that the kernel does not tell (see `limits`), and leaves tracing to a
//! process that outlives CRIU (see `calls`).
//!
//! Of a restore it changes one thing, where it is asked to (see `reaper`). Absent: every other help
//! for restores. A restored task must never run with this library's answers.

// Interposing is made of C calls; the pure part is in `cut` and `layout`.
#![allow(unsafe_code)]
// The test binary keeps its own ioctl and openat.
#![cfg_attr(test, allow(dead_code))]

#[cfg(target_arch = "x86_64")]
mod calls;
mod cut;
mod feed;
mod layout;
mod limits;
mod program;
mod reaper;

use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};

use cut::Region;
use feed::{Feed, count};
use layout::{Counter, Range};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("variadic functions are interposed by their 64-bit calling convention");

/// `struct pm_scan_arg` of `linux/fs.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
const _: () = assert!(size_of::<ScanArgument>() == 0x60);
const _: () = assert!(size_of::<Region>() == 24);

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Runs before `main`, in every program this library is preloaded into. CRIU alone is meant; the
/// other side checks that it is CRIU that has the feed.
#[cfg_attr(not(test), used, unsafe(link_section = ".init_array"))]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn constructor() {
        if program::is_interpreter() {
            return;
        }
        reaper::attach();
        if feed::attach() {
            #[cfg(target_arch = "x86_64")]
            calls::attach();
        }
    }
    constructor
};

/// `ioctl(2)`. Not variadic: on 64-bit Linux the third argument is in the same register.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request == PAGEMAP_SCAN && !argument.is_null() {
        // SAFETY: the caller passes what the kernel expects with this request.
        let scan = unsafe { &mut *argument.cast::<ScanArgument>() };
        let seen = scan_through_view(fd, scan).or_else(|| guards_through_view(fd, scan));
        if let Some(found) = seen {
            return found;
        }
        count(Counter::ScansPassed);
    }
    real_ioctl(fd, request, argument)
}

/// `openat(2)`. The mode is ignored by the kernel when nothing is created.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    if let Some(fd) = smaps_through_view(directory, path, flags) {
        return fd;
    }
    real_openat(directory, path, flags, mode)
}

/// On 64-bit Linux the same as [`openat`].
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn openat64(directory: c_int, path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    openat(directory, path, flags, mode)
}

/// What `openat` without a mode becomes in a fortified program.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn __openat_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    openat(directory, path, flags, 0)
}

/// What `openat64` without a mode becomes in a fortified program.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn __openat64_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    openat(directory, path, flags, 0)
}

/// The number of regions found outside what is hidden, or `None` to let the kernel answer.
fn scan_through_view(fd: c_int, scan: &mut ScanArgument) -> Option<c_int> {
    if !asks_for_contents(scan) {
        return None;
    }
    let feed = Feed::current()?;
    let pid = process_of(fd, b"/pagemap")?;
    let space = feed.space(pid)?;
    let hidden = feed.hidden(&space, scan.start, scan.end)?;
    if !feed.is_unchanged() {
        return None;
    }
    let first = hidden.first()?;
    if first.start <= scan.start && first.end >= scan.end {
        scan.walk_end = scan.end;
        count(Counter::ScansHidden);
        return Some(0);
    }
    let found = real_ioctl(fd, PAGEMAP_SCAN, std::ptr::from_mut(scan).cast());
    count(Counter::ScansCut);
    let Ok(length) = usize::try_from(found) else {
        return Some(found);
    };
    let limit = usize::try_from(scan.vec_len).ok()?;
    let regions = scan.vec as *mut Region;
    if length == 0 || length > limit || regions.is_null() || !regions.is_aligned() {
        return Some(found);
    }
    // SAFETY: the kernel has just filled `length` regions of the caller's `vec_len`.
    let slice = unsafe { std::slice::from_raw_parts_mut(regions, length) };
    // Without memory for cutting, all of the kernel's answer is a right answer too.
    let Some(answer) = cut::cut(slice, &hidden, limit) else {
        return Some(found);
    };
    // SAFETY: at most `limit` regions, the length of the caller's array, from our own memory.
    unsafe { regions.copy_from_nonoverlapping(answer.regions.as_ptr(), answer.regions.len()) };
    scan.walk_end = answer.walk_end.unwrap_or(scan.walk_end);
    c_int::try_from(answer.regions.len()).ok()
}

/// The number of guard regions: those that were told of hidden ranges, and those the kernel finds
/// elsewhere. `None` to let the kernel answer.
fn guards_through_view(fd: c_int, scan: &mut ScanArgument) -> Option<c_int> {
    if !asks_for_guards(scan) {
        return None;
    }
    let feed = Feed::current()?;
    let pid = process_of(fd, b"/pagemap")?;
    let space = feed.space(pid)?;
    let hidden = feed.hidden(&space, scan.start, scan.end)?;
    let guards = feed.guards(&space, scan.start, scan.end)?;
    if !feed.is_unchanged() || HIDDEN_MAX < hidden.len() {
        return None;
    }
    let limit = usize::try_from(scan.vec_len).ok()?;
    let regions = scan.vec as *mut Region;
    if limit == 0 || regions.is_null() || !regions.is_aligned() {
        return None;
    }
    let asked = *scan;
    let wanted = Range {
        start: scan.start,
        end: scan.end,
    };
    let answer = cut::fill(wanted, &hidden, &guards, limit, |gap, into| {
        scan_gap(fd, asked, gap, into)
    })?;
    // SAFETY: at most `limit` regions, the length of the caller's array, from our own memory.
    unsafe { regions.copy_from_nonoverlapping(answer.regions.as_ptr(), answer.regions.len()) };
    scan.walk_end = answer.walk_end.unwrap_or(scan.end);
    count(Counter::GuardsServed);
    c_int::try_from(answer.regions.len()).ok()
}

/// What the kernel finds from the start of `gap` on, and how far it came.
fn scan_gap(fd: c_int, asked: ScanArgument, gap: Range, into: &mut Vec<Region>) -> Option<u64> {
    into.try_reserve(GAP_REGIONS).ok()?;
    let mut scan = ScanArgument {
        start: gap.start,
        end: gap.end,
        walk_end: 0,
        vec: into.spare_capacity_mut().as_mut_ptr() as u64,
        vec_len: GAP_REGIONS as u64,
        ..asked
    };
    let found = real_ioctl(fd, PAGEMAP_SCAN, (&raw mut scan).cast());
    let found = usize::try_from(found)
        .ok()
        .filter(|found| *found <= GAP_REGIONS)?;
    // SAFETY: the kernel has just written `found` regions behind those that were there, and no more
    // than were reserved.
    unsafe { into.set_len(into.len() + found) };
    Some(scan.walk_end)
}

/// With more hidden ranges than these, asking for every gap between them would take longer than one
/// scan of everything: some microseconds each.
const HIDDEN_MAX: usize = 2048;

/// How many regions the kernel may tell at once of what is not hidden.
const GAP_REGIONS: usize = 1024;

/// Whether this is CRIU's search for guard regions, and for nothing else.
fn asks_for_guards(scan: &ScanArgument) -> bool {
    scan.size == size_of::<ScanArgument>() as u64
        && scan.flags == 0
        && scan.max_pages == 0
        && scan.start < scan.end
        && scan.category_mask == cut::GUARD
        && scan.return_mask == cut::GUARD
        && scan.category_inverted == 0
        && scan.category_anyof_mask == 0
}

/// Whether this is CRIU's search for pages it would copy: no write-protecting, no guards, and
/// matching only pages that are present or swapped.
fn asks_for_contents(scan: &ScanArgument) -> bool {
    let contents = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
    scan.size == size_of::<ScanArgument>() as u64
        && scan.flags == 0
        && scan.start < scan.end
        && (scan.category_mask | scan.category_inverted) & (cut::GUARD | contents) == 0
        && scan.category_anyof_mask != 0
        && scan.category_anyof_mask & !contents == 0
}

/// A descriptor with the recorded smaps of the process whose directory `directory` is.
fn smaps_through_view(directory: c_int, path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() || flags & libc::O_ACCMODE != libc::O_RDONLY {
        return None;
    }
    // SAFETY: the caller passes a C string to openat.
    if unsafe { CStr::from_ptr(path) } != c"smaps" {
        return None;
    }
    let opened = open_recorded(directory, flags);
    count(if opened.is_some() {
        Counter::SmapsServed
    } else {
        Counter::SmapsPassed
    });
    opened
}

fn open_recorded(directory: c_int, flags: c_int) -> Option<c_int> {
    let feed = Feed::current()?;
    let space = feed.space(process_of(directory, b"")?)?;
    let (text, length) = feed.smaps(&space)?;
    let inherit = if flags & libc::O_CLOEXEC == 0 {
        0
    } else {
        libc::MFD_CLOEXEC
    };
    // A file of its own: each open has its own offset, and nobody can change what is read.
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"smaps".as_ptr(), inherit) };
    if fd < 0 {
        return None;
    }
    // SAFETY: `text` and `length` lie inside the feed; pwrite leaves the offset at the start.
    let written = unsafe { libc::pwrite(fd, text, length, 0) };
    if usize::try_from(written) == Ok(length) && feed.is_unchanged() {
        return Some(fd);
    }
    // SAFETY: opened above, known to nobody else.
    unsafe { libc::close(fd) };
    None
}

/// The PID for which `fd` is open on `/proc/PID` + `suffix`.
fn process_of(fd: c_int, suffix: &[u8]) -> Option<i32> {
    let link = format_link(fd)?;
    let mut target = [0_u8; 64];
    // SAFETY: `link` is a C string; at most the buffer's length is written.
    let length = unsafe {
        libc::readlink(
            link.as_ptr().cast(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    };
    let target = target.get(..usize::try_from(length).ok()?)?;
    let number = target.strip_prefix(b"/proc/")?.strip_suffix(suffix)?;
    if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// `/proc/self/fd/N` with its final zero, without allocating.
fn format_link(fd: c_int) -> Option<[u8; 32]> {
    use std::io::Write;

    let mut link = [0; 32];
    write!(link.as_mut_slice(), "/proc/self/fd/{fd}\0").ok()?;
    Some(link)
}

// The kernel is asked directly: there is no symbol to look up, so no library that could be missing
// or not yet initialised. `syscall` sets errno as the functions it stands for do.

fn real_ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: passed on as it came.
    to_int(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) })
}

fn real_openat(directory: c_int, path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: passed on as it came.
    to_int(unsafe { libc::syscall(libc::SYS_openat, directory, path, flags, mode) })
}

/// ioctl and openat return an int in the kernel, too.
fn to_int(result: c_long) -> c_int {
    c_int::try_from(result).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    /// The scan of CRIU 4.2's `pmc_fill`.
    fn criu_scan() -> ScanArgument {
        ScanArgument {
            size: 96,
            flags: 0,
            start: 4096,
            end: 8192,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0x24,
            category_mask: 0x24,
            category_anyof_mask: 0x18,
            return_mask: 0x198,
        }
    }

    #[test]
    fn only_a_search_for_contents_is_answered_by_the_view() {
        assert!(asks_for_contents(&criu_scan()));
        let other = |change: fn(&mut ScanArgument)| {
            let mut scan = criu_scan();
            change(&mut scan);
            assert!(!asks_for_contents(&scan));
        };
        other(|scan| scan.flags = 1);
        other(|scan| scan.category_mask = cut::GUARD);
        other(|scan| scan.category_inverted |= PAGE_IS_PRESENT);
        other(|scan| scan.category_anyof_mask = 0);
        other(|scan| scan.category_anyof_mask = 2);
        other(|scan| scan.size = 88);
        other(|scan| scan.end = scan.start);
    }

    /// As `collect_madv_guards` in CRIU's `mem.c` asks.
    fn criu_guard_scan() -> ScanArgument {
        ScanArgument {
            category_inverted: 0,
            category_mask: cut::GUARD,
            category_anyof_mask: 0,
            return_mask: cut::GUARD,
            ..criu_scan()
        }
    }

    #[test]
    fn only_a_search_for_guards_is_answered_with_guards() {
        assert!(asks_for_guards(&criu_guard_scan()));
        assert!(!asks_for_guards(&criu_scan()));
        let other = |change: fn(&mut ScanArgument)| {
            let mut scan = criu_guard_scan();
            change(&mut scan);
            assert!(!asks_for_guards(&scan));
        };
        other(|scan| scan.flags = 1);
        other(|scan| scan.max_pages = 1);
        other(|scan| scan.category_mask |= PAGE_IS_PRESENT);
        other(|scan| scan.category_inverted = cut::GUARD);
        other(|scan| scan.category_anyof_mask = PAGE_IS_SWAPPED);
        other(|scan| scan.return_mask = 0);
        other(|scan| scan.size = 88);
        other(|scan| scan.end = scan.start);
    }

    #[test]
    fn the_kernel_is_asked_for_guards_in_a_gap() {
        const GUARD_INSTALL: c_int = 102;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (length, protection) = (16 * 4096, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, anonymous, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let start = base as u64;
        let page = |index: u64| start + index * 4096;
        for (first, count) in [(2, 1), (8, 4)] {
            // SAFETY: inside the new mapping, which nobody uses.
            let installed =
                unsafe { libc::madvise(page(first) as *mut c_void, count * 4096, GUARD_INSTALL) };
            if installed != 0 {
                let error = std::io::Error::last_os_error();
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
                eprintln!("this kernel has no guard regions (Linux 6.13)");
                return;
            }
        }
        let pagemap = File::open("/proc/self/pagemap").expect("procfs");
        let gap = Range {
            start: page(1),
            end: page(10),
        };
        let mut found = Vec::new();
        let walked = scan_gap(pagemap.as_raw_fd(), criu_guard_scan(), gap, &mut found);
        assert_eq!(walked, Some(page(10)));
        let guard = |start, end| Region {
            start,
            end,
            categories: cut::GUARD,
        };
        assert_eq!(found, [guard(page(2), page(3)), guard(page(8), page(10))]);
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(base, length) };
    }

    #[test]
    fn a_descriptor_tells_whose_it_is() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let pagemap = File::open("/proc/self/pagemap").expect("procfs");
        assert_eq!(process_of(pagemap.as_raw_fd(), b"/pagemap"), Some(own));
        assert_eq!(process_of(pagemap.as_raw_fd(), b""), None);
        let directory = File::open(format!("/proc/{own}")).expect("procfs");
        assert_eq!(process_of(directory.as_raw_fd(), b""), Some(own));
        let elsewhere = File::open("/proc/sys").expect("procfs");
        assert_eq!(process_of(elsewhere.as_raw_fd(), b""), None);
        assert_eq!(process_of(-1, b""), None);
    }

    #[test]
    fn without_a_feed_the_kernel_answers() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let directory = File::open(format!("/proc/{own}")).expect("procfs");
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        let fd = openat(directory.as_raw_fd(), c"smaps".as_ptr(), flags, 0);
        assert!(fd >= 0);
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).expect("open descriptor");
        assert_eq!(link, std::path::PathBuf::from(format!("/proc/{own}/smaps")));
        // SAFETY: opened above.
        unsafe { libc::close(fd) };
    }
}
