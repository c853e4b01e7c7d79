//! The source's half: what the target lacks, found and encoded while the folder is in use, and once
//! more when it is not.
//!
//! Invariants: what is encoded is what the tree says of the target from then on; a node that could
//! not be read whole is looked at again; metadata of a node is told after its contents, and that of
//! a folder after all that is in it, because both change it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::block::{self, BLOCK_BYTES};
use crate::error::Error;
use crate::kernel::{self, Folder};
use crate::name::Name;
use crate::op::{Frames, Op};
use crate::read::{next_block, read_block};
use crate::tree::{Digest, Kind, Meta, Moment, Node, NodeId, Tree};
use crate::walk::{self, Found, Key, Stamp, Totals};
use crate::{BLOCKS_MAX, record::Record};

/// Files that somebody may store to without a trace: those that the workload has mapped shared and
/// writable, or open for writing.
#[derive(Clone, Debug)]
pub struct Suspects {
    /// Whoever has begun to store since may not be among them.
    since: Moment,
    /// None: every file is one.
    files: Option<HashSet<Key>>,
}

impl Suspects {
    /// Those that `look` finds; if it cannot tell, every file.
    pub fn look(look: impl FnOnce() -> Option<HashSet<Key>>) -> Self {
        let since = kernel::a_moment_ago();
        Self {
            since,
            files: look(),
        }
    }

    fn has(&self, key: &Key) -> bool {
        self.files.as_ref().is_none_or(|files| files.contains(key))
    }
}

impl Default for Suspects {
    /// None, as of now.
    fn default() -> Self {
        Self::look(|| Some(HashSet::new()))
    }
}

/// A folder that travels, and what the target has of it.
#[derive(Debug)]
pub struct Source {
    folder: Folder,
    /// What it is the upper layer of, as processes see that; none of a plain folder.
    overlay: Option<Folder>,
    /// Whiteouts that the target has had, and that have gone: what replaces one goes on to hide.
    lifted: BTreeSet<Name>,
    /// Files by what processes see of them.
    shown: HashMap<Key, NodeId>,
    /// What the target has.
    tree: Tree,
    /// Which node an inode is, with its kind: the number may be used again.
    ids: HashMap<(Key, u8), NodeId>,
    /// How it was when the tree was last brought in line with it. A node that is not here is
    /// compared.
    seen: HashMap<NodeId, Stamp>,
    next: u64,
    /// Whether its file system marks stores through mappings.
    tells: bool,
}

/// What a difference was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is in the folder.
    pub totals: Totals,
    /// Bytes of frames.
    pub bytes: u64,
    /// Bytes that were read of files, to be compared or sent.
    pub read: u64,
    /// Files whose blocks were compared.
    pub compared: u64,
    /// What the folder is at the target now.
    pub digest: Digest,
}

/// What one difference works with.
struct Course<'a> {
    found: BTreeMap<Name, Found>,
    ids: BTreeMap<Name, NodeId>,
    /// Folders in which a name has come or gone.
    touched: BTreeSet<Name>,
    /// Stamps from their moment on may come again.
    suspects: &'a Suspects,
    /// Nobody changes anything any more.
    frozen: bool,
    report: Report,
    buffer: Vec<u8>,
}

impl Source {
    /// Of a folder at an absolute path, of which the target has nothing, or what a record says.
    pub fn open(path: &Path, base: Option<Record>) -> Result<Self, Error> {
        let folder = Folder::open(path)?;
        if folder.is_mount()? {
            return Err(Error::unfit(
                path,
                "is a mount, and could not be put aside: name a folder in it",
            ));
        }
        let known = base.map_or_else(Default::default, Record::into_parts);
        Self::over(folder, None, known)
    }

    /// Of a folder that its owner removes, be it a mount: the target has nothing of it.
    pub fn open_volume(path: &Path) -> Result<Self, Error> {
        Self::over(Folder::open(path)?, None, Default::default())
    }

    /// Of the upper layer of an overlay, which is mounted at `overlay`: what it shows there of this
    /// is to be shown by another one over the same layers, of which the target has nothing yet.
    pub fn open_layer(path: &Path, overlay: &Path) -> Result<Self, Error> {
        let (folder, overlay) = (Folder::open(path)?, Folder::open(overlay)?);
        Self::over(folder, Some(overlay), Default::default())
    }

    fn over(
        folder: Folder,
        overlay: Option<Folder>,
        (tree, ids): (Tree, HashMap<(Key, u8), NodeId>),
    ) -> Result<Self, Error> {
        Ok(Self {
            tells: folder.tells()?,
            folder,
            overlay,
            lifted: BTreeSet::new(),
            shown: HashMap::new(),
            next: tree.nodes.len() as u64,
            tree,
            ids,
            seen: HashMap::new(),
        })
    }

    fn walk(&self) -> Result<BTreeMap<Name, Found>, Error> {
        walk::walk(&self.folder, self.overlay.as_ref())
    }

    /// Forgets what the target has, which turned out not to be so.
    pub fn forget(&mut self) {
        self.tree = Tree::default();
        self.ids.clear();
        self.seen.clear();
        self.shown.clear();
        self.next = 0;
    }

    /// What is in it, and which inodes those are.
    pub fn look(&self) -> Result<(Totals, HashSet<Key>), Error> {
        let found = self.walk()?;
        let files = found.values().filter(|found| found.kind == Kind::File);
        let keys = files.flat_map(|found| [Some(found.key), found.shown]);
        Ok((walk::totals(&found), keys.flatten().collect()))
    }

    /// Refuses it if something in it has a name elsewhere too.
    pub fn check_names(&self) -> Result<(), Error> {
        let found = self.walk()?;
        self.check_names_of(&found)
    }

    fn check_names_of(&self, found: &BTreeMap<Name, Found>) -> Result<(), Error> {
        match walk::named_elsewhere(found) {
            Some(name) => Err(Error::unfit(self.folder.path_of(name), walk::ELSEWHERE)),
            None => Ok(()),
        }
    }

    /// The files that were in it at the last difference.
    pub fn files(&self) -> HashSet<Key> {
        let files = self
            .ids
            .keys()
            .filter(|(_, kind)| *kind == Kind::File.tag());
        let files = files.map(|(key, _)| key);
        files.chain(self.shown.keys()).copied().collect()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What the target has.
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What there is at the target when this has been applied, to be found again by a later source.
    pub fn record(&self) -> Record {
        Record::new(self.tree.clone(), self.ids.clone())
    }

    /// Has those of a difference compared once more by the next, which were suspect after it only.
    pub fn doubt(&mut self, suspects: &Suspects) {
        let doubted = self.shown.iter().filter(|(key, _)| suspects.has(key));
        for (_, id) in doubted {
            self.seen.remove(id);
        }
    }

    /// Encodes what the target lacks. `suspects` must have been found before this is called. With
    /// `frozen` nothing may change meanwhile: what does is an error.
    pub fn difference(
        &mut self,
        suspects: &Suspects,
        frozen: bool,
        sink: &mut dyn FnMut(Vec<u8>) -> Result<(), Error>,
    ) -> Result<Report, Error> {
        // Another may be there now.
        self.folder.forget_parent();
        let found = self.walk()?;
        let mut course = Course {
            report: Report {
                totals: walk::totals(&found),
                ..Report::default()
            },
            ids: self.identify(&found),
            found,
            touched: BTreeSet::new(),
            suspects,
            frozen,
            buffer: vec![0; BLOCK_BYTES],
        };
        let mut frames = Frames::new(sink);
        self.remove(&mut course, &mut frames)?;
        if frozen {
            self.check_layer(&course.found)?;
        }
        self.add(&mut course, &mut frames)?;
        let is_folder = |found: &Found| found.kind.is_folder();
        let mut done = HashSet::new();
        for folders in [false, true] {
            let names: Vec<Name> = course.ids.keys().cloned().collect();
            for name in names {
                let id = course.ids[&name];
                if is_folder(&course.found[&name]) == folders && done.insert(id) {
                    self.bring(&name, id, &mut course, &mut frames)?;
                }
            }
        }
        if BLOCKS_MAX < self.tree.blocks() {
            return Err(Error::Limit {
                what: "blocks of a folder that travels",
                max: BLOCKS_MAX,
            });
        }
        let digest = self.tree.digest();
        frames.put(&Op::End { digest })?;
        frames.flush()?;
        course.report.bytes = frames.bytes;
        course.report.digest = digest;
        Ok(course.report)
    }

    /// Says which node each name is of: that of its inode, or if that is new the one that the name
    /// had, which a program may have replaced by a copy.
    fn identify(&mut self, found: &BTreeMap<Name, Found>) -> BTreeMap<Name, NodeId> {
        let present: HashSet<(Key, u8)> = found.values().map(Found::identity).collect();
        self.shown.clear();
        self.ids.retain(|key, _| present.contains(key));
        let mut claimed: HashSet<NodeId> = self.ids.values().copied().collect();
        let mut ids = BTreeMap::new();
        // Folders that come, or come as something else: the target has nothing in them.
        let mut anew = BTreeSet::new();
        for (name, found) in found {
            let key = found.identity();
            let is_anew = anew.contains(&name.split().0);
            let by_name = self.tree.names.get(name).copied();
            let by_name = by_name.filter(|id| self.is(*id, found) && !is_anew);
            let known = match found.kind {
                // Whose it was does not matter: it has nothing but metadata, if that.
                Kind::Folder | Kind::Whiteout | Kind::Opaque => by_name,
                _ => self.ids.get(&key).copied().filter(|id| self.is(*id, found)),
            };
            let id = known.unwrap_or_else(|| {
                let id = match by_name.filter(|id| !claimed.contains(id)) {
                    Some(id) => id,
                    None => {
                        self.next += 1;
                        NodeId(self.next - 1)
                    }
                };
                self.seen.remove(&id);
                id
            });
            if found.kind.is_folder() && known.is_none() {
                anew.insert(name.clone());
            }
            if !found.kind.is_by_name() {
                claimed.insert(id);
                self.ids.insert(key, id);
            }
            if let Some(shown) = found.shown.filter(|_| found.kind == Kind::File) {
                self.shown.insert(shown, id);
            }
            ids.insert(name.clone(), id);
        }
        ids
    }

    /// Whether a node can be what was found: not if the inode was given to something else.
    fn is(&self, id: NodeId, found: &Found) -> bool {
        let kind = match self.tree.nodes.get(&id) {
            Some(node) => &node.kind,
            // One that has been given this id a moment ago.
            None => return !found.kind.is_by_name(),
        };
        *kind == found.kind
    }

    fn remove(&mut self, course: &mut Course<'_>, frames: &mut Frames<'_>) -> Result<(), Error> {
        let stays: HashSet<NodeId> = course.ids.values().copied().collect();
        for (name, id) in self.gone(course).into_iter().rev() {
            let keep = stays.contains(&id);
            if !name.is_root() {
                frames.put(&Op::Remove {
                    name: name.clone(),
                    keep,
                })?;
                course.touched.insert(name.split().0);
            }
            if self.tree.names.remove(&name).is_some() && self.is_whiteout(id) {
                self.lifted.insert(name);
            }
        }
        self.tree.nodes.retain(|id, _| stays.contains(id));
        self.seen.retain(|id, _| stays.contains(id));
        Ok(())
    }

    /// What goes, the highest first: names of something else now, and all that is in a folder that
    /// is.
    fn gone(&self, course: &Course<'_>) -> Vec<(Name, NodeId)> {
        let (mut gone, mut folders) = (Vec::new(), HashSet::new());
        for (name, id) in &self.tree.names {
            let is_within = !name.is_root() && folders.contains(&name.split().0);
            if !is_within && course.ids.get(name) == Some(id) {
                continue;
            }
            if self
                .tree
                .nodes
                .get(id)
                .is_some_and(|node| node.kind.is_folder())
            {
                folders.insert(name.clone());
            }
            gone.push((name.clone(), *id));
        }
        gone
    }

    fn is_whiteout(&self, id: NodeId) -> bool {
        let node = self.tree.nodes.get(&id);
        node.is_some_and(|node| node.kind == Kind::Whiteout)
    }

    /// Of a layer to which nobody writes any more: whether it alone says what its overlay shows.
    fn check_layer(&self, found: &BTreeMap<Name, Found>) -> Result<(), Error> {
        let Some(overlay) = &self.overlay else {
            return Ok(());
        };
        // An index of hard links has another name of what it shows elsewhere, too.
        self.check_names_of(found)?;
        // The target has removed what they hid.
        let lifted = self.lifted.iter().filter(|name| !found.contains_key(*name));
        for name in lifted {
            let (parent, component) = name.split();
            let shown = overlay.folder_at(&parent);
            if shown.is_ok_and(|parent| kernel::stat(parent, component).is_ok()) {
                return Err(Error::unfit(
                    overlay.path_of(name),
                    "is shown again, which its overlay had hidden: somebody has changed its layers",
                ));
            }
        }
        Ok(())
    }

    fn add(&mut self, course: &mut Course<'_>, frames: &mut Frames<'_>) -> Result<(), Error> {
        for (name, id) in &course.ids {
            if self.tree.names.contains_key(name) {
                continue;
            }
            let (name, id) = (name.clone(), *id);
            let op = match self.tree.nodes.entry(id) {
                Entry::Occupied(_) => Op::Name {
                    name: name.clone(),
                    id,
                },
                Entry::Vacant(vacant) => {
                    let kind = course.found[&name].kind.clone();
                    vacant.insert(Node::new(kind.clone()));
                    Op::New {
                        name: name.clone(),
                        id,
                        kind,
                    }
                }
            };
            frames.put(&op)?;
            course.touched.insert(name.split().0);
            self.tree.names.insert(name, id);
        }
        Ok(())
    }

    /// Brings contents and metadata of a node in line.
    fn bring(
        &mut self,
        name: &Name,
        id: NodeId,
        course: &mut Course<'_>,
        frames: &mut Frames<'_>,
    ) -> Result<(), Error> {
        let Some(found) = course.found.get(name) else {
            return Ok(());
        };
        if found.kind == Kind::Whiteout {
            return Ok(());
        }
        let (stamp, is_file) = (found.stamp(), found.kind == Kind::File);
        let is_touched = found.kind.is_folder() && course.touched.contains(name);
        let may_be_stored_to = || found.shown.is_none_or(|shown| course.suspects.has(&shown));
        let is_suspect = is_file && (!self.tells || may_be_stored_to());
        let is_known = self.seen.get(&id) == Some(&stamp);
        if is_known && !is_suspect && !is_touched {
            return Ok(());
        }
        let (key, stat) = (found.key, found.stat);
        let mut is_whole = true;
        let mut is_written = false;
        if is_file {
            match self.contents(name, id, key, course, frames) {
                Ok(written) => is_written = written,
                Err(Error::Io { source, .. }) if !course.frozen && is_passing(&source) => {
                    is_whole = false;
                }
                Err(error) => return Err(error),
            }
        }
        let path = self.folder.path_of(name);
        let described = self.folder.parent(name).map_err(io::Error::from);
        let described = described.and_then(|(parent, component)| {
            // The walk's, so that what came later is seen by the next.
            kernel::meta(parent, &component, &stat, self.overlay.is_some())
        });
        let meta = match described {
            Ok(meta) => meta,
            Err(error) if !course.frozen && is_passing(&error) => {
                self.seen.remove(&id);
                return Ok(());
            }
            Err(source) if source.raw_os_error().is_none() => {
                return Err(Error::unfit(path, format!("cannot travel: {source}")));
            }
            Err(source) => {
                let what = "read the attributes of";
                return Err(Error::Io { what, path, source });
            }
        };
        let known: Option<&Meta> = self.tree.nodes.get(&id).map(|node| &node.meta);
        if is_written || is_touched || known != Some(&meta) {
            frames.put(&Op::Meta {
                id,
                meta: meta.clone(),
            })?;
            if let Some(node) = self.tree.nodes.get_mut(&id) {
                node.meta = meta;
            }
        }
        if is_whole && !is_suspect && stamp.changed < course.suspects.since {
            self.seen.insert(id, stamp);
        } else {
            self.seen.remove(&id);
        }
        Ok(())
    }

    /// Opens a file that was found to be this inode; with it comes its length.
    fn open_file(&self, name: &Name, key: Key) -> rustix::io::Result<(File, u64)> {
        // Without waiting for whoever holds a lease on it.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let file = match self.folder.open_at(name, flags | OFlags::NOATIME) {
            Err(Errno::PERM) => self.folder.open_at(name, flags)?,
            opened => opened?,
        };
        let stat = kernel::stat_of(&file)?;
        if Key::of(&stat) != key {
            return Err(Errno::NOENT);
        }
        Ok((File::from(file), stat.stx_size))
    }

    /// Sends blocks of a file that are not what the target has. Answers whether there were any.
    fn contents(
        &mut self,
        name: &Name,
        id: NodeId,
        key: Key,
        course: &mut Course<'_>,
        frames: &mut Frames<'_>,
    ) -> Result<bool, Error> {
        let path = self.folder.path_of(name);
        let failed = |errno: Errno| Error::io("read", path.clone())(errno);
        let (file, size) = self.open_file(name, key).map_err(failed)?;
        course.report.compared += 1;
        let node = self
            .tree
            .nodes
            .get_mut(&id)
            .ok_or(Error::Malformed("a node is not there"))?;
        let mut written = false;
        if node.size != size {
            node.resize(size);
            frames.put(&Op::Size { id, size })?;
            written = true;
        }
        let mut known = node.blocks.keys().copied().collect::<BTreeSet<u64>>();
        let mut at = 0;
        while let Some(block) = next_block(&file, at, size).map_err(failed)? {
            at = block + 1;
            let buffer = &mut course.buffer[..block::length(size, block)];
            let read = read_block(&file, buffer, block);
            read.map_err(|source| Error::Io {
                what: "read",
                path: path.clone(),
                source,
            })?;
            course.report.read += buffer.len() as u64;
            known.remove(&block);
            let hash = block::hash(buffer);
            if node.blocks.get(&block) == hash.as_ref() {
                continue;
            }
            written = true;
            let Some(hash) = hash else {
                node.blocks.remove(&block);
                frames.put(&Op::Hole { id, block })?;
                continue;
            };
            node.blocks.insert(block, hash);
            put_block(id, block, buffer, frames)?;
        }
        // What was data and is a hole now.
        for block in known {
            node.blocks.remove(&block);
            frames.put(&Op::Hole { id, block })?;
            written = true;
        }
        Ok(written)
    }
}

fn put_block(id: NodeId, block: u64, content: &[u8], frames: &mut Frames<'_>) -> Result<(), Error> {
    let pieces = block::pieces(content);
    let mut bytes = Vec::with_capacity(content.len());
    for run in block::runs(pieces, true, content.len()) {
        bytes.extend_from_slice(&content[run]);
    }
    frames.put(&Op::Data {
        id,
        block,
        pieces,
        bytes: &bytes,
    })
}

/// Whether the entry has gone, or another has come in its place, since it was found.
fn is_passing(error: &io::Error) -> bool {
    let passing = [
        Errno::NOENT,
        Errno::NOTDIR,
        Errno::LOOP,
        Errno::STALE,
        Errno::NODATA,
    ];
    let code = error.raw_os_error();
    code.is_some_and(|code| passing.contains(&Errno::from_raw_os_error(code)))
}
