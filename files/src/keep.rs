//! Where folders are that are not the workload's: on their way in, or kept because it has left.
//!
//! ```text
//! <path's folder>/.pageferry-files/            root alone may enter; goes with what is in it;
//!                                              of a volume of an engine one folder further up
//!     in-<migration>-<index>/tree, hold        on its way here
//!                            /empty             until then at the path, if somebody looks there
//!     kept-<hash of the path>/tree             what has left: a way back costs what has changed
//! <state>/<hash of the path>.kept              the digest of that
//! <state>/<hash of the path>.record            what the node has that the workload came from
//! ```
//!
//! Invariants: nothing is put over something that is there; what was put and is not the workload's
//! for good is told from others by its inode and when that was made; of what somebody else has put
//! into an empty folder nothing is removed; there are at most [`CACHED_MAX`] kept folders.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::error::Error;
use crate::kernel::Folder;
use crate::make::remove;
use crate::record::Record;
use crate::staging::{Staging, tree_of};
use crate::tree::Digest;
use crate::walk::{Totals, named_elsewhere, totals, walk};

/// What an empty folder is called before it is put in the place of one that comes.
const STAND_IN: &str = "empty";

/// The folder beside a path that has what is not the workload's.
pub const HIDDEN: &str = ".pageferry-files";

/// Most folders that are kept at a node when their workloads have left.
pub const CACHED_MAX: usize = 16;

/// What must be free besides what comes: file systems that are full are slow, and others write too.
const FREE_BYTES: u64 = 64 << 20; // 64 MiB

/// What an entry takes at most that its bytes do not say.
const ENTRY_BYTES: u64 = 1 << 10;

/// What a node keeps of folders.
#[derive(Clone, Debug)]
pub struct Keep {
    state: PathBuf,
}

/// What a folder is known by: its device, its number, and when it was made, in nanoseconds, or 0
/// where that is not known. Numbers come again, at once on some file systems.
pub type Identity = (u64, u64, u64);

/// A folder that has been put where the workload has it, or may have been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where.
    pub path: PathBuf,
    /// Where it comes from.
    pub place: PathBuf,
    /// What it is known by, once it is there.
    pub inode: Option<Identity>,
    /// An empty folder was there before.
    pub was_there: bool,
    /// What the empty folder is known by that stands there until it comes, if one does. One that
    /// was there before is nobody's: it was made for what comes, and what comes into it goes.
    pub stand_in: Option<Identity>,
}

impl Keep {
    /// With its notes in the folder `state`, which need not be there.
    pub const fn new(state: PathBuf) -> Self {
        Self { state }
    }

    /// The folder with its notes.
    pub fn state(&self) -> &Path {
        &self.state
    }

    fn note(&self, path: &Path, kind: &str) -> PathBuf {
        self.state.join(format!("{}.{kind}", short(path)))
    }

    /// Writes a note in its folder, all of it and on disk, or leaves the one that there was.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Io {
            what: "write",
            path: path.to_owned(),
            source,
        };
        let write = || {
            DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&self.state)?;
            let mut new = path.as_os_str().to_owned();
            new.push(".new");
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            File::open(&self.state)?.sync_all()
        };
        write().map_err(failed)
    }

    /// Removes a note in its folder for good. One that is not there is gone.
    pub fn forget(&self, path: &Path) -> Result<(), Error> {
        let removed = match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => File::open(&self.state).and_then(|folder| folder.sync_all()),
        };
        removed.map_err(|source| Error::Io {
            what: "remove",
            path: path.to_owned(),
            source,
        })
    }

    /// What the node has that the workload came from, if it did. One that cannot be read is none:
    /// everything is sent then.
    pub fn recall(&self, path: &Path) -> Option<Record> {
        let bytes = fs::read(self.note(path, "record")).ok()?;
        Record::decode(&bytes).ok()
    }

    /// The workload has come here, and the other node keeps what this says.
    pub fn remember(&self, path: &Path, record: &Record) -> Result<(), Error> {
        self.write(&self.note(path, "record"), &record.encode())
    }

    /// What this node keeps of a workload that has left, if it is exactly that, and may be written
    /// to: not if something of it has a name elsewhere too.
    pub fn has(&self, path: &Path, digest: &Digest) -> Option<Totals> {
        let noted = fs::read(self.note(path, "kept")).ok()?;
        if noted != digest {
            return None;
        }
        let folder = Folder::open(&tree_of(&kept(path))).ok()?;
        let found = walk(&folder, None).ok()?;
        match named_elsewhere(&found) {
            Some(_) => None,
            None => Some(totals(&found)),
        }
    }

    /// Where something comes that is to be at `path`.
    pub fn place(path: &Path, migration: &str, index: usize) -> PathBuf {
        hidden(path).join(format!("in-{migration}-{index}"))
    }

    /// Makes a place with what is kept, or with nothing. Answers with what that is known
    /// by which becomes the folder.
    pub fn claim(&self, path: &Path, place: &Path, is_kept: bool) -> Result<Identity, Error> {
        make_hidden(path)?;
        if is_kept {
            // Whatever becomes of it, it is not what the note says any more.
            drop(fs::remove_file(self.note(path, "kept")));
            rename(&kept(path), place, RenameFlags::NOREPLACE)?;
        } else {
            Staging::make(place)?;
        }
        identity_of(&tree_of(place))
    }

    /// The empty folder for whoever looks for the folder before it comes: the one that was there,
    /// which must be nobody's, or one that is made in the place, which is claimed. Says what
    /// it is known by.
    pub fn stand_in(placed: &Placed) -> Result<Identity, Error> {
        if placed.was_there {
            return identity_of(&placed.path);
        }
        let stand_in = placed.place.join(STAND_IN);
        let made = DirBuilder::new().mode(0o700).create(&stand_in);
        made.map_err(|source| Error::Io {
            what: "make",
            path: stand_in.clone(),
            source,
        })?;
        identity_of(&stand_in)
    }

    /// Puts the empty folder where the folder is to be, once what it is known by is written down.
    pub fn put_stand_in(placed: &Placed) -> Result<(), Error> {
        if placed.was_there || placed.stand_in.is_none() {
            return Ok(());
        }
        let stand_in = placed.place.join(STAND_IN);
        rename(&stand_in, &placed.path, RenameFlags::NOREPLACE)?;
        sync_parent(&placed.path)
    }

    /// Puts a folder that is proven where the workload has it. To be undone by [`Keep::undo`] with
    /// what was written down before.
    pub fn put(staging: &Staging, placed: &Placed) -> Result<(), Error> {
        staging.check_proven()?;
        Self::put_ahead(placed)
    }

    /// Puts a folder where the workload has it before all has come into it: somebody looks for it
    /// there, and does not use it. To be undone as what is put at the end.
    pub fn put_ahead(placed: &Placed) -> Result<(), Error> {
        let here = identity_at(&placed.path);
        let how = if placed.was_there && here.is_some() && here == placed.stand_in {
            // What its engine has put into it meanwhile goes with the place.
            RenameFlags::EXCHANGE
        } else {
            if here.is_some() && here == placed.stand_in {
                // Whoever looked for it may have made places to mount at.
                remove_empty(&placed.path);
            }
            absent(&placed.path)?;
            // Over an empty folder, but over nothing else.
            RenameFlags::empty()
        };
        rename(&tree_of(&placed.place), &placed.path, how)?;
        sync_parent(&placed.path)
    }

    /// Checks that what was put ahead is proven, and is where it was put.
    pub fn check_put(staging: &Staging, placed: &Placed) -> Result<(), Error> {
        staging.check_proven()?;
        match identity_at(&placed.path) == placed.inode {
            true => Ok(()),
            false => Err(Error::unfit(&placed.path, "is another one now")),
        }
    }

    /// What becomes the folder, in its place.
    pub fn tree(place: &Path) -> PathBuf {
        tree_of(place)
    }

    /// The workload has it for good: what it came through goes.
    pub fn settle(placed: &Placed) -> Result<(), Error> {
        remove(&placed.place)?;
        tidy(&placed.path);
        Ok(())
    }

    /// Takes back what was put, and whatever is left of it. Succeeds when there is nothing.
    pub fn undo(placed: &Placed) -> Result<(), Error> {
        let here = identity_at(&placed.path);
        let mut is_left = false;
        if here.is_some() && here == placed.stand_in && !placed.was_there {
            remove_empty(&placed.path);
            is_left = identity_at(&placed.path) == here;
        } else if here.is_some() && here == placed.inode {
            make_hidden(&placed.path)?;
            let aside = placed.place.with_extension("undone");
            rename(&placed.path, &aside, RenameFlags::NOREPLACE)?;
            remove(&aside)?;
            if placed.was_there {
                drop(fs::create_dir(&placed.path));
            }
        }
        remove(&placed.place)?;
        remove(&placed.place.with_extension("undone"))?;
        tidy(&placed.path);
        match is_left {
            false => Ok(()),
            true => Err(Error::unfit(
                &placed.path,
                "was made for what has not come, and is not empty: remove it when it is certain \
                 that nobody needs what is in it",
            )),
        }
    }

    /// The workload has left: what it had here is kept, in place of what was kept before.
    pub fn set_aside(&self, path: &Path, digest: &Digest) -> Result<(), Error> {
        let (place, note) = (kept(path), self.note(path, "kept"));
        make_hidden(path)?;
        drop(fs::remove_file(&note));
        drop(fs::remove_file(self.note(path, "record")));
        if fs::symlink_metadata(path).is_err() {
            // It was set aside before a restart, or an operator has taken it.
            return if tree_of(&place).is_dir() {
                self.write(&note, digest)
            } else {
                Ok(())
            };
        }
        remove(&place)?;
        let made = DirBuilder::new().mode(0o700).create(&place);
        made.map_err(|source| Error::Io {
            what: "make",
            path: place.clone(),
            source,
        })?;
        rename(path, &tree_of(&place), RenameFlags::NOREPLACE)?;
        sync_parent(path)?;
        self.write(&note, digest)?;
        self.write(&self.note(path, "where"), path.as_os_str().as_bytes())?;
        self.bound();
        Ok(())
    }

    /// Removes what has been kept longest, if it is too many.
    fn bound(&self) {
        let Ok(entries) = fs::read_dir(&self.state) else {
            return;
        };
        let mut noted: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "kept")
            })
            .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
            .collect();
        noted.sort();
        let surplus = noted.len().saturating_sub(CACHED_MAX);
        for (_, note) in noted.into_iter().take(surplus) {
            let place = note.with_extension("where");
            if let Ok(path) = fs::read(&place) {
                let path = PathBuf::from(std::ffi::OsString::from_vec(path));
                drop(remove(&kept(&path)));
                tidy(&path);
            }
            drop(fs::remove_file(&note));
            drop(fs::remove_file(&place));
        }
    }
}

/// Whether so much has room where `path` is to be; if not, what is missing.
pub fn admit(path: &Path, totals: &Totals) -> Result<(), Error> {
    admit_in(path.parent().unwrap_or(path), totals)
}

/// The same where something comes into a folder that is there.
pub fn admit_in(parent: &Path, totals: &Totals) -> Result<(), Error> {
    let found = rustix::fs::statvfs(parent).map_err(Error::io("ask for the room at", parent))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let entries = totals.entries.saturating_mul(ENTRY_BYTES);
    let needed = totals
        .bytes
        .saturating_add(entries)
        .saturating_add(totals.bytes / 20);
    let needed = needed.saturating_add(FREE_BYTES);
    if free < needed {
        let (needed, free) = (needed >> 20, free >> 20);
        return Err(full(
            parent,
            &format!("has {free} MiB free, and {needed} MiB are needed"),
        ));
    }
    if found.f_files != 0 && found.f_favail < totals.entries {
        return Err(full(parent, &format!("has {} inodes free", found.f_favail)));
    }
    Ok(())
}

fn full(path: &Path, why: &str) -> Error {
    Error::Full {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// What is at a path, if anything is.
fn identity_at(path: &Path) -> Option<Identity> {
    identity_of(path).ok()
}

/// Refuses a folder that could not go aside.
pub fn may_leave(path: &Path) -> Result<(), Error> {
    let folder = Folder::open(path)?;
    match folder.is_mount()? {
        true => Err(Error::unfit(path, "is a mount, and could not be put aside")),
        false => check_hidden(path),
    }
}

/// Whether an empty folder is at `path`, where a folder is to come; something else must not be, and
/// the folder that it comes to must.
pub fn may_come(path: &Path) -> Result<bool, Error> {
    check_hidden(path)?;
    Folder::open(path.parent().unwrap_or(path))?;
    absent(path)
}

/// Refuses a path that is, or is in, a hidden folder.
pub fn check_hidden(path: &Path) -> Result<(), Error> {
    match path.iter().any(|component| component == HIDDEN) {
        true => Err(Error::unfit(path, "is where folders are kept or come")),
        false => Ok(()),
    }
}

/// Removes a folder with all that is in it.
pub fn remove_all(path: &Path) -> Result<(), Error> {
    remove(path)
}

fn absent(path: &Path) -> Result<bool, Error> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Io {
            what: "look at",
            path: path.to_owned(),
            source,
        }),
        Ok(metadata) if metadata.is_dir() => match fs::read_dir(path).map(|mut all| all.next()) {
            Ok(None) => Ok(true),
            Ok(Some(_)) | Err(_) => Err(Error::unfit(path, "is there already: remove it")),
        },
        Ok(_) => Err(Error::unfit(path, "is there already: remove it")),
    }
}

/// What that is known by which is at a path.
pub fn identity_of(path: &Path) -> Result<Identity, Error> {
    let metadata = fs::symlink_metadata(path).map_err(|source| Error::Io {
        what: "look at",
        path: path.to_owned(),
        source,
    })?;
    let made = metadata.created().ok();
    let since = made.and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    let since = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
    Ok((metadata.dev(), metadata.ino(), since.unwrap_or(0)))
}

/// What engines call the folder with what is in a volume; that above is removed with the volume.
const OF_VOLUMES: &str = "_data";

fn hidden(path: &Path) -> PathBuf {
    let above = path.parent().unwrap_or(path);
    let device = |path: &Path| fs::symlink_metadata(path).map(|found| found.dev()).ok();
    // One that its engine has removed was no mount.
    let is_with = |volumes: &Path| device(above).is_none_or(|here| device(volumes) == Some(here));
    match above.parent() {
        Some(volumes) if path.ends_with(OF_VOLUMES) && is_with(volumes) => volumes.join(HIDDEN),
        _ => above.join(HIDDEN),
    }
}

fn kept(path: &Path) -> PathBuf {
    hidden(path).join(format!("kept-{}", short(path)))
}

/// A name for a path, of which there may be others in the same folder.
fn short(path: &Path) -> String {
    let hash = blake3::hash(path.as_os_str().as_bytes()).to_hex();
    hash.as_str()[..32].to_owned()
}

fn make_hidden(path: &Path) -> Result<(), Error> {
    let hidden = hidden(path);
    match DirBuilder::new().mode(0o700).create(&hidden) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(|source| Error::Io {
            what: "make",
            path: hidden.clone(),
            source,
        })?,
    }
    let metadata = fs::symlink_metadata(&hidden).map_err(|source| Error::Io {
        what: "look at",
        path: hidden.clone(),
        source,
    })?;
    let is_ours = metadata.is_dir() && metadata.uid() == 0 && metadata.mode() & 0o077 == 0;
    match is_ours {
        true => Ok(()),
        false => Err(Error::unfit(
            hidden,
            "is not a folder that root alone may enter: remove it",
        )),
    }
}

/// Removes a folder if nothing but empty folders is in it; else those.
fn remove_empty(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty(&entry.path());
        }
    }
    drop(fs::remove_dir(path));
}

/// Removes the hidden folder if nothing is in it.
fn tidy(path: &Path) {
    drop(fs::remove_dir(hidden(path)));
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Error> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, flags) {
        Err(Errno::EXIST | Errno::NOTEMPTY) => Err(Error::unfit(to, "is there already: remove it")),
        Err(Errno::BUSY) => Err(Error::unfit(
            to,
            "is a mount, or something is mounted there",
        )),
        renamed => renamed.map_err(Error::io("rename", from)),
    }
}

fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(path);
    let synced = File::open(parent).and_then(|folder| folder.sync_all());
    synced.map_err(|source| Error::Io {
        what: "sync",
        path: parent.to_owned(),
        source,
    })
}
