//! What a migration must not forget: one file of records per migration, on disk before anybody
//! acts on them.
//!
//! # The file
//!
//! `ID.journal` begins with a header (magic, version, the migration's id, a checksum), followed
//! by records on 8-byte boundaries: length, checksum, bytes. The checksum also covers the
//! record's place in the file, so bytes that look like a record elsewhere are none. All numbers
//! are little-endian. The rest of the file is zeros, written beforehand: an append overwrites
//! blocks the file already owns, so that `fdatasync` has no size and no block list to write and
//! costs one write to the disk.
//!
//! # What can be believed after a crash
//!
//! An append returns when its record is on disk, and the next one starts after that. So at most
//! one record, the last, can be half there, and nobody has acted on it: it is cut off. A bad
//! record with a good one after it was durable once and is damage: [`JournalError::Corrupt`],
//! and nothing in that journal is believed. A last record that rots *after* it was durable
//! looks like one that was never finished; telling the two apart would cost a second write per
//! append.
//!
//! An append that fails leaves its record in doubt: it may be on disk or not. The next append
//! settles it first, by writing the same bytes in the same place.
//!
//! Absent: what records mean. They are bytes here; `pageferry-proto` encodes and recovers them.
//! Every call blocks for as long as the disk takes and belongs on a blocking thread.

pub mod remains;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use pageferry_proto::id::MigrationId;

/// The folder of all journals of one daemon. Holding it keeps other daemons out.
#[derive(Debug)]
pub struct Journals {
    folder: PathBuf,
    _lock: Flock<File>,
}

/// One migration's journal, open for appending.
pub struct Journal {
    path: PathBuf,
    disk: Box<dyn Disk>,
    /// Where the next record goes; everything before is durable.
    end: u64,
    /// Length of the file: zeros from `end` on.
    length: u64,
    /// A record written at `end` whose append failed.
    in_doubt: Option<Vec<u8>>,
}

/// A journal read from disk.
#[derive(Debug)]
pub struct Recovered {
    /// The journal, ready for the next record.
    pub journal: Journal,
    /// What it holds, in the order it was written. Empty if a crash came right after
    /// [`Journals::create`].
    pub records: Vec<Vec<u8>>,
}

/// A journal found in the folder.
#[derive(Debug)]
pub struct Found {
    /// Whose it is, by its file name.
    pub migration: MigrationId,
    /// What is in it, unless it cannot be believed.
    pub contents: Result<Recovered, JournalError>,
}

/// What a journal asks of the disk; a file, but for tests that make it fail.
pub trait Disk: Send {
    /// Writes all bytes at an offset.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when every byte written before is durable, and the length of the file too.
    fn sync(&mut self) -> io::Result<()>;
}

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The folder cannot be made or read.
    #[error("cannot use journal folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another daemon has the folder.
    #[error("journal folder {} is in use by another daemon", folder.display())]
    InUse {
        /// The folder.
        folder: PathBuf,
    },
    /// The file cannot be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not a journal, or not of this version, or another migration's.
    #[error("{} is not a journal of this migration: {what}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with its header.
        what: &'static str,
    },
    /// A record in the middle is damaged.
    #[error("{} is corrupt: bad record at byte {offset}, good ones after it", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where the bad record begins.
        offset: u64,
    },
    /// The record may or may not be durable.
    #[error("cannot append to {}", path.display())]
    Append {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The record is empty or above [`RECORD_BYTES_MAX`], or the journal is full. Nothing was
    /// written.
    #[error("record of {bytes} bytes does not fit into {}", path.display())]
    Oversize {
        /// The file.
        path: PathBuf,
        /// Length of the record.
        bytes: usize,
    },
    /// The file cannot be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Journals {
    /// Takes the folder, making it if needed, and clears away what a crash left half made.
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        let refuse = |source| JournalError::Folder {
            folder: folder.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(refuse)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join(LOCK_NAME))
            .map_err(refuse)?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    nix::Error::EWOULDBLOCK => JournalError::InUse {
                        folder: folder.to_owned(),
                    },
                    other => refuse(other.into()),
                },
            )?;
        for path in names_ending(folder, TEMPORARY_SUFFIX).map_err(refuse)? {
            fs::remove_file(path).map_err(refuse)?;
        }
        // The folder's own name must survive too, or its files are gone with it.
        if let Some(parent) = folder.parent() {
            sync_folder(parent).map_err(refuse)?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            _lock: lock,
        })
    }

    /// Makes the journal of a new migration; durable, and empty, when it returns.
    pub fn create(&self, migration: MigrationId) -> Result<Journal, JournalError> {
        let path = self.path(migration);
        let temporary = self.folder.join(format!("{migration}{TEMPORARY_SUFFIX}"));
        let refuse = |source| JournalError::Create {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(refuse)?;
        let made = write_empty(&file, migration)
            // Linking, unlike renaming, fails if the name is taken.
            .and_then(|()| fs::hard_link(&temporary, &path));
        fs::remove_file(&temporary).map_err(refuse)?;
        made.map_err(refuse)?;
        sync_folder(&self.folder).map_err(refuse)?;
        Ok(Journal::new(path, Box::new(file)))
    }

    /// Opens the journal of one migration.
    pub fn read(&self, migration: MigrationId) -> Result<Recovered, JournalError> {
        Journal::open(self.path(migration), migration)
    }

    /// Everything there is, in no particular order. One journal that cannot be believed does not
    /// hide the others.
    pub fn scan(&self) -> Result<Vec<Found>, JournalError> {
        let found = |migration| Found {
            migration,
            contents: self.read(migration),
        };
        Ok(self.list()?.into_iter().map(found).collect())
    }

    /// Which of `finished` migrations are older, by the time of their last record, than the newest
    /// [`FINISHED_MAX`] of them.
    pub fn surplus(&self, finished: &[MigrationId]) -> Result<Vec<MigrationId>, JournalError> {
        let mut by_age = Vec::with_capacity(finished.len());
        for &migration in finished {
            let path = self.path(migration);
            match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
                Ok(modified) => by_age.push((modified, migration)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(JournalError::Read { path, source }),
            }
        }
        by_age.sort_by_key(|&(modified, _): &(SystemTime, MigrationId)| modified);
        by_age.truncate(by_age.len().saturating_sub(FINISHED_MAX));
        Ok(by_age.into_iter().map(|(_, migration)| migration).collect())
    }

    /// Removes the journal of a migration that never began, or that nobody needs any more.
    pub fn remove(&self, migration: MigrationId) -> Result<(), JournalError> {
        let path = self.path(migration);
        // Not synced: one that comes back after a crash is as empty, or as finished, as before.
        fs::remove_file(&path).map_err(|source| JournalError::Remove { path, source })
    }

    /// What all files of the folder take, in bytes, as far as they can be read.
    pub fn bytes(&self) -> u64 {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let known = files.filter_map(|file| file.metadata().ok());
        known.map(|metadata| metadata.len()).sum()
    }

    fn list(&self) -> Result<Vec<MigrationId>, JournalError> {
        let refuse = |source| JournalError::Folder {
            folder: self.folder.clone(),
            source,
        };
        let paths = names_ending(&self.folder, JOURNAL_SUFFIX).map_err(refuse)?;
        Ok(paths
            .iter()
            .filter_map(|path| path.file_stem()?.to_str()?.parse().ok())
            .collect())
    }

    fn path(&self, migration: MigrationId) -> PathBuf {
        self.folder.join(format!("{migration}{JOURNAL_SUFFIX}"))
    }
}

impl Journal {
    /// When it was made, as far as the file system knows.
    pub fn begun(&self) -> SystemTime {
        let times = fs::metadata(&self.path)
            .and_then(|metadata| metadata.created().or_else(|_| metadata.modified()));
        times.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn new(path: PathBuf, disk: Box<dyn Disk>) -> Self {
        Self {
            path,
            disk,
            end: HEADER_BYTES as u64,
            length: GROWTH_BYTES as u64,
            in_doubt: None,
        }
    }

    /// Opens a file, reads its records, and wipes a half-written one off its end.
    fn open(path: PathBuf, migration: MigrationId) -> Result<Recovered, JournalError> {
        let unreadable = |source| JournalError::Read {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        if FILE_BYTES_MAX < length {
            let what = "it is larger than any journal";
            return Err(JournalError::Foreign { path, what });
        }
        let mut bytes = vec![0; usize::try_from(length).expect("at most FILE_BYTES_MAX")];
        file.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
        if let Err(what) = check_header(&bytes, migration) {
            return Err(JournalError::Foreign { path, what });
        }
        let (records, end) = match parse(&bytes) {
            Ok(parsed) => parsed,
            Err(offset) => return Err(JournalError::Corrupt { path, offset }),
        };
        if bytes[end..].iter().any(|&byte| byte != 0) {
            tracing::warn!(path = %path.display(), end, "cut off a record that was never finished");
            file.write_all_at(&vec![0; bytes.len() - end], end as u64)
                .and_then(|()| file.sync_data())
                .map_err(unreadable)?;
        }
        let mut journal = Self::new(path, Box::new(file));
        journal.end = end as u64;
        journal.length = length;
        Ok(Recovered { journal, records })
    }

    /// Puts another disk under the journal: how tests make writes fail.
    #[must_use]
    pub fn on(mut self, wrap: impl FnOnce(Box<dyn Disk>) -> Box<dyn Disk>) -> Self {
        self.disk = wrap(self.disk);
        self
    }

    /// Writes one record of 1 to [`RECORD_BYTES_MAX`] bytes; durable when it returns `Ok`.
    ///
    /// After [`JournalError::Append`] the record may be durable or not; the journal stays usable,
    /// and the next append makes this one durable first.
    pub fn append(&mut self, record: &[u8]) -> Result<(), JournalError> {
        let doubtful = self.in_doubt.as_ref().map_or(0, Vec::len);
        let needed = self.end + (doubtful + framed_bytes(record.len())) as u64;
        if record.is_empty() || RECORD_BYTES_MAX < record.len() || FILE_BYTES_MAX < needed {
            return Err(JournalError::Oversize {
                path: self.path.clone(),
                bytes: record.len(),
            });
        }
        self.try_append(record, needed)
            .map_err(|source| JournalError::Append {
                path: self.path.clone(),
                source,
            })
    }

    fn try_append(&mut self, record: &[u8], needed: u64) -> io::Result<()> {
        while self.length < needed {
            self.disk.write_at(&ZEROS, self.length)?;
            self.disk.sync()?;
            self.length += ZEROS.len() as u64;
        }
        if let Some(doubtful) = self.in_doubt.take() {
            self.write(doubtful)?;
        }
        self.write(frame(record, self.end))
    }

    fn write(&mut self, framed: Vec<u8>) -> io::Result<()> {
        let written = self
            .disk
            .write_at(&framed, self.end)
            .and_then(|()| self.disk.sync());
        match written {
            Ok(()) => self.end += framed.len() as u64,
            Err(_) => self.in_doubt = Some(framed),
        }
        written
    }
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.path)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl Disk for File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A header and zeros, durable.
fn write_empty(file: &File, migration: MigrationId) -> io::Result<()> {
    let mut bytes = vec![0; GROWTH_BYTES];
    bytes[..HEADER_BYTES].copy_from_slice(&header(migration));
    file.write_all_at(&bytes, 0)?;
    file.sync_all()
}

fn header(migration: MigrationId) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..28].copy_from_slice(migration.as_bytes());
    let crc = crc32fast::hash(&bytes[..28]);
    bytes[28..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn check_header(bytes: &[u8], migration: MigrationId) -> Result<(), &'static str> {
    let Some((found, _)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err("it is too short");
    };
    if &found[..8] != MAGIC {
        return Err("it does not begin like one");
    }
    if found[8..12] != VERSION.to_le_bytes() {
        return Err("it has another version");
    }
    if found != &header(migration) {
        return Err("its header is damaged, or of another migration");
    }
    Ok(())
}

/// The records of a whole file, and where they end; or the offset of the damaged one.
fn parse(bytes: &[u8]) -> Result<(Vec<Vec<u8>>, usize), u64> {
    let mut records = Vec::new();
    let mut at = HEADER_BYTES;
    while let Some(record) = record_at(bytes, at) {
        at += framed_bytes(record.len());
        records.push(record.to_vec());
    }
    // Whatever is here was never finished, unless something was finished after it.
    let later = (at + ALIGN..bytes.len()).step_by(ALIGN);
    for offset in later {
        if record_at(bytes, offset).is_some() {
            return Err(at as u64);
        }
    }
    Ok((records, at))
}

/// The record at an offset, if there is a whole and good one.
fn record_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let (head, rest) = bytes.get(at..)?.split_first_chunk::<FRAME_BYTES>()?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = *head;
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let body = rest.get(..length)?;
    let good = (1..=RECORD_BYTES_MAX).contains(&length)
        && checksum(body, at as u64) == u32::from_le_bytes([c0, c1, c2, c3]);
    good.then_some(body)
}

/// A record as it is on disk at an offset, padded with zeros to the next boundary.
fn frame(record: &[u8], at: u64) -> Vec<u8> {
    let length = u32::try_from(record.len()).expect("at most RECORD_BYTES_MAX");
    let mut framed = Vec::with_capacity(framed_bytes(record.len()));
    framed.extend_from_slice(&length.to_le_bytes());
    framed.extend_from_slice(&checksum(record, at).to_le_bytes());
    framed.extend_from_slice(record);
    framed.resize(framed_bytes(record.len()), 0);
    framed
}

fn checksum(record: &[u8], at: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&at.to_le_bytes());
    hasher.update(&(record.len() as u64).to_le_bytes());
    hasher.update(record);
    hasher.finalize()
}

fn framed_bytes(record: usize) -> usize {
    (FRAME_BYTES + record).next_multiple_of(ALIGN)
}

fn names_ending(folder: &Path, suffix: &str) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .ends_with(suffix.as_bytes())
        {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Finished journals that are kept whole, for `list` and `show` and for whoever asks what happened.
pub const FINISHED_MAX: usize = 100;

/// Largest record: 1 MiB, as much as the control message it comes from.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// Largest journal: 8 MiB. A migration writes fewer than ten records.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// What a file grows by: 64 KiB, more than all records of a usual migration.
const GROWTH_BYTES: usize = 64 << 10;

static ZEROS: [u8; GROWTH_BYTES] = [0; GROWTH_BYTES];

const MAGIC: &[u8; 8] = b"pfjournl";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
/// Length and checksum.
const FRAME_BYTES: usize = 8;
const ALIGN: usize = 8;

const JOURNAL_SUFFIX: &str = ".journal";
const TEMPORARY_SUFFIX: &str = ".temporary";
const LOCK_NAME: &str = "lock";

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
