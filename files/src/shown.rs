//! By which a mount is known of which nothing is open: whoever holds it open keeps others from
//! unmounting it.
//!
//! Absent: certainty before Linux 6.8, where the number of a mount may be given to the next one.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};

use crate::error::Error;
use crate::kernel::Folder;

/// Numbers of mounts that are never given again (`STATX_MNT_ID_UNIQUE`).
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What a folder was that a mount shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Shown {
    pub(crate) fn of(folder: &Folder) -> Result<Self, Error> {
        let flags = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID | MNT_ID_UNIQUE;
        let stat = rustix::fs::statx(folder, "", AtFlags::EMPTY_PATH, flags);
        let stat = stat.map_err(Error::io("look at", folder.path()))?;
        Ok(Self {
            path: folder.path().to_owned(),
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        })
    }

    /// Whether the same is there.
    pub fn is_there(&self) -> Result<bool, Error> {
        Ok(Self::of(&Folder::open(&self.path)?)? == *self)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_one_by_the_same_path_is_told_from_it() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("merged");
        fs::create_dir(&path).expect("a folder");
        let shown = Shown::of(&Folder::open(&path).expect("a folder")).expect("known");
        assert!(shown.is_there().expect("it is"));
        // One more mount of the same.
        let other = Shown {
            mount: shown.mount + 1,
            ..shown.clone()
        };
        assert!(shown.mount != 0 && !other.is_there().expect("another"));
        fs::rename(&path, root.path().join("ours")).expect("renamed");
        shown.is_there().expect_err("nothing is there");
        fs::create_dir(&path).expect("a folder");
        assert!(!shown.is_there().expect("another"));
        assert_eq!(shown.path(), path);
    }
}
