//! What the other node has of a folder, written down: who sends the folder there again sends what
//! is different, if the other still has it.
//!
//! Nodes are numbered by the order of their names, and so are those of whoever reads the folder
//! anew: both mean the same by a number without telling each other.

use std::collections::{BTreeMap, HashMap};

use crate::block;
use crate::error::Error;
use crate::op::Taker;
use crate::tree::{Digest, Kind, Node, NodeId, Tree, put_bytes};
use crate::walk::Key;
use crate::{BLOCKS_MAX, ENTRIES_MAX};

/// The first bytes of a record: its format.
const FORMAT: &[u8; 8] = b"pffile01";

/// Length of the checksum at the end, in bytes.
const CHECKSUM_BYTES: usize = 32;

/// A tree, and the inodes that its nodes are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    tree: Tree,
    ids: HashMap<(Key, u8), NodeId>,
}

impl Record {
    pub(crate) fn new(tree: Tree, ids: HashMap<(Key, u8), NodeId>) -> Self {
        let (tree, numbers) = tree.renumbered();
        let ids = ids.into_iter();
        let ids = ids
            .filter_map(|(key, id)| Some((key, *numbers.get(&id)?)))
            .collect();
        Self { tree, ids }
    }

    pub(crate) fn into_parts(self) -> (Tree, HashMap<(Key, u8), NodeId>) {
        (self.tree, self.ids)
    }

    /// What the folder is at the other node, if it still has it.
    pub fn digest(&self) -> Digest {
        self.tree.digest()
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = FORMAT.to_vec();
        bytes.extend((self.tree.names.len() as u64).to_le_bytes());
        for (name, id) in &self.tree.names {
            put_bytes(&mut bytes, name.as_bytes());
            bytes.extend(id.0.to_le_bytes());
        }
        bytes.extend((self.tree.nodes.len() as u64).to_le_bytes());
        let nodes: BTreeMap<&NodeId, &Node> = self.tree.nodes.iter().collect();
        for (id, node) in nodes {
            bytes.extend(id.0.to_le_bytes());
            node.put_into(&mut bytes);
        }
        bytes.extend((self.ids.len() as u64).to_le_bytes());
        let ids: BTreeMap<NodeId, &(Key, u8)> =
            self.ids.iter().map(|(key, id)| (*id, key)).collect();
        for (id, (key, kind)) in ids {
            bytes.extend(id.0.to_le_bytes());
            bytes.extend(key.device.0.to_le_bytes());
            bytes.extend(key.device.1.to_le_bytes());
            bytes.extend(key.inode.to_le_bytes());
            bytes.push(*kind);
        }
        let checksum = blake3::hash(&bytes);
        bytes.extend(checksum.as_bytes());
        bytes
    }

    /// The record that these bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let damaged = Error::Malformed("a record is damaged");
        let Some((body, checksum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
            return Err(damaged);
        };
        if blake3::hash(body).as_bytes() != checksum {
            return Err(damaged);
        }
        let mut rest = Taker(body);
        if rest.array()? != *FORMAT {
            return Err(Error::Malformed("a record is of another version"));
        }
        let mut tree = Tree::default();
        for _ in 0..limited(rest.u64()?, ENTRIES_MAX as u64)? {
            let name = rest.name()?;
            tree.names.insert(name, rest.id()?);
        }
        let mut blocks = 0;
        for _ in 0..limited(rest.u64()?, ENTRIES_MAX as u64)? {
            let id = rest.id()?;
            tree.nodes.insert(id, node(&mut rest, &mut blocks)?);
        }
        let mut ids = HashMap::new();
        for _ in 0..limited(rest.u64()?, ENTRIES_MAX as u64)? {
            let id = rest.id()?;
            let device = (rest.u32()?, rest.u32()?);
            let inode = rest.u64()?;
            let key = Key { device, inode };
            ids.insert((key, rest.byte()?), id);
        }
        if tree.names.values().any(|id| !tree.nodes.contains_key(id)) {
            return Err(damaged);
        }
        Ok(Self { tree, ids })
    }
}

fn node(rest: &mut Taker<'_>, blocks: &mut u64) -> Result<Node, Error> {
    let mut node = Node::new(rest.kind()?);
    node.meta = rest.meta()?;
    node.size = rest.size()?;
    let count = rest.u64()?;
    *blocks = limited(blocks.saturating_add(count), BLOCKS_MAX)?;
    for _ in 0..count {
        let block = rest.u64()?;
        if node.kind != Kind::File || block::count(node.size) <= block {
            return Err(Error::Malformed("a block is behind the end of its file"));
        }
        node.blocks.insert(block, rest.array()?);
    }
    Ok(node)
}

fn limited(count: u64, max: u64) -> Result<u64, Error> {
    match count <= max {
        true => Ok(count),
        false => Err(Error::Malformed("a record has more than a folder may")),
    }
}
