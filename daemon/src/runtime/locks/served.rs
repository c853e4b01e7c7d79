//! Record locks that a server keeps, and this kernel knows nothing of.
//!
//! A FUSE server may take locks upon itself. The kernel then shows none with a descriptor, nor in
//! `/proc/locks`; it passes the question on to the server, whether a lock could be had. So that is
//! asked, as somebody who has none.
//!
//! Absent: `flock` at a server, of which nobody can ask without taking it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use pageferry_inject::locks::{LockKind, Shown, ShownKind};

use super::there;

/// Whether the open file behind `link`, a descriptor in `/proc`, is one of which somebody has a
/// record lock that the kernel does not show. Waits for the server.
pub(super) fn is_locked(link: &Path) -> io::Result<bool> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(link);
    let Some(file) = there(opened)? else {
        return Ok(false);
    };
    if !has_lock(&file)? {
        return Ok(false);
    }
    let metadata = file.metadata()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let (major, minor) = (libc::major(device), libc::minor(device));
    let name = format!("{major:02x}:{minor:02x}:{inode}");
    let is_it = |shown: &Shown| {
        let is_record = match &shown.kind {
            ShownKind::Lock(kind) => *kind != LockKind::Flock,
            ShownKind::Other(_) => false,
        };
        is_record && !shown.waits && shown.file == name
    };
    Ok(!Shown::all()?.iter().any(is_it))
}

/// Whether another open file than this, or a process, has a record lock on any byte.
fn has_lock(file: &File) -> io::Result<bool> {
    let kind = |kind: i32| i16::try_from(kind).map_err(io::Error::other);
    let mut asked = libc::flock {
        l_type: kind(libc::F_WRLCK)?,
        l_whence: kind(libc::SEEK_SET)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut asked))?;
    Ok(asked.l_type != kind(libc::F_UNLCK)?)
}
