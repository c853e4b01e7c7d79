//! `PAGEMAP_SCAN`: which pages of another process are there, and which were written.
//!
//! The ioctl is in Linux since 6.7, `PAGE_IS_GUARD` since 6.15 (`include/uapi/linux/fs.h`). One
//! call walks a range, returns runs of pages of equal categories, and with [`Protect::Written`]
//! write-protects what it returns under the same page-table lock, so that no write falls between
//! the two.
//!
//! A scan that fails in the middle has already protected pages it does not report: the caller must
//! treat the whole range it asked for as written.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// A set of page categories, as the kernel's `PAGE_IS_*` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// No category.
    pub const NONE: Self = Self(0);
    /// The page may be write-protected asynchronously: its mapping is tracked.
    pub const WPALLOWED: Self = Self(1 << 0);
    /// Written since it was last protected, or never protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// The page belongs to a file (a private copy of a file's page does not).
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// In swap, under migration, or one of the kernel's markers that look like either.
    pub const SWAPPED: Self = Self(1 << 4);
    /// The shared zero page.
    pub const PFNZERO: Self = Self(1 << 5);
    /// A guard region of `MADV_GUARD_INSTALL`: no memory, any access is a fault.
    pub const GUARD: Self = Self(1 << 8);

    /// The categories of either set.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in this set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A run of pages with equal categories (`struct page_region`). Addresses in bytes, end exclusive.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// Address of the first page.
    pub start: u64,
    /// Address after the last page.
    pub end: u64,
    categories: u64,
}

impl PageRegion {
    /// Its categories, as far as they were asked for.
    pub const fn categories(&self) -> Categories {
        Categories(self.categories)
    }
}

/// What to protect while scanning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protect {
    /// Nothing: a look.
    Nothing,
    /// The pages that are returned and written.
    Written,
}

/// Which pages a scan returns, and what it says of them.
#[derive(Clone, Copy, Debug)]
pub struct ScanRequest {
    /// Address of the first page.
    pub start: u64,
    /// Address after the last page.
    pub end: u64,
    /// What to protect.
    pub protect: Protect,
    /// Fail with `EPERM` when a mapping in the range is not tracked.
    pub tracked_only: bool,
    /// Only pages that have all of these.
    pub all_of: Categories,
    /// Only pages that have none of these.
    pub none_of: Categories,
    /// Only pages that have one of these, unless empty.
    pub any_of: Categories,
    /// What to report of each page; runs are cut where it changes.
    pub report: Categories,
    /// End after so many pages that were returned; 0 for all. A huge page that does not fit is
    /// split.
    pub pages_max: u64,
}

/// What one call returned.
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// How many elements of the buffer were filled.
    pub regions: usize,
    /// Where the walk ended: the end of the request, or where the buffer was full or there were
    /// enough pages.
    pub walk_end: u64,
}

/// `/proc/PID/pagemap`, bound to the memory the process had when it was opened. After an exec or
/// an exit every scan finds nothing and succeeds.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens that of `pid`. Needs `PTRACE_MODE_READ` on it.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Scans until the range ends or `regions` is full.
    pub fn scan(&self, request: &ScanRequest, regions: &mut [PageRegion]) -> io::Result<Scanned> {
        scan(self.0.as_fd(), request, regions)
    }
}

fn scan(
    pagemap: BorrowedFd<'_>,
    request: &ScanRequest,
    regions: &mut [PageRegion],
) -> io::Result<Scanned> {
    let mut flags = 0;
    if request.protect == Protect::Written {
        flags |= PM_SCAN_WP_MATCHING;
    }
    if request.tracked_only {
        flags |= PM_SCAN_CHECK_WPASYNC;
    }
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags,
        start: request.start,
        end: request.end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: request.pages_max,
        category_inverted: request.none_of.0,
        category_mask: request.all_of.0 | request.none_of.0,
        category_anyof_mask: request.any_of.0,
        return_mask: request.report.0,
    };
    // SAFETY: `arg` is the struct this request number is made of (size asserted below), it lives
    // across the call, and `vec`/`vec_len` describe exactly the writable memory of `regions`, whose
    // element has the kernel's layout (asserted below) and no invalid bit patterns.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    Ok(Scanned {
        regions: count,
        walk_end: arg.walk_end,
    })
}

/// Whether this kernel scans page maps at all, and whether it tells guard regions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanSupport {
    /// `PAGEMAP_SCAN` is there.
    pub scan: bool,
    /// `PAGE_IS_GUARD` is a category.
    pub guard: bool,
}

/// Asks this kernel, by looking at no page of the calling process.
pub fn probe() -> io::Result<ScanSupport> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let look = |none_of| {
        let request = ScanRequest {
            start: 0,
            end: 0,
            protect: Protect::Nothing,
            tracked_only: false,
            all_of: Categories::NONE,
            none_of,
            any_of: Categories::PRESENT,
            report: Categories::NONE,
            pages_max: 0,
        };
        scan(pagemap.as_fd(), &request, &mut []).is_ok()
    };
    Ok(ScanSupport {
        scan: look(Categories::NONE),
        guard: look(Categories::GUARD),
    })
}

/// Whether this kernel has guard regions, by making one in memory of the calling process.
pub fn guard_regions() -> io::Result<bool> {
    let memory = memmap2::MmapMut::map_anon(PAGE_BYTES)?;
    let address = memory.as_ptr().cast_mut().cast();
    // SAFETY: the page is ours alone, nothing refers to its contents, and it is unmapped below
    // without having been touched.
    let result = unsafe { libc::madvise(address, PAGE_BYTES, MADV_GUARD_INSTALL) };
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        error => Err(error),
    }
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct PmScanArg {
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

const _: () = assert!(size_of::<PmScanArg>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

/// From `include/uapi/asm-generic/mman-common.h`, since Linux 6.13.
const MADV_GUARD_INSTALL: libc::c_int = 102;

const PAGE_BYTES: usize = 4096;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = nix::request_code_readwrite!(b'f', 16, size_of::<PmScanArg>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_finds_the_pages_that_were_touched() {
        let mut memory = memmap2::MmapMut::map_anon(8 * 4096).unwrap();
        memory[2 * 4096] = 1;
        memory[3 * 4096] = 1;
        let start = memory.as_ptr() as u64;
        let request = ScanRequest {
            start,
            end: start + 8 * 4096,
            protect: Protect::Nothing,
            tracked_only: false,
            all_of: Categories::NONE,
            none_of: Categories::PFNZERO,
            any_of: Categories::PRESENT.with(Categories::SWAPPED),
            report: Categories::PRESENT,
            pages_max: 0,
        };
        let mut regions = [PageRegion::default(); 4];
        let pagemap = Pagemap::open(std::process::id().cast_signed()).unwrap();
        let scanned = pagemap.scan(&request, &mut regions).unwrap();
        assert_eq!((scanned.regions, scanned.walk_end), (1, request.end));
        assert_eq!(regions[0].start, start + 2 * 4096);
        assert_eq!(regions[0].end, start + 4 * 4096);
        assert!(regions[0].categories().has(Categories::PRESENT));
        let one = ScanRequest {
            pages_max: 1,
            ..request
        };
        let scanned = pagemap.scan(&one, &mut regions).unwrap();
        assert_eq!((scanned.regions, scanned.walk_end), (1, start + 3 * 4096));
    }
}
