//! What is known of a folder: its names, and what each is a name of.
//!
//! Invariants: each name is that of a node; a folder has one name; a block that is all zero is not
//! there, so that how a file is laid out makes no difference.

use std::collections::{BTreeMap, HashMap};

use crate::block::Hash;
use crate::name::Name;

/// Length of a [`Digest`], in bytes.
pub const DIGEST_BYTES: usize = 32;

/// What a whole folder is: equal for equal names, hard links, metadata and contents.
pub type Digest = [u8; DIGEST_BYTES];

/// Something that has names: hard links are several of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u64);

/// A moment, as inodes have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// What kind of thing a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File,
    Symlink(Box<[u8]>),
    Fifo,
    Socket,
    Character {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    /// Of a layer: nothing is there, whatever the layers below it have.
    Whiteout,
    /// Of a layer: a folder that shows nothing of what the layers below it have there.
    Opaque,
}

/// Extended attributes by name.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// What is said of a node besides its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions, with set-id and sticky bits. None of a symbolic link, which has no own.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) modified: Moment,
    pub(crate) xattrs: Xattrs,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
    /// Of a file; else 0.
    pub(crate) size: u64,
    /// Of a file: blocks that are not all zero, by their number.
    pub(crate) blocks: BTreeMap<u64, Hash>,
}

/// A folder, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    pub(crate) names: BTreeMap<Name, NodeId>,
    pub(crate) nodes: HashMap<NodeId, Node>,
}

impl Kind {
    /// Tells kinds apart, without what else is said of them.
    pub(crate) const fn tag(&self) -> u8 {
        match self {
            Self::Folder => 1,
            Self::File => 2,
            Self::Symlink(_) => 3,
            Self::Fifo => 4,
            Self::Socket => 5,
            Self::Character { .. } => 6,
            Self::Block { .. } => 7,
            Self::Whiteout => 8,
            Self::Opaque => 9,
        }
    }

    /// Whether it has one name, by which it is known: another inode there is the same.
    pub(crate) const fn is_by_name(&self) -> bool {
        self.is_folder() || matches!(self, Self::Whiteout)
    }

    /// Whether something may be in it.
    pub(crate) const fn is_folder(&self) -> bool {
        matches!(self, Self::Folder | Self::Opaque)
    }
}

impl Node {
    /// A new one: empty.
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            meta: Meta::default(),
            size: 0,
            blocks: BTreeMap::new(),
        }
    }

    /// Gives a file another size; blocks behind it are no more.
    pub(crate) fn resize(&mut self, size: u64) {
        self.size = size;
        drop(self.blocks.split_off(&crate::block::count(size)));
    }
}

impl Tree {
    /// How many names there are, the folder's own included.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether nothing is known, not even the folder itself.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The blocks of all files that hold something.
    pub(crate) fn blocks(&self) -> u64 {
        let nodes = self.nodes.values();
        nodes.map(|node| node.blocks.len() as u64).sum()
    }

    /// The same tree with nodes numbered in the order of their first names, which depends on
    /// nothing but what is in the folder; and which number each had.
    pub(crate) fn renumbered(mut self) -> (Self, HashMap<NodeId, NodeId>) {
        let mut numbers = HashMap::with_capacity(self.nodes.len());
        let mut nodes = HashMap::with_capacity(self.nodes.len());
        for id in self.names.values_mut() {
            let next = NodeId(numbers.len() as u64);
            let number = *numbers.entry(*id).or_insert(next);
            if let Some(node) = self.nodes.remove(id) {
                nodes.insert(number, node);
            }
            *id = number;
        }
        self.nodes = nodes;
        (self, numbers)
    }

    /// What it is, in few bytes.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let mut numbers: HashMap<NodeId, u64> = HashMap::with_capacity(self.nodes.len());
        let mut bytes = Vec::new();
        for (name, id) in &self.names {
            bytes.clear();
            let next = numbers.len() as u64;
            let mut is_first = false;
            let number = *numbers.entry(*id).or_insert_with(|| {
                is_first = true;
                next
            });
            put_bytes(&mut bytes, name.as_bytes());
            bytes.extend(number.to_le_bytes());
            if let Some(node) = self.nodes.get(id).filter(|_| is_first) {
                node.put_into(&mut bytes);
            }
            hasher.update(&bytes);
        }
        *hasher.finalize().as_bytes()
    }
}

impl Node {
    /// All of it, for digest and record alike.
    pub(crate) fn put_into(&self, bytes: &mut Vec<u8>) {
        self.kind.put_into(bytes);
        self.meta.put_into(bytes);
        bytes.extend(self.size.to_le_bytes());
        bytes.extend((self.blocks.len() as u64).to_le_bytes());
        for (number, hash) in &self.blocks {
            bytes.extend(number.to_le_bytes());
            bytes.extend(hash);
        }
    }
}

impl Kind {
    pub(crate) fn put_into(&self, bytes: &mut Vec<u8>) {
        bytes.push(self.tag());
        match self {
            Self::Symlink(target) => put_bytes(bytes, target),
            Self::Character { major, minor } | Self::Block { major, minor } => {
                bytes.extend(major.to_le_bytes());
                bytes.extend(minor.to_le_bytes());
            }
            _ => {}
        }
    }
}

impl Meta {
    pub(crate) fn put_into(&self, bytes: &mut Vec<u8>) {
        for number in [self.mode, self.uid, self.gid] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.modified.seconds.to_le_bytes());
        bytes.extend(self.modified.nanos.to_le_bytes());
        // No entry has more bytes of them than fit.
        bytes.extend(
            u32::try_from(self.xattrs.len())
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        for (name, value) in &self.xattrs {
            put_bytes(bytes, name);
            put_bytes(bytes, value);
        }
    }
}

pub(crate) fn put_bytes(bytes: &mut Vec<u8>, what: &[u8]) {
    // Names, targets and attributes have at most 64 KiB.
    bytes.extend(u32::try_from(what.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(what);
}
