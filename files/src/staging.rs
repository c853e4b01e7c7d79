//! The target's half: a folder of its own, into which differences are applied, and which becomes
//! the workload's when it is proven; or one that is there already, and that nobody uses yet.
//!
//! ```text
//! <beside the path>/.pageferry-files/<name>/tree     what becomes the folder
//!                                          /hold     files between two names, by their number
//! <the folder>/.pageferry-files                      the same of one that is there, if need be:
//!                                                    until the end of a difference
//! ```
//!
//! Invariants: whatever comes, nothing outside of this is touched; what the tree says was read
//! back; it is proven only if the last operation was an end with the digest of that tree, and all
//! of it is on disk.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::block::{self, BLOCK_BYTES};
use crate::error::Error;
use crate::kernel::{self, Folder};
use crate::make::{difference, make, make_folder, punch};
use crate::name::Name;
use crate::op::{FRAME_HEADER_BYTES, Op, Taker, frame};
use crate::record::Record;
use crate::shown::Shown;
use crate::source::{Source, Suspects};
use crate::tree::{Digest, Kind, Meta, Node, NodeId, Tree};
use crate::walk::{ELSEWHERE, Key};
use crate::within::{NO_LAYER, Within};
use crate::{BLOCKS_MAX, ENTRIES_MAX};

/// A folder that comes.
#[derive(Debug)]
pub struct Staging {
    /// What both folders are in, or the folder itself.
    place: PathBuf,
    folder: Folder,
    /// Made when the first file comes into it.
    hold: Option<Folder>,
    /// What is particular to a folder that was there.
    within: Option<Within>,
    tree: Tree,
    places: HashMap<NodeId, Places>,
    /// Blocks of all files that hold something.
    blocks: u64,
    /// The file that was last written.
    open: Option<(NodeId, File)>,
    buffer: Vec<u8>,
    proven: Option<Digest>,
}

/// Where a node is.
#[derive(Debug, Default)]
struct Places {
    names: BTreeSet<Name>,
    is_held: bool,
}

impl Staging {
    /// Makes the folders of an empty one at `place`, which must not be there.
    pub(crate) fn make(place: &Path) -> Result<(), Error> {
        make_folder(place)?;
        make_folder(&tree_of(place))
    }

    /// One that begins with what is at `place`: nothing, or what must be of this digest. That is
    /// read whole.
    pub fn open(place: &Path, base: Option<Digest>) -> Result<Self, Error> {
        let folder = Folder::open(&tree_of(place))?;
        let tree = base.map_or_else(
            || Ok(Tree::default()),
            |digest| read(&tree_of(place), digest),
        );
        let mut staging = Self::over(place, folder, tree?);
        make_folder(&place.join("hold"))?;
        staging.hold = Some(Folder::open(&place.join("hold"))?);
        Ok(staging)
    }

    /// The same in a folder that is there, and has what nothing came for: that goes.
    pub fn open_root(path: &Path, base: Option<Digest>) -> Result<Self, Error> {
        let folder = Folder::open(path)?;
        let (tree, within) = match base {
            None => (Tree::default(), Within::of(&folder)?),
            Some(digest) => (read(path, digest)?, Within::default()),
        };
        let mut staging = Self::over(path, folder, tree);
        staging.within = Some(within);
        Ok(staging)
    }

    /// The same in what an overlay shows, and what nothing came for stays: what comes is the upper
    /// layer of another one over the same layers.
    pub fn open_overlay(path: &Path) -> Result<Self, Error> {
        let folder = Folder::open(path)?;
        let within = Within::of_overlay(&folder)?;
        let mut staging = Self::over(path, folder, Tree::default());
        staging.within = Some(within);
        Ok(staging)
    }

    fn over(place: &Path, folder: Folder, tree: Tree) -> Self {
        let mut places: HashMap<NodeId, Places> = HashMap::new();
        for (name, id) in &tree.names {
            places.entry(*id).or_default().names.insert(name.clone());
        }
        Self {
            folder,
            hold: None,
            within: None,
            place: place.to_owned(),
            blocks: tree.blocks(),
            tree,
            places,
            open: None,
            buffer: vec![0; BLOCK_BYTES],
            proven: None,
        }
    }

    /// Which inode the folder is, wherever it is put: its device and number.
    pub fn inode(&self) -> Result<(u64, u64), Error> {
        let stat = kernel::stat_of(&self.folder);
        let stat = stat.map_err(Error::io("look at", &self.place))?;
        let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        Ok((device, stat.stx_ino))
    }

    /// By which a mount is known, without anything of it open.
    pub fn shown(&self) -> Result<Shown, Error> {
        Shown::of(&self.folder)
    }

    /// Where both folders are.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Where the folder is that becomes the workload's.
    pub fn tree_path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// What it is, if the last difference was applied to its end and is on disk.
    pub const fn proven(&self) -> Option<Digest> {
        self.proven
    }

    /// Fails unless that is so.
    pub fn check_proven(&self) -> Result<(), Error> {
        match self.proven {
            Some(_) => Ok(()),
            None => Err(Error::unfit(&self.place, "is not proven to be whole")),
        }
    }

    /// What the other node has, for a way back. The folder may be in use: an entry that has gone is
    /// one of which it is not known what it was here.
    pub fn record(&mut self) -> Record {
        let mut ids = HashMap::new();
        for (id, places) in &self.places {
            let tag = self.tree.nodes.get(id).map(|node| node.kind.tag());
            let name = places.names.first();
            let (Some(tag), Some(name)) = (tag.filter(|tag| *tag != Kind::Folder.tag()), name)
            else {
                continue;
            };
            let stat = self
                .folder
                .parent(name)
                .and_then(|(parent, component)| kernel::stat(parent, &component));
            if let Ok(stat) = stat {
                ids.insert((Key::of(&stat), tag), *id);
            }
        }
        Record::new(self.tree.clone(), ids)
    }

    /// How many bytes follow the header of a frame, and their checksum.
    pub fn frame(header: [u8; FRAME_HEADER_BYTES]) -> Result<(usize, u32), Error> {
        frame(header)
    }

    /// Applies the operations of a frame, without its header. Answers whether that was the end of a
    /// difference: then the folder is proven.
    pub fn apply(&mut self, operations: &[u8], checksum: u32) -> Result<bool, Error> {
        self.proven = None;
        if crc32fast::hash(operations) != checksum {
            return Err(Error::Malformed("a frame has a wrong checksum"));
        }
        let mut rest = Taker(operations);
        while !rest.is_empty() {
            if self.proven.is_some() {
                return Err(Error::Malformed("something comes behind the end"));
            }
            match rest.op()? {
                Op::Remove { name, keep } => self.remove(&name, keep)?,
                Op::New { name, id, kind } => self.create(name, id, kind)?,
                Op::Name { name, id } => self.name(name, id)?,
                Op::Size { id, size } => self.resize(id, size)?,
                Op::Data {
                    id,
                    block,
                    pieces,
                    bytes,
                } => self.write(id, block, pieces, bytes)?,
                Op::Hole { id, block } => self.write(id, block, 0, &[])?,
                Op::Meta { id, meta } => self.describe(id, &meta)?,
                Op::End { digest } => self.end(digest)?,
            }
        }
        Ok(self.proven.is_some())
    }

    fn remove(&mut self, name: &Name, keep: bool) -> Result<(), Error> {
        let id = match self.tree.names.get(name) {
            Some(id) if !name.is_root() => *id,
            Some(_) | None => return Err(Error::Malformed("what is removed is not there")),
        };
        let kind = self.node(id)?.kind.clone();
        let path = self.folder.path_of(name);
        let places = self.places.get_mut(&id).ok_or(LOST)?;
        let is_last = places.names.len() == 1 && !places.is_held;
        let is_held = is_last && keep && !kind.is_by_name();
        let hold = match is_held {
            true => Some(open_hold(&mut self.hold, &self.folder)?),
            false => None,
        };
        let (parent, component) = self
            .folder
            .parent(name)
            .map_err(Error::io("open the folder of", &path))?;
        let failed = Error::io("remove", &path);
        match (&kind, &mut self.within, hold) {
            (Kind::Folder | Kind::Opaque, Some(within), _) => {
                within.remove_folder(&mut self.folder, &self.tree, name)?;
            }
            (Kind::Folder | Kind::Opaque, None, _) => {
                rustix::fs::unlinkat(parent, &component, AtFlags::REMOVEDIR).map_err(failed)?;
                self.folder.forget_parent();
            }
            // What it hid stays away: something else takes its place, or its folder goes.
            (Kind::Whiteout, ..) => {}
            (_, _, Some(hold)) => {
                let (held, flags) = (id.0.to_string(), RenameFlags::NOREPLACE);
                rustix::fs::renameat_with(parent, &component, hold, held, flags).map_err(failed)?;
                places.is_held = true;
            }
            (_, _, None) => {
                rustix::fs::unlinkat(parent, &component, AtFlags::empty()).map_err(failed)?;
            }
        }
        places.names.remove(name);
        self.tree.names.remove(name);
        if is_last && !is_held {
            self.places.remove(&id);
            if let Some(node) = self.tree.nodes.remove(&id) {
                self.blocks -= node.blocks.len() as u64;
            }
            self.open = None;
        }
        Ok(())
    }

    /// Checks that something of this name may come.
    fn admit(&self, name: &Name) -> Result<(), Error> {
        if ENTRIES_MAX <= self.tree.names.len() {
            return Err(Error::Limit {
                what: "entries of a folder that travels",
                max: ENTRIES_MAX as u64,
            });
        }
        if self.tree.names.contains_key(name) {
            return Err(Error::Malformed("what comes is there already"));
        }
        let parent = self.tree.names.get(&name.split().0);
        let parent = parent.and_then(|id| self.tree.nodes.get(id));
        let is_folder = parent.is_some_and(|node| node.kind.is_folder());
        match name.is_root() || is_folder {
            true => Ok(()),
            false => Err(Error::Malformed("what comes is in no folder")),
        }
    }

    fn create(&mut self, name: Name, id: NodeId, kind: Kind) -> Result<(), Error> {
        self.admit(&name)?;
        if self.tree.nodes.contains_key(&id) || (name.is_root() && kind != Kind::Folder) {
            return Err(Error::Malformed("a node comes twice, or a folder is none"));
        }
        let is_there = match &mut self.within {
            Some(within) => within.make_way(&mut self.folder, &name, &kind)?,
            None if matches!(kind, Kind::Whiteout | Kind::Opaque) => return Err(NO_LAYER),
            // The folder itself was made with this.
            None => name.is_root(),
        };
        let path = self.folder.path_of(&name);
        if !is_there {
            let (parent, component) = self
                .folder
                .parent(&name)
                .map_err(Error::io("open the folder of", &path))?;
            make(parent, &component, &kind).map_err(Error::io("make", &path))?;
        }
        self.tree.nodes.insert(id, Node::new(kind));
        self.places
            .entry(id)
            .or_default()
            .names
            .insert(name.clone());
        self.tree.names.insert(name, id);
        Ok(())
    }

    fn name(&mut self, name: Name, id: NodeId) -> Result<(), Error> {
        self.admit(&name)?;
        if self.node(id)?.kind.is_by_name() || name.is_root() {
            return Err(Error::Malformed("a folder has two names"));
        }
        if let Some(within) = &mut self.within {
            within.make_way(&mut self.folder, &name, &Kind::File)?;
        }
        let path = self.folder.path_of(&name);
        let places = self.places.get_mut(&id).ok_or(LOST)?;
        let failed = || Error::io("name", &path);
        if places.is_held {
            let (parent, component) = self.folder.parent(&name).map_err(failed())?;
            let (held, flags) = (id.0.to_string(), RenameFlags::NOREPLACE);
            let hold = self.hold.as_ref().ok_or(LOST)?;
            rustix::fs::renameat_with(hold, held, parent, &component, flags).map_err(failed())?;
            places.is_held = false;
        } else {
            let known = places.names.first().ok_or(LOST)?;
            let (from, known) = known.split();
            let from = self.folder.folder_at(&from).map_err(failed())?;
            let (parent, component) = self.folder.parent(&name).map_err(failed())?;
            rustix::fs::linkat(&from, known, parent, &component, AtFlags::empty())
                .map_err(failed())?;
        }
        places.names.insert(name.clone());
        self.tree.names.insert(name, id);
        Ok(())
    }

    fn resize(&mut self, id: NodeId, size: u64) -> Result<(), Error> {
        let path = self.path_of(id);
        let file = self.file(id)?;
        rustix::fs::ftruncate(file, size).map_err(Error::io("resize", path))?;
        let node = self.tree.nodes.get_mut(&id).ok_or(LOST)?;
        let before = node.blocks.len() as u64;
        node.resize(size);
        self.blocks -= before - node.blocks.len() as u64;
        Ok(())
    }

    fn write(&mut self, id: NodeId, block: u64, pieces: u32, bytes: &[u8]) -> Result<(), Error> {
        let node = self.node(id)?;
        let (size, was) = (node.size, node.blocks.contains_key(&block));
        let length = block::length(size, block);
        let held = block::runs(pieces, true, length);
        let fits = held.iter().map(ExactSizeIterator::len).sum::<usize>() == bytes.len();
        let beyond = pieces
            .checked_shr(length.div_ceil(block::PIECE_BYTES) as u32)
            .unwrap_or(0);
        if length == 0 || !fits || beyond != 0 {
            return Err(Error::Malformed("a block is not one of its file"));
        }
        if BLOCKS_MAX <= self.blocks {
            return Err(Error::Limit {
                what: "blocks of a folder that travels",
                max: BLOCKS_MAX,
            });
        }
        let path = self.path_of(id);
        let offset = block * BLOCK_BYTES as u64;
        let mut buffer = std::mem::take(&mut self.buffer);
        let hash = self.file(id).and_then(|file| {
            let failed = |source| Error::Io {
                what: "write",
                path: path.clone(),
                source,
            };
            let mut rest = bytes;
            for run in held {
                let (now, later) = rest.split_at(run.len());
                file.write_all_at(now, offset + run.start as u64)
                    .map_err(failed)?;
                rest = later;
            }
            if was {
                for run in block::runs(pieces, false, length) {
                    punch(file, offset + run.start as u64, run.len()).map_err(failed)?;
                }
            }
            let back = &mut buffer[..length];
            file.read_exact_at(back, offset).map_err(failed)?;
            Ok(block::hash(back))
        });
        self.buffer = buffer;
        let hash = hash?;
        let node = self.tree.nodes.get_mut(&id).ok_or(LOST)?;
        match hash {
            Some(hash) => drop(node.blocks.insert(block, hash)),
            None => drop(node.blocks.remove(&block)),
        }
        self.blocks = self.blocks + u64::from(hash.is_some()) - u64::from(was);
        Ok(())
    }

    fn describe(&mut self, id: NodeId, meta: &Meta) -> Result<(), Error> {
        if self.node(id)?.kind == Kind::Whiteout {
            return Err(Error::Malformed("what is not there has attributes"));
        }
        self.set(id, meta)
    }

    /// Sets attributes of folders again, which removing something from them has changed.
    fn set_again(&mut self, folders: impl IntoIterator<Item = Name>) -> Result<(), Error> {
        for name in folders {
            let Some(id) = self.tree.names.get(&name).copied() else {
                continue;
            };
            let meta = self.node(id)?.meta.clone();
            // Those of a new one are to come.
            if meta != Meta::default() {
                self.set(id, &meta)?;
            }
        }
        Ok(())
    }

    /// Sets attributes of a node, and reads them back.
    fn set(&mut self, id: NodeId, meta: &Meta) -> Result<(), Error> {
        let is_link = matches!(self.node(id)?.kind, Kind::Symlink(_));
        let path = self.path_of(id);
        let name = self
            .places
            .get(&id)
            .and_then(|places| places.names.first().cloned());
        let name = name.unwrap_or_default();
        let found = self.located(id, |parent, component| {
            let look = || {
                let stat = kernel::stat(parent, component)?;
                kernel::meta(parent, component, &stat, false)
            };
            let old = look()?;
            kernel::set_meta(parent, component, (is_link, &old), meta)?;
            look()
        });
        let found = found.map_err(|source| Error::Io {
            what: "set the attributes of",
            path,
            source,
        })?;
        if found != *meta {
            return Err(Error::Entry(name, difference(&found, meta)));
        }
        self.tree.nodes.get_mut(&id).ok_or(LOST)?.meta = found;
        Ok(())
    }

    fn end(&mut self, digest: Digest) -> Result<(), Error> {
        self.open = None;
        if self.places.values().any(|places| places.is_held) {
            return Err(Error::Malformed("a file has no name at the end"));
        }
        if let Some(within) = &mut self.within {
            let mut changed = within.remove_others(&mut self.folder)?;
            if self.hold.take().is_some() {
                Within::remove_hold(&self.folder)?;
                changed.insert(Name::default());
            }
            self.set_again(changed)?;
        }
        if self.tree.digest() != digest {
            return Err(Error::Digest {
                path: self.place.clone(),
            });
        }
        self.folder.sync()?;
        self.proven = Some(digest);
        Ok(())
    }

    fn node(&self, id: NodeId) -> Result<&Node, Error> {
        self.tree.nodes.get(&id).ok_or(LOST)
    }

    /// For messages.
    fn path_of(&self, id: NodeId) -> PathBuf {
        let name = self.places.get(&id).and_then(|places| places.names.first());
        name.map_or_else(|| self.place.clone(), |name| self.folder.path_of(name))
    }

    /// Does something where a node is.
    fn located<T>(
        &mut self,
        id: NodeId,
        act: impl FnOnce(BorrowedFd<'_>, &std::ffi::OsStr) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        let Some(places) = self.places.get(&id) else {
            return Err(Errno::NOENT.into());
        };
        match places.names.first() {
            Some(name) if !places.is_held => {
                let (parent, component) = self.folder.parent(name)?;
                act(parent, &component)
            }
            Some(_) | None => {
                let hold = self.hold.as_ref().ok_or(Errno::NOENT)?;
                act(hold.as_fd(), &OsString::from(id.0.to_string()))
            }
        }
    }

    /// A file, to be written.
    fn file(&mut self, id: NodeId) -> Result<&File, Error> {
        if self.node(id)?.kind != Kind::File {
            return Err(Error::Malformed("what has bytes is no file"));
        }
        if self.open.as_ref().is_none_or(|(open, _)| *open != id) {
            let path = self.path_of(id);
            let opened = self.located(id, |parent, component| {
                let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(parent, component, flags, Mode::empty())?;
                let links = kernel::stat_of(&opened)?.stx_nlink;
                Ok((File::from(opened), links))
            });
            let (file, links) = opened.map_err(|source| Error::Io {
                what: "open",
                path: path.clone(),
                source,
            })?;
            let places = self.places.get(&id).ok_or(LOST)?;
            let names = places.names.len() as u64 + u64::from(places.is_held);
            if names < u64::from(links) {
                return Err(Error::unfit(path, ELSEWHERE));
            }
            self.open = Some((id, file));
        }
        self.open.as_ref().map(|(_, file)| file).ok_or(LOST)
    }
}

/// Where files are between two names; made in the folder itself if that was there before.
fn open_hold<'a>(hold: &'a mut Option<Folder>, folder: &Folder) -> Result<&'a Folder, Error> {
    if hold.is_none() {
        *hold = Some(Within::make_hold(folder)?);
    }
    hold.as_ref().ok_or(LOST)
}

/// What is at `path`, which must be of this digest. It is read whole.
fn read(path: &Path, digest: Digest) -> Result<Tree, Error> {
    let mut source = Source::open(path, None)?;
    let report = source.difference(&Suspects::default(), true, &mut |_| Ok(()))?;
    if report.digest != digest {
        return Err(Error::Digest {
            path: path.to_owned(),
        });
    }
    source.check_names()?;
    let (tree, _) = source.record().into_parts();
    Ok(tree)
}

/// The folder itself, of what is at `place`.
pub(crate) fn tree_of(place: &Path) -> PathBuf {
    place.join("tree")
}

const LOST: Error = Error::Malformed("a node is not there");
