//! Which cgroup a path means: somebody may remove one, and make another by the same name.
//!
//! Invariant: a file of a cgroup that is known is opened within the folder that was compared, so
//! that nobody can put another in its place in between. Absent: the boot, in which alone this
//! counts.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::freezer::Freezer;

/// What tells a folder from every other of its path in one boot: the kernel counts cgroups on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderId {
    device: u64,
    inode: u64,
}

/// A folder that is what it is to be, and a path that means it as long as this is kept.
#[derive(Debug)]
pub(crate) struct Opened {
    path: PathBuf,
    _folder: File,
}

impl FolderId {
    /// What is never there.
    pub const NEVER: Self = Self {
        device: u64::MAX,
        inode: 0,
    };

    /// Of the folder that is there now.
    pub fn of(folder: &Path) -> io::Result<Self> {
        fs::symlink_metadata(folder).map(|found| Self {
            device: found.dev(),
            inode: found.ino(),
        })
    }

    /// Whether this is what is there now.
    pub fn is_at(self, folder: &Path) -> bool {
        Self::of(folder).is_ok_and(|found| found == self)
    }

    /// Opens it; not found if another one is there.
    pub(crate) fn open(self, path: &Path) -> io::Result<Opened> {
        let folder = File::open(path)?;
        let found = folder.metadata()?;
        if (found.dev(), found.ino()) != (self.device, self.inode) {
            let text = "somebody else has made it anew";
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(Opened {
            path: format!("/proc/self/fd/{}", folder.as_raw_fd()).into(),
            _folder: folder,
        })
    }
}

impl Opened {
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Freezer {
    pub(crate) fn read(&self, file: &str) -> io::Result<String> {
        match self.id() {
            Some(known) => fs::read_to_string(known.open(self.path())?.file(file)),
            None => fs::read_to_string(self.path().join(file)),
        }
    }

    pub(crate) fn write(&self, file: &str, value: &str) -> io::Result<()> {
        match self.id() {
            Some(known) => fs::write(known.open(self.path())?.file(file), value),
            None => fs::write(self.path().join(file), value),
        }
    }
}
