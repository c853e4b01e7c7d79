//! An open folder, and what the kernel does beneath it: no symbolic link is followed and no mount
//! entered, whatever a name says.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::name::Name;
use crate::tree::{Kind, Meta, Moment};
use crate::xattr;

/// How paths are resolved: beneath the folder, and through nothing that leads elsewhere.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// File systems that note the first store to a page through a mapping in the file's times, however
/// often it was written back before: ext2 to 4, xfs, btrfs, f2fs. An overlay is none of them: all
/// files are compared there. Of a layer the upper folder is opened, and not what the overlay shows.
const TELLS: [u64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// What an overlay says it is.
const OVERLAYFS: u64 = 0x794c_7630;

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// The folder that was last asked for.
    parent: Option<(Name, OwnedFd)>,
}

impl Folder {
    /// Opens the folder at an absolute path in which nothing is a symbolic link.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve);
        let fd = match opened {
            Err(Errno::LOOP) => {
                return Err(Error::unfit(
                    path,
                    "leads through a symbolic link: name what it is",
                ));
            }
            Err(Errno::NOENT) => return Err(Error::unfit(path, "is not there")),
            Err(Errno::NOTDIR) => return Err(Error::unfit(path, "is no folder")),
            opened => opened.map_err(Error::io("open", path))?,
        };
        Ok(Self {
            fd,
            path: path.to_owned(),
            parent: None,
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For messages.
    pub fn path_of(&self, name: &Name) -> PathBuf {
        match name.is_root() {
            true => self.path.clone(),
            false => self.path.join(name.as_path()),
        }
    }

    /// Whether its file system marks every store through a mapping.
    pub fn tells(&self) -> Result<bool, Error> {
        let found = rustix::fs::fstatfs(&self.fd).map_err(Error::io("ask for", &self.path))?;
        Ok(u64::try_from(found.f_type).is_ok_and(|kind| TELLS.contains(&kind)))
    }

    /// Opens something beneath it.
    pub fn open_at(&self, name: &Name, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.fd, name.as_path(), flags, Mode::empty(), BENEATH)
    }

    /// Opens a folder beneath it.
    pub fn folder_at(&self, name: &Name) -> rustix::io::Result<OwnedFd> {
        self.open_at(name, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The folder that a name is in, and what it is called there.
    pub fn parent(&mut self, name: &Name) -> rustix::io::Result<(BorrowedFd<'_>, OsString)> {
        if name.is_root() {
            return Ok((self.fd.as_fd(), OsString::from(".")));
        }
        let (parent, component) = name.split();
        let component = component.to_owned();
        if parent.is_root() {
            return Ok((self.fd.as_fd(), component));
        }
        if self
            .parent
            .as_ref()
            .is_none_or(|(known, _)| *known != parent)
        {
            let fd = self.folder_at(&parent)?;
            self.parent = Some((parent, fd));
        }
        let fd = self
            .parent
            .as_ref()
            .map_or(self.fd.as_fd(), |(_, fd)| fd.as_fd());
        Ok((fd, component))
    }

    /// To be called when a folder may have gone, or taken another place, and before one does.
    pub fn forget_parent(&mut self) {
        self.parent = None;
    }

    /// Whether it is what an overlay shows.
    pub fn is_overlay(&self) -> Result<bool, Error> {
        let found = rustix::fs::fstatfs(&self.fd).map_err(Error::io("ask for", &self.path))?;
        Ok(u64::try_from(found.f_type).is_ok_and(|kind| kind == OVERLAYFS))
    }

    /// Whether it is where something is mounted.
    pub fn is_mount(&self) -> Result<bool, Error> {
        let stat = stat_of(&self.fd).map_err(Error::io("look at", &self.path))?;
        Ok(is_mount(&stat))
    }

    /// Opens a folder in it.
    pub fn inner(&self, component: &OsStr) -> Result<Self, Error> {
        let path = self.path.join(component);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.fd, component, flags, Mode::empty(), BENEATH);
        Ok(Self {
            fd: opened.map_err(Error::io("open", &path))?,
            path,
            parent: None,
        })
    }

    /// Makes all of its file system that was written durable.
    pub fn sync(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.fd).map_err(Error::io("sync", &self.path))
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What the kernel says of an entry of an open folder.
pub fn stat(folder: impl AsFd, component: &OsStr) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(folder, component, flags, StatxFlags::BASIC_STATS)
}

/// Whether something else begins there.
pub fn is_mount(stat: &Statx) -> bool {
    stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}

/// The kind of an entry, without what a symbolic link says.
pub fn kind(stat: &Statx) -> Option<Kind> {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    Some(match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::Directory => Kind::Folder,
        FileType::RegularFile => Kind::File,
        FileType::Symlink => Kind::Symlink(Box::default()),
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::Character { major, minor },
        FileType::BlockDevice => Kind::Block { major, minor },
        FileType::Unknown => return None,
    })
}

/// What is said of an entry, with its extended attributes; of one of a layer as its overlay shows
/// them.
pub fn meta(
    folder: impl AsFd,
    component: &OsStr,
    stat: &Statx,
    is_of_layer: bool,
) -> io::Result<Meta> {
    let is_link = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Symlink;
    Ok(Meta {
        mode: if is_link {
            0
        } else {
            u32::from(stat.stx_mode) & 0o7777
        },
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        modified: modified(stat),
        xattrs: xattr::read(&by_descriptor(folder, component), is_of_layer)?,
    })
}

/// Whether a folder of a layer shows nothing of what the layers below have.
pub fn is_opaque(folder: impl AsFd, component: &OsStr) -> bool {
    xattr::is_opaque(&by_descriptor(folder, component))
}

/// When it was last written.
pub fn modified(stat: &Statx) -> Moment {
    Moment {
        seconds: stat.stx_mtime.tv_sec,
        nanos: stat.stx_mtime.tv_nsec,
    }
}

/// When anything of it last changed.
pub fn changed(stat: &Statx) -> Moment {
    Moment {
        seconds: stat.stx_ctime.tv_sec,
        nanos: stat.stx_ctime.tv_nsec,
    }
}

/// Now, as inodes would have it, less some ticks of their clock: what was changed later than this
/// may be changed again and show the same time.
pub fn a_moment_ago() -> Moment {
    let now = clock_gettime(ClockId::Realtime);
    let now = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    );
    let then = now.saturating_sub(TICKS);
    Moment {
        seconds: i64::try_from(then.as_secs()).unwrap_or(i64::MAX),
        nanos: then.subsec_nanos(),
    }
}

/// Several ticks of the slowest clock that kernels keep: 10 ms.
const TICKS: Duration = Duration::from_millis(100);

/// The path of an entry of an open folder: extended attributes of links, sockets and devices have
/// no call that takes a descriptor. The last component is not followed.
fn by_descriptor(folder: impl AsFd, component: &OsStr) -> PathBuf {
    let fd = folder.as_fd().as_raw_fd();
    Path::new("/proc/self/fd")
        .join(fd.to_string())
        .join(component)
}

/// Makes the metadata of an entry this, of which it has `old` attributes.
pub fn set_meta(
    folder: impl AsFd + Copy,
    component: &OsStr,
    (is_link, old): (bool, &Meta),
    new: &Meta,
) -> rustix::io::Result<()> {
    use rustix::fs::{Gid, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
    let (uid, gid) = (Uid::from_raw(new.uid), Gid::from_raw(new.gid));
    // First the owner: it takes set-id bits and capabilities away.
    rustix::fs::chownat(
        folder,
        component,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if !is_link {
        chmod(folder, component, Mode::from_raw_mode(new.mode))?;
    }
    let path = by_descriptor(folder, component);
    for name in old
        .xattrs
        .keys()
        .filter(|name| !new.xattrs.contains_key(*name))
    {
        match rustix::fs::lremovexattr(&path, OsStr::from_bytes(name)) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    for (name, value) in &new.xattrs {
        rustix::fs::lsetxattr(&path, OsStr::from_bytes(name), value, XattrFlags::empty())?;
    }
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: new.modified.seconds,
            tv_nsec: new.modified.nanos.into(),
        },
    };
    rustix::fs::utimensat(folder, component, &times, AtFlags::SYMLINK_NOFOLLOW)
}

/// Removes an entry of an open folder with all that is in it: no symbolic link is followed, and no
/// mount entered.
pub fn remove_all(folder: BorrowedFd<'_>, component: &OsStr) -> io::Result<()> {
    remove_below(folder, component, 0)
}

fn remove_below(folder: BorrowedFd<'_>, component: &OsStr, depth: usize) -> io::Result<()> {
    let stat = stat(folder, component)?;
    if is_mount(&stat) {
        return Err(Errno::BUSY.into());
    }
    if kind(&stat) != Some(Kind::Folder) {
        return Ok(rustix::fs::unlinkat(folder, component, AtFlags::empty())?);
    }
    if REMOVED_DEPTH_MAX <= depth {
        return Err(io::Error::other(format!(
            "it has folders more than {REMOVED_DEPTH_MAX} deep"
        )));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(folder, component, flags, Mode::empty(), BENEATH)?;
    for name in entries(&opened)? {
        remove_below(opened.as_fd(), &name, depth + 1)?;
    }
    Ok(rustix::fs::unlinkat(folder, component, AtFlags::REMOVEDIR)?)
}

/// Most folders within each other that are removed; each is held open.
const REMOVED_DEPTH_MAX: usize = 512;

/// What is in an open folder.
pub fn entries(folder: impl AsFd) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// Changes the mode of an entry, and of nothing that it leads to.
fn chmod(folder: impl AsFd, component: &OsStr, mode: Mode) -> rustix::io::Result<()> {
    // Opened so, a device or a pipe does not notice, but `fchmod` refuses it.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let entry = rustix::fs::openat(folder, component, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(stat_of(&entry)?.stx_mode.into());
    if kind == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    let path = format!("/proc/self/fd/{}", entry.as_raw_fd());
    rustix::fs::chmodat(CWD, path, mode, AtFlags::empty())
}

/// What the kernel says of an open file.
pub fn stat_of(file: impl AsFd) -> rustix::io::Result<Statx> {
    rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_mode_is_never_that_of_what_a_link_leads_to() {
        let place = tempfile::tempdir().expect("a folder");
        let mode_of = |name: &str| {
            let metadata = fs::metadata(place.path().join(name)).expect("it is there");
            metadata.permissions().mode() & 0o7777
        };
        fs::write(place.path().join("file"), "").expect("a file");
        symlink("file", place.path().join("link")).expect("a link");
        let folder = Folder::open(place.path()).expect("a folder");
        let set = |name: &str, mode| {
            let component = OsStr::new(name);
            let stat = stat(&folder, component).expect("it is there");
            let old = meta(&folder, component, &stat, false).expect("what it has");
            let new = Meta {
                mode,
                ..old.clone()
            };
            set_meta(&folder, component, (false, &old), &new)
        };
        set("file", 0o640).expect("changed");
        set(".", 0o710).expect("changed");
        assert_eq!((mode_of("file"), mode_of(".")), (0o640, 0o710));
        assert_eq!(set("link", 0o4777), Err(Errno::LOOP));
        assert_eq!(mode_of("file"), 0o640);
    }
}
