//! The target's half: a folder of its own, into which differences are applied, and which becomes
//! the workload's when it is proven.
//!
//! ```text
//! <beside the path>/.pageferry-files/<name>/tree     what becomes the folder
//!                                          /hold     files between two names, by their number
//! ```
//!
//! Invariants: whatever comes, nothing outside of this is touched; what the tree says was read
//! back;
//! it is proven only if the last operation was an end with the digest of that tree, and all of it
//! is on disk.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::block::{self, BLOCK_BYTES};
use crate::error::Error;
use crate::kernel::{self, Folder};
use crate::name::Name;
use crate::op::{FRAME_HEADER_BYTES, Op, Taker, frame};
use crate::record::Record;
use crate::source::{Source, Suspects};
use crate::tree::{Digest, Kind, Meta, Node, NodeId, Tree};
use crate::walk::{ELSEWHERE, Key};
use crate::{BLOCKS_MAX, ENTRIES_MAX};

/// A folder that comes.
#[derive(Debug)]
pub struct Staging {
    /// What both folders are in.
    place: PathBuf,
    folder: Folder,
    hold: Folder,
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
        let Some(digest) = base else {
            return Self::over(place, Tree::default());
        };
        let path = tree_of(place);
        let mut source = Source::open(&path, None)?;
        let report = source.difference(&Suspects::default(), true, &mut |_| Ok(()))?;
        if report.digest != digest {
            return Err(Error::Digest { path });
        }
        source.check_names()?;
        let (tree, _) = source.record().into_parts();
        Self::over(place, tree)
    }

    fn over(place: &Path, tree: Tree) -> Result<Self, Error> {
        make_folder(&place.join("hold"))?;
        let mut places: HashMap<NodeId, Places> = HashMap::new();
        for (name, id) in &tree.names {
            places.entry(*id).or_default().names.insert(name.clone());
        }
        Ok(Self {
            folder: Folder::open(&tree_of(place))?,
            hold: Folder::open(&place.join("hold"))?,
            place: place.to_owned(),
            blocks: tree.blocks(),
            tree,
            places,
            open: None,
            buffer: vec![0; BLOCK_BYTES],
            proven: None,
        })
    }

    /// Which inode the folder is, wherever it is put: its device and number.
    pub fn inode(&self) -> Result<(u64, u64), Error> {
        let stat = kernel::stat_of(&self.folder);
        let stat = stat.map_err(Error::io("look at", &self.place))?;
        let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        Ok((device, stat.stx_ino))
    }

    /// Where both folders are.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Where the folder is that becomes the workload's.
    pub fn tree_path(&self) -> PathBuf {
        tree_of(&self.place)
    }

    /// What it is, if the last difference was applied to its end and is on disk.
    pub const fn proven(&self) -> Option<Digest> {
        self.proven
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
        let is_folder = self.node(id)?.kind == Kind::Folder;
        let path = self.folder.path_of(name);
        let places = self.places.get_mut(&id).ok_or(LOST)?;
        let is_last = places.names.len() == 1 && !places.is_held;
        let (parent, component) = self
            .folder
            .parent(name)
            .map_err(Error::io("open the folder of", &path))?;
        let failed = Error::io("remove", &path);
        if is_folder {
            rustix::fs::unlinkat(parent, &component, AtFlags::REMOVEDIR).map_err(failed)?;
            self.folder.forget_parent();
        } else if is_last && keep {
            let (held, flags) = (id.0.to_string(), RenameFlags::NOREPLACE);
            rustix::fs::renameat_with(parent, &component, &self.hold, held, flags)
                .map_err(failed)?;
            places.is_held = true;
        } else {
            rustix::fs::unlinkat(parent, &component, AtFlags::empty()).map_err(failed)?;
        }
        places.names.remove(name);
        self.tree.names.remove(name);
        if is_last && (is_folder || !keep) {
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
        let is_folder = parent.is_some_and(|node| node.kind == Kind::Folder);
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
        let path = self.folder.path_of(&name);
        // The folder itself was made with this.
        if !name.is_root() {
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
        if self.node(id)?.kind == Kind::Folder || name.is_root() {
            return Err(Error::Malformed("a folder has two names"));
        }
        let path = self.folder.path_of(&name);
        let places = self.places.get_mut(&id).ok_or(LOST)?;
        let failed = || Error::io("name", &path);
        if places.is_held {
            let (parent, component) = self.folder.parent(&name).map_err(failed())?;
            let (held, flags) = (id.0.to_string(), RenameFlags::NOREPLACE);
            rustix::fs::renameat_with(&self.hold, held, parent, &component, flags)
                .map_err(failed())?;
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
                kernel::meta(parent, component, &stat)
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
            Some(_) | None => act(self.hold.as_fd(), &OsString::from(id.0.to_string())),
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

/// The folder itself, of what is at `place`.
pub(crate) fn tree_of(place: &Path) -> PathBuf {
    place.join("tree")
}

const LOST: Error = Error::Malformed("a node is not there");

/// Makes a folder that only root may enter.
fn make_folder(path: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(|source| Error::Io {
        what: "make",
        path: path.to_owned(),
        source,
    })
}

fn make(parent: BorrowedFd<'_>, component: &OsString, kind: &Kind) -> rustix::io::Result<()> {
    let mode = Mode::RUSR | Mode::WUSR;
    let node = |kind, device| rustix::fs::mknodat(parent, component, kind, mode, device);
    let device = |major: u32, minor: u32| rustix::fs::makedev(major, minor);
    match kind {
        Kind::Folder => rustix::fs::mkdirat(parent, component, Mode::RWXU),
        Kind::File => node(FileType::RegularFile, 0),
        Kind::Symlink(target) => rustix::fs::symlinkat(&**target, parent, component),
        Kind::Fifo => node(FileType::Fifo, 0),
        Kind::Socket => node(FileType::Socket, 0),
        Kind::Character { major, minor } => node(FileType::CharacterDevice, device(*major, *minor)),
        Kind::Block { major, minor } => node(FileType::BlockDevice, device(*major, *minor)),
    }
}

/// Makes a hole, or where there are none zeroes.
fn punch(file: &File, offset: u64, length: usize) -> std::io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, how, offset, length as u64) {
        Err(Errno::OPNOTSUPP) => file.write_all_at(&vec![0; length], offset),
        punched => punched.map_err(Into::into),
    }
}

/// What of an entry is not as it should be.
fn difference(found: &Meta, wanted: &Meta) -> String {
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
    match fs::remove_dir_all(place) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Io {
            what: "remove",
            path: place.to_owned(),
            source,
        }),
    }
}
