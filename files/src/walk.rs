//! What is in a folder at the moment: each entry as the kernel describes it, none of its contents.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::Statx;
use rustix::io::Errno;

use crate::error::Error;
use crate::keep::HIDDEN;
use crate::kernel::{self, Folder};
use crate::name::Name;
use crate::tree::{Kind, Moment};
use crate::{DEPTH_MAX, ENTRIES_MAX, FILE_BYTES_MAX};

/// Which inode something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Major and minor number of its device.
    pub device: (u32, u32),
    /// Its number there.
    pub inode: u64,
}

/// An entry.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) key: Key,
    /// Which inode processes see there: of a file of a layer that of the overlay, if it shows it.
    pub(crate) shown: Option<Key>,
    pub(crate) kind: Kind,
    pub(crate) stat: Statx,
}

/// What changes when something of an inode does. The same says nothing by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) changed: Moment,
    modified: Moment,
    size: u64,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Entries, the folder itself included.
    pub entries: u64,
    /// Bytes that files take on disk.
    pub bytes: u64,
}

impl Totals {
    /// What must come besides what is there already.
    pub const fn without(self, there: Self) -> Self {
        Self {
            entries: self.entries.saturating_sub(there.entries),
            bytes: self.bytes.saturating_sub(there.bytes),
        }
    }
}

impl Key {
    pub(crate) const fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }
}

impl Found {
    /// An inode's number may be used again, for something of another kind too.
    pub(crate) const fn identity(&self) -> (Key, u8) {
        (self.key, self.kind.tag())
    }

    /// It is an entry of a folder of the upper layer of an overlay, which has another in its place.
    fn is_of_layer(&mut self, (folder, shown): (&OwnedFd, Option<&OwnedFd>), component: &OsStr) {
        match self.kind {
            Kind::Character { major: 0, minor: 0 } => self.kind = Kind::Whiteout,
            Kind::Folder if kernel::is_opaque(folder, component) => self.kind = Kind::Opaque,
            Kind::File => {
                let shown = shown.and_then(|shown| kernel::stat(shown, component).ok());
                self.shown = shown.map(|stat| Key::of(&stat));
            }
            _ => {}
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        Stamp {
            changed: kernel::changed(&self.stat),
            modified: kernel::modified(&self.stat),
            size: self.stat.stx_size,
        }
    }
}

/// All entries. What comes or goes meanwhile may be among them or not. With `overlay` the folder is
/// the upper layer of that.
pub(crate) fn walk(
    folder: &Folder,
    overlay: Option<&Folder>,
) -> Result<BTreeMap<Name, Found>, Error> {
    let mut all = BTreeMap::new();
    let root = kernel::stat(folder, OsStr::new("."));
    let root = root.map_err(Error::io("look at", folder.path()))?;
    insert(&mut all, folder, Name::default(), &root, None)?;
    let mut folders = vec![(Name::default(), 0)];
    while let Some((name, depth)) = folders.pop() {
        let opened = match folder.folder_at(&name) {
            // It has gone, or something else has come in its place.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !name.is_root() => continue,
            Err(Errno::XDEV) => return Err(mounted(folder, &name)),
            opened => opened.map_err(Error::io("open", folder.path_of(&name)))?,
        };
        let shown = overlay.and_then(|overlay| overlay.folder_at(&name).ok());
        let entries = kernel::entries(&opened).map_err(Error::io("read", folder.path_of(&name)))?;
        for component in entries {
            let component = component.as_bytes();
            if component == HIDDEN.as_bytes() {
                return Err(Error::unfit(
                    folder.path_of(&name).join(HIDDEN),
                    "has folders of workloads that have left or come: remove it, once none does",
                ));
            }
            let child = name.child(component);
            let child = child.map_err(|_| too_deep(folder, &name))?;
            if DEPTH_MAX <= depth {
                return Err(too_deep(folder, &name));
            }
            let stat = match kernel::stat(&opened, OsStr::from_bytes(component)) {
                Err(Errno::NOENT) => continue,
                stat => stat.map_err(Error::io("look at", folder.path_of(&child)))?,
            };
            if kernel::is_mount(&stat) {
                return Err(mounted(folder, &child));
            }
            let is_folder = insert(&mut all, folder, child.clone(), &stat, Some(&opened))?;
            if is_folder {
                folders.push((child.clone(), depth + 1));
            }
            if overlay.is_some()
                && let Some(found) = all.get_mut(&child)
            {
                let folders = (&opened, shown.as_ref());
                found.is_of_layer(folders, OsStr::from_bytes(component));
            }
        }
    }
    Ok(all)
}

/// Adds an entry, unless it is gone. Answers whether it is a folder.
fn insert(
    all: &mut BTreeMap<Name, Found>,
    folder: &Folder,
    name: Name,
    stat: &Statx,
    parent: Option<&OwnedFd>,
) -> Result<bool, Error> {
    let Some(mut kind) = kernel::kind(stat) else {
        return Err(Error::unfit(
            folder.path_of(&name),
            "is of no kind that travels",
        ));
    };
    if let (Kind::Symlink(target), Some(parent)) = (&mut kind, parent) {
        let (_, component) = name.split();
        match rustix::fs::readlinkat(parent, component, Vec::new()) {
            Ok(read) => *target = read.to_bytes().into(),
            Err(Errno::NOENT | Errno::INVAL) => return Ok(false),
            Err(error) => return Err(Error::io("read the link", folder.path_of(&name))(error)),
        }
    }
    if FILE_BYTES_MAX < stat.stx_size {
        return Err(Error::unfit(folder.path_of(&name), "is longer than 1 PiB"));
    }
    if ENTRIES_MAX <= all.len() {
        return Err(Error::Limit {
            what: "entries of a folder that travels",
            max: ENTRIES_MAX as u64,
        });
    }
    let is_folder = kind == Kind::Folder;
    let key = Key::of(stat);
    let found = Found {
        key,
        shown: Some(key),
        kind,
        stat: *stat,
    };
    all.insert(name, found);
    Ok(is_folder)
}

/// Why it is not written to.
pub(crate) const ELSEWHERE: &str = "has a name outside of the folder, where a store would show";

/// Something that has a name in the folder and more of them elsewhere: a store here would be one
/// there.
pub(crate) fn named_elsewhere(all: &BTreeMap<Name, Found>) -> Option<&Name> {
    let mut names = HashMap::<Key, u32>::new();
    let others = || all.iter().filter(|(_, found)| !found.kind.is_by_name());
    for (_, found) in others() {
        *names.entry(found.key).or_default() += 1;
    }
    let elsewhere = |found: &Found| names.get(&found.key) < Some(&found.stat.stx_nlink);
    let (name, _) = others().find(|(_, found)| elsewhere(found))?;
    Some(name)
}

fn mounted(folder: &Folder, name: &Name) -> Error {
    Error::unfit(
        folder.path_of(name),
        "is a mount: a folder travels without what is mounted in it, so name folders beside it",
    )
}

fn too_deep(folder: &Folder, name: &Name) -> Error {
    let why = format!(
        "has entries more than {DEPTH_MAX} folders deep, or with longer names than \
        {} bytes",
        crate::NAME_BYTES_MAX
    );
    Error::unfit(folder.path_of(name), why)
}

/// How much all of these are: of hard links, the file once.
pub(crate) fn totals(all: &BTreeMap<Name, Found>) -> Totals {
    let mut counted = std::collections::HashSet::new();
    let mut totals = Totals::default();
    for found in all.values() {
        totals.entries += 1;
        if counted.insert(found.key) {
            totals.bytes += found.stat.stx_blocks * 512;
        }
    }
    totals
}
