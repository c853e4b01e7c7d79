//! Reading pages of a process from outside, in batches.
//!
//! `process_vm_readv` is the way; ranges the process itself may not read (PROT_NONE heaps) come
//! through `/proc/PID/mem`. What cannot be read either way is reported as such and never taken for
//! zero: it may be unmapped, and then the next scan does not want it, or it stays dirty. After the
//! last scan there is nothing of either kind: then each page is tried.
//!
//! A process may be read while it runs. A page that changes during the read is torn; its write is
//! found by the next scan, because scans protect before they return.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use pageferry_proto::page::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::ErrorCode;
use pageferry_sys::process_vm::{self, ProcessMemory, RUNS_MAX, RemoteRun};
use pageferry_sys::ptrace;
use thiserror::Error;

/// Reads the memory of one process.
#[derive(Debug)]
pub struct Reader {
    pid: i32,
    /// Tells that the pid still names the process: it does as long as the process has not ended.
    pidfd: OwnedFd,
    memory: ProcessMemory,
}

/// Which pages a read got. Their bytes are in the buffer in this order, without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// In the buffer.
    pub read: PageSet,
    /// Could not be read: unmapped in the meantime, or of a kind that nobody can read.
    pub unread: PageSet,
}

/// What becomes of the rest of a run in which many pages in a row could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misses {
    /// It is given up: unmapped, most likely, and the next scan will say so.
    GiveUp,
    /// Each of its pages is tried: no scan follows that could say anything.
    Settle,
}

/// Why nothing can be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The process has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The kernel refuses.
    #[error("cannot read the memory of process {pid}")]
    Refused {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ReadError {
    /// What to tell the peer and the operator.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Gone { .. } => ErrorCode::WorkloadGone,
            Self::Refused { .. } => ErrorCode::Untrackable,
        }
    }
}

impl Reader {
    /// Opens the memory of process `pid`, which `pidfd` refers to.
    pub fn open(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        let memory = ProcessMemory::open(pid)?;
        Ok(Self { pid, pidfd, memory })
    }

    /// The process.
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Whether the process has ended, all its threads and not the first alone.
    pub fn has_ended(&self) -> bool {
        !ptrace::is_alive(self.pidfd.as_fd())
    }

    /// Reads `wanted` into `buffer`, which has room for all of it. Blocks.
    pub fn read(
        &self,
        wanted: &PageSet,
        buffer: &mut [u8],
        misses: Misses,
    ) -> Result<Pages, ReadError> {
        let mut progress = Progress {
            read: Vec::new(),
            unread: Vec::new(),
            filled: 0,
            misses,
        };
        let mut cursor = Cursor {
            runs: wanted.runs(),
            start: PageIndex(0),
        };
        let mut batch = Vec::with_capacity(RUNS_MAX.min(wanted.runs().len()));
        while cursor.fill(&mut batch) {
            let pages = self.read_batch(&batch, &mut progress, buffer)?;
            let all = batch.iter().map(PageRun::count).sum::<PageCount>();
            cursor.advance(pages);
            if pages < all {
                let rest = cursor.run().expect("a short read leaves pages");
                cursor.advance(self.read_by_file(rest, &mut progress, buffer)?);
            }
        }
        // Only now is it certain that the pid named this process all the time.
        if self.has_ended() {
            return Err(ReadError::Gone { pid: self.pid });
        }
        Ok(Pages {
            read: PageSet::from_runs(progress.read),
            unread: PageSet::from_runs(progress.unread),
        })
    }

    /// Reads runs in one call; returns how many pages of them it got.
    fn read_batch(
        &self,
        batch: &[PageRun],
        progress: &mut Progress,
        buffer: &mut [u8],
    ) -> Result<PageCount, ReadError> {
        let remote: Vec<RemoteRun> = batch
            .iter()
            .map(|run| RemoteRun {
                address: run.address(),
                len: bytes(run.count()),
            })
            .collect();
        let room = &mut buffer[progress.filled..];
        let wanted: usize = remote.iter().map(|run| run.len).sum();
        let read = match process_vm::read(self.pid, &remote, &mut room[..wanted]) {
            Ok(read) => read,
            Err(error) => match error.raw_os_error() {
                Some(libc::EFAULT) => 0,
                // Also while other threads go on without the first: its memory is then reached by
                // the file alone, which was opened before.
                Some(libc::ESRCH) if !self.has_ended() => 0,
                Some(libc::ESRCH) => return Err(ReadError::Gone { pid: self.pid }),
                Some(_) | None => {
                    return Err(ReadError::Refused {
                        pid: self.pid,
                        source: error,
                    });
                }
            },
        };
        // A page that was read in part counts as not read.
        let pages = PageCount((read / PAGE_SIZE) as u64);
        progress.got(batch, pages);
        Ok(pages)
    }

    /// Goes on where a read stopped, by `/proc/PID/mem`, up to the end of the run. Returns how many
    /// pages are settled, one way or the other: at least one.
    fn read_by_file(
        &self,
        run: PageRun,
        progress: &mut Progress,
        buffer: &mut [u8],
    ) -> Result<PageCount, ReadError> {
        let len = bytes(run.count()).min(CALL_BYTES_MAX);
        let room = &mut buffer[progress.filled..][..len];
        match self.memory.read_at(room, run.address()) {
            Ok(read) if PAGE_SIZE <= read => {
                let pages = PageCount((read / PAGE_SIZE) as u64);
                progress.got(&[run], pages);
                Ok(pages)
            }
            Ok(_) => Ok(progress.missed(run)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EIO | libc::EFAULT) => Ok(progress.missed(run)),
                Some(_) | None => Err(ReadError::Refused {
                    pid: self.pid,
                    source: error,
                }),
            },
        }
    }
}

/// What has been read so far.
#[derive(Debug)]
struct Progress {
    read: Vec<PageRun>,
    unread: Vec<PageRun>,
    /// Bytes of the buffer in use.
    filled: usize,
    misses: Misses,
}

impl Progress {
    /// The first `pages` pages of `runs` are in the buffer.
    fn got(&mut self, runs: &[PageRun], pages: PageCount) {
        let mut left = pages;
        for run in runs {
            let Ok(part) = PageRun::new(run.start(), run.count().min(left)) else {
                break;
            };
            self.read.push(part);
            left.0 -= part.count().0;
        }
        self.filled += bytes(pages);
    }

    /// The first page of `run` cannot be read. After a few in a row the rest of the run may be
    /// given up too.
    fn missed(&mut self, run: PageRun) -> PageCount {
        let row = self.unread.last().filter(|last| last.end() == run.start());
        let count = match row {
            Some(last) if self.misses == Misses::GiveUp && MISSED_MAX <= last.count() => {
                run.count()
            }
            Some(_) | None => PageCount(1),
        };
        let missed = PageRun::new(run.start(), count).expect("part of a run");
        match self
            .unread
            .last_mut()
            .filter(|last| last.end() == run.start())
        {
            Some(last) => {
                *last = PageRun::between(last.start(), missed.end()).expect("ends in a run");
            }
            None => self.unread.push(missed),
        }
        count
    }
}

/// Where in the wanted runs a read is.
#[derive(Debug)]
struct Cursor<'a> {
    runs: &'a [PageRun],
    /// First page of the first run that is not settled, if above its start.
    start: PageIndex,
}

impl Cursor<'_> {
    /// What is left of the current run.
    fn run(&self) -> Option<PageRun> {
        let run = self.runs.first()?;
        PageRun::between(run.start().max(self.start), run.end()).ok()
    }

    /// The next runs for one call, cut to its limits; false when all is settled.
    fn fill(&self, batch: &mut Vec<PageRun>) -> bool {
        batch.clear();
        let mut room = PageCount((CALL_BYTES_MAX / PAGE_SIZE) as u64);
        let rest = self.runs.get(1..).unwrap_or_default().iter().copied();
        for run in self.run().into_iter().chain(rest).take(RUNS_MAX) {
            let Ok(part) = PageRun::new(run.start(), run.count().min(room)) else {
                break;
            };
            batch.push(part);
            room.0 -= part.count().0;
        }
        !batch.is_empty()
    }

    fn advance(&mut self, pages: PageCount) {
        let mut left = pages;
        while let Some(run) = self.run() {
            if left < run.count() {
                self.start = PageIndex(run.start().0 + left.0);
                return;
            }
            left.0 -= run.count().0;
            self.runs = &self.runs[1..];
        }
    }
}

fn bytes(pages: PageCount) -> usize {
    usize::try_from(pages.bytes()).expect("a batch fits in memory")
}

/// Most bytes of one call. Larger ones gain nothing, and one call does its work without a break.
const CALL_BYTES_MAX: usize = 1 << 20;

/// After how many unreadable pages in a row the rest of their run is given up, if it may be.
const MISSED_MAX: PageCount = PageCount(16);

#[cfg(test)]
mod tests;
