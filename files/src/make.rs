//! How entries are made, and unmade.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FileType, Mode};
use rustix::io::Errno;

use crate::error::Error;
use crate::kernel;
use crate::tree::{Kind, Meta};

/// Makes a folder that only root may enter.
pub(crate) fn make_folder(path: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(|source| Error::Io {
        what: "make",
        path: path.to_owned(),
        source,
    })
}

/// Makes an entry that is empty, for root alone.
pub(crate) fn make(
    parent: BorrowedFd<'_>,
    component: &OsString,
    kind: &Kind,
) -> rustix::io::Result<()> {
    let mode = Mode::RUSR | Mode::WUSR;
    let node = |kind, device| rustix::fs::mknodat(parent, component, kind, mode, device);
    let device = |major: u32, minor: u32| rustix::fs::makedev(major, minor);
    match kind {
        Kind::Folder | Kind::Opaque => rustix::fs::mkdirat(parent, component, Mode::RWXU),
        Kind::File => node(FileType::RegularFile, 0),
        Kind::Symlink(target) => rustix::fs::symlinkat(&**target, parent, component),
        Kind::Fifo => node(FileType::Fifo, 0),
        Kind::Socket => node(FileType::Socket, 0),
        Kind::Character { major, minor } => node(FileType::CharacterDevice, device(*major, *minor)),
        Kind::Block { major, minor } => node(FileType::BlockDevice, device(*major, *minor)),
        // That is the overlay's to make.
        Kind::Whiteout => Ok(()),
    }
}

/// Makes a hole, or where there are none zeroes.
pub(crate) fn punch(file: &File, offset: u64, length: usize) -> std::io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, how, offset, length as u64) {
        Err(Errno::OPNOTSUPP) => file.write_all_at(&vec![0; length], offset),
        punched => punched.map_err(Into::into),
    }
}

/// What of an entry is not as it should be.
pub(crate) fn difference(found: &Meta, wanted: &Meta) -> String {
    let (had, has) = (wanted, found);
    if (had.uid, had.gid) != (has.uid, has.gid) {
        return format!(
            "it is of {}:{}, not {}:{}",
            has.uid, has.gid, had.uid, had.gid
        );
    }
    if had.mode != has.mode {
        return format!("its mode is {:o}, not {:o}", has.mode, had.mode);
    }
    if had.modified != has.modified {
        return "its file system does not keep times as exactly".to_owned();
    }
    let names = had.xattrs.keys().chain(has.xattrs.keys());
    let mut odd = names.filter(|name| had.xattrs.get(*name) != has.xattrs.get(*name));
    let name = odd
        .next()
        .map(|name| String::from_utf8_lossy(name).into_owned());
    format!("its attribute {} differs", name.unwrap_or_default())
}

/// Removes a staging, or whatever else is there.
pub(crate) fn remove(place: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io {
        what: "remove",
        path: place.to_owned(),
        source,
    };
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(failed(Errno::INVAL.into()));
    };
    let parent = match fs::File::open(parent) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(failed)?,
    };
    // Not what is mounted in it.
    match kernel::remove_all(parent.as_fd(), name) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed),
    }
}
