//! Cases of direct I/O: threads that read a file past the page cache, straight into their memory.
//!
//! Each reads blocks of a file that is known into one place of its memory after the other, and
//! comes back to a place only after all others: what a move loses of a read stays lost until it is
//! checked.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};

use super::Case;
use crate::content::{Content, seed_of};
use crate::sys::memory::{Backing, Mapping, PAGE};

/// Writes the file that is read.
///
/// # Errors
/// It cannot be written.
pub fn write_file(path: &Path) -> io::Result<()> {
    let mut file = io::BufWriter::new(File::create(path)?);
    let mut page = [0; PAGE];
    for number in 0..FILE_BYTES / PAGE {
        fill(number, &mut page);
        file.write_all(&page)?;
    }
    // What is only in the page cache would be written back before each read of it.
    file.into_inner()?.sync_all()
}

fn fill(number: usize, page: &mut [u8]) {
    Content::Random.fill(seed_of(number as u64, 1), page);
}

/// The memory of one thread, and what was read into it.
#[derive(Debug)]
struct Reader {
    memory: Mapping,
    /// By place: the block that was read there last.
    read: Vec<Option<usize>>,
    reads: u64,
}

impl Reader {
    fn new() -> Result<Self> {
        Ok(Self {
            memory: Mapping::new(Backing::Private, READER_BYTES).context("mapping memory")?,
            read: vec![None; READER_BYTES / BLOCK_BYTES],
            reads: 0,
        })
    }

    /// Reads the next block into the next place.
    fn read_next(&mut self, file: &File, first: usize) -> io::Result<()> {
        let place = self.reads as usize % self.read.len();
        // Another one each time it comes to the same place.
        let block = (first + self.reads as usize * 7) % (FILE_BYTES / BLOCK_BYTES);
        let bytes = &mut self.memory.bytes_mut()[place * BLOCK_BYTES..][..BLOCK_BYTES];
        self.read[place] = None;
        file.read_exact_at(bytes, (block * BLOCK_BYTES) as u64)?;
        self.read[place] = Some(block);
        self.reads += 1;
        Ok(())
    }

    fn check(&self) -> Result<usize> {
        let mut expected = [0; PAGE];
        let known = self.read.iter().enumerate();
        let known = known.filter_map(|(place, block)| Some((place, (*block)?)));
        let mut pages = 0;
        for (place, block) in known {
            let bytes = &self.memory.bytes()[place * BLOCK_BYTES..][..BLOCK_BYTES];
            for (index, page) in bytes.chunks(PAGE).enumerate() {
                fill(block * BLOCK_BYTES / PAGE + index, &mut expected);
                ensure!(
                    page == expected,
                    "page {index} of {} read of block {block} is not what was read",
                    BLOCK_BYTES / PAGE
                );
                pages += 1;
            }
        }
        Ok(pages)
    }
}

/// Threads that read.
#[derive(Debug)]
struct Readers {
    readers: Vec<Arc<Mutex<Reader>>>,
    failed: Arc<Mutex<Option<String>>>,
}

impl Readers {
    /// Starts them on a file that the lab has written. Between two reads each sleeps.
    fn start(pause: Duration) -> Result<Self> {
        let mut readers = Vec::new();
        let failed = Arc::new(Mutex::new(None));
        for number in 0..READERS {
            let file = open()?;
            let reader = Arc::new(Mutex::new(Reader::new()?));
            readers.push(Arc::clone(&reader));
            let failed = Arc::clone(&failed);
            let run = move || {
                loop {
                    if let Err(error) = lock(&reader).read_next(&file, number * 31) {
                        lock(&failed).get_or_insert(format!("a direct read failed: {error}"));
                        return;
                    }
                    // Also so that who checks gets its turn.
                    std::thread::sleep(pause);
                }
            };
            let thread = std::thread::Builder::new().stack_size(128 << 10);
            thread.spawn(run).context("starting a thread")?;
        }
        Ok(Self { readers, failed })
    }

    fn check_alive(&self) -> Result<()> {
        let failed = lock(&self.failed).clone();
        failed.map_or(Ok(()), |failed| Err(anyhow::anyhow!(failed)))
    }

    fn verify(&self) -> Result<usize> {
        self.check_alive()?;
        self.readers.iter().map(|reader| lock(reader).check()).sum()
    }

    fn reads(&self) -> u64 {
        self.readers.iter().map(|reader| lock(reader).reads).sum()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open() -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(PATH);
    file.with_context(|| format!("opening {PATH} for direct I/O"))
}

/// Reads from the start.
struct Always(Readers);

impl Case for Always {
    fn step(&mut self, _: u64) -> Result<()> {
        self.0.check_alive()
    }

    fn verify(&mut self) -> Result<usize> {
        self.0.verify()
    }

    fn progress(&self) -> String {
        let interrupted = INTERRUPTED.load(Ordering::Relaxed);
        format!("reads:{},interrupted:{interrupted}", self.0.reads())
    }
}

/// As fast as the storage answers: some read is under way at every moment.
pub fn always() -> Result<Box<dyn Case>> {
    Ok(Box::new(Always(Readers::start(YIELD)?)))
}

/// Beside many threads that wait for events which never come.
pub fn among_threads() -> Result<Box<dyn Case>> {
    for _ in 0..WAITING {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        let wait = move || {
            let mut events = [EpollEvent::empty()];
            while let Err(Errno::EINTR) = epoll.wait(&mut events, EpollTimeout::NONE) {
                INTERRUPTED.fetch_add(1, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        thread.spawn(wait).context("starting a thread")?;
    }
    Ok(Box::new(Always(Readers::start(PAUSE)?)))
}

/// How often a wait has ended without an event.
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);

/// Opens its file when it is in the cgroup of a move, and not before. Then it reads.
struct Late(Option<Readers>);

impl Case for Late {
    fn step(&mut self, tick: u64) -> Result<()> {
        match &self.0 {
            Some(readers) => readers.check_alive(),
            None if tick.is_multiple_of(LOOK_EVERY) && is_being_moved()? => {
                self.0 = Some(Readers::start(PAUSE)?);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn verify(&mut self) -> Result<usize> {
        self.0.as_ref().map_or(Ok(0), Readers::verify)
    }

    fn progress(&self) -> String {
        let reads = self.0.as_ref().map_or(0, Readers::reads);
        format!("reads:{reads}")
    }
}

pub fn late() -> Result<Box<dyn Case>> {
    Ok(Box::new(Late(None)))
}

fn is_being_moved() -> Result<bool> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").context("reading own cgroups")?;
    Ok(cgroups.lines().any(|line| line.contains("pageferry/")))
}

/// The file that is read: the lab writes it before it starts a case.
pub const PATH: &str = "/srv/shared/direct-io";

const FILE_BYTES: usize = 32 << 20; // 32 MiB
/// One read.
const BLOCK_BYTES: usize = 256 << 10; // 256 KiB
const READERS: usize = 4;
const READER_BYTES: usize = 32 << 20; // 32 MiB
const YIELD: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_millis(20);
const WAITING: usize = 200;
/// In steps of a case, each of a millisecond.
const LOOK_EVERY: u64 = 5;
