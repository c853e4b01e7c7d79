//! What a difference is made of, and its bytes.
//!
//! A difference is a sequence of frames, each of whole operations; the order of all of them is that
//! of the source:
//!
//! ```text
//! removals, deepest first ─► folders and names, highest first ─► sizes, bytes, metadata of each
//! node that is no folder ─► metadata of folders ─► the end, with the digest of what is there now
//! ```
//!
//! ```text
//! frame      length u32 | crc32 u32 of what follows | operations
//! operation  tag u8 | fields; numbers little endian, bytes behind their length u32
//! ```

use std::collections::BTreeMap;

use crate::block::{self, BLOCK_BYTES};
use crate::error::Error;
use crate::name::Name;
use crate::tree::{DIGEST_BYTES, Digest, Kind, Meta, Moment, NodeId, put_bytes};
use crate::{COMPONENT_BYTES_MAX, FILE_BYTES_MAX, FRAME_BYTES_MAX, NAME_BYTES_MAX};
use crate::{DEPTH_MAX, XATTR_BYTES_MAX};

/// Length of what precedes the operations of a frame, in bytes.
pub const FRAME_HEADER_BYTES: usize = 8;

/// One step from what the target has to what the source has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// A name goes. What it is a name of is kept beside the folder if it is to have another.
    Remove { name: Name, keep: bool },
    /// A name comes, of a node that is new.
    New { name: Name, id: NodeId, kind: Kind },
    /// A name comes, of a node that is there.
    Name { name: Name, id: NodeId },
    /// A file is this long; what is new of it is a hole.
    Size { id: NodeId, size: u64 },
    /// Bytes of a block: of the pieces whose bit is set. The others are holes.
    Data {
        id: NodeId,
        block: u64,
        pieces: u32,
        bytes: &'a [u8],
    },
    /// A block is a hole.
    Hole { id: NodeId, block: u64 },
    /// What is said of a node.
    Meta { id: NodeId, meta: Meta },
    /// That is all; the folder is this now.
    End { digest: Digest },
}

impl Op<'_> {
    pub fn put_into(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Remove { name, keep } => {
                bytes.push(1);
                put_bytes(bytes, name.as_bytes());
                bytes.push((*keep).into());
            }
            Self::New { name, id, kind } => {
                bytes.push(2);
                put_bytes(bytes, name.as_bytes());
                bytes.extend(id.0.to_le_bytes());
                kind.put_into(bytes);
            }
            Self::Name { name, id } => {
                bytes.push(3);
                put_bytes(bytes, name.as_bytes());
                bytes.extend(id.0.to_le_bytes());
            }
            Self::Size { id, size } => {
                bytes.push(4);
                bytes.extend(id.0.to_le_bytes());
                bytes.extend(size.to_le_bytes());
            }
            Self::Data {
                id,
                block,
                pieces,
                bytes: content,
            } => {
                bytes.push(5);
                bytes.extend(id.0.to_le_bytes());
                bytes.extend(block.to_le_bytes());
                bytes.extend(pieces.to_le_bytes());
                put_bytes(bytes, content);
            }
            Self::Hole { id, block } => {
                bytes.push(6);
                bytes.extend(id.0.to_le_bytes());
                bytes.extend(block.to_le_bytes());
            }
            Self::Meta { id, meta } => {
                bytes.push(7);
                bytes.extend(id.0.to_le_bytes());
                meta.put_into(bytes);
            }
            Self::End { digest } => {
                bytes.push(8);
                bytes.extend(digest);
            }
        }
    }
}

/// Operations on their way into frames.
pub struct Frames<'a> {
    frame: Vec<u8>,
    /// Takes whole frames, header included; an error ends the difference.
    sink: &'a mut dyn FnMut(Vec<u8>) -> Result<(), Error>,
    /// Bytes of all frames.
    pub bytes: u64,
}

impl<'a> Frames<'a> {
    pub fn new(sink: &'a mut dyn FnMut(Vec<u8>) -> Result<(), Error>) -> Self {
        Self {
            frame: vec![0; FRAME_HEADER_BYTES],
            sink,
            bytes: 0,
        }
    }

    pub fn put(&mut self, op: &Op<'_>) -> Result<(), Error> {
        let before = self.frame.len();
        op.put_into(&mut self.frame);
        if FRAME_HEADER_BYTES + FRAME_BYTES_MAX < self.frame.len() {
            let last = self.frame.split_off(before);
            self.flush()?;
            self.frame.extend(last);
        }
        Ok(())
    }

    pub fn flush(&mut self) -> Result<(), Error> {
        if self.frame.len() == FRAME_HEADER_BYTES {
            return Ok(());
        }
        let mut frame = std::mem::replace(&mut self.frame, vec![0; FRAME_HEADER_BYTES]);
        let (header, body) = frame.split_at_mut(FRAME_HEADER_BYTES);
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        header[..4].copy_from_slice(&length.to_le_bytes());
        header[4..].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        self.bytes += frame.len() as u64;
        (self.sink)(frame)
    }
}

/// How many bytes follow the header of a frame, and the checksum that they have.
pub fn frame(header: [u8; FRAME_HEADER_BYTES]) -> Result<(usize, u32), Error> {
    let [a, b, c, d, checksum @ ..] = header;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length == 0 || FRAME_BYTES_MAX < length {
        return Err(Error::Malformed("a frame has no length that one has"));
    }
    Ok((length, u32::from_le_bytes(checksum)))
}

/// Takes values off the front of bytes.
#[derive(Debug)]
pub struct Taker<'a>(pub &'a [u8]);

impl<'a> Taker<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ENDS)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub fn byte(&mut self) -> Result<u8, Error> {
        self.array().map(|[byte]| byte)
    }

    pub fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], Error> {
        let length = self.u32()? as usize;
        if max < length {
            return Err(Error::Malformed("something is longer than it may be"));
        }
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ENDS)?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn name(&mut self) -> Result<Name, Error> {
        Name::new(self.bytes(NAME_BYTES_MAX)?)
    }

    pub fn id(&mut self) -> Result<NodeId, Error> {
        self.u64().map(NodeId)
    }

    pub fn size(&mut self) -> Result<u64, Error> {
        let size = self.u64()?;
        match size <= FILE_BYTES_MAX {
            true => Ok(size),
            false => Err(Error::Malformed("a file is too long")),
        }
    }

    pub fn kind(&mut self) -> Result<Kind, Error> {
        Ok(match self.byte()? {
            1 => Kind::Folder,
            2 => Kind::File,
            3 => {
                let target = self.bytes(NAME_BYTES_MAX)?;
                if target.is_empty() || target.contains(&0) {
                    return Err(Error::Malformed("a symbolic link says nothing"));
                }
                Kind::Symlink(target.into())
            }
            4 => Kind::Fifo,
            5 => Kind::Socket,
            6 => Kind::Character {
                major: self.u32()?,
                minor: self.u32()?,
            },
            7 => Kind::Block {
                major: self.u32()?,
                minor: self.u32()?,
            },
            8 => Kind::Whiteout,
            9 => Kind::Opaque,
            _ => return Err(Error::Malformed("a node is of no kind")),
        })
    }

    pub fn meta(&mut self) -> Result<Meta, Error> {
        let (mode, uid, gid) = (self.u32()?, self.u32()?, self.u32()?);
        let modified = Moment {
            seconds: self.array().map(i64::from_le_bytes)?,
            nanos: self.u32()?,
        };
        if 0o7777 < mode || 999_999_999 < modified.nanos || uid == u32::MAX || gid == u32::MAX {
            return Err(Error::Malformed("metadata that no entry has"));
        }
        let mut xattrs = BTreeMap::new();
        let mut bytes = 0;
        for _ in 0..self.u32()? {
            let name = self.bytes(COMPONENT_BYTES_MAX)?;
            let value = self.bytes(XATTR_BYTES_MAX)?;
            bytes += name.len() + value.len();
            if name.is_empty() || name.contains(&0) || XATTR_BYTES_MAX < bytes {
                return Err(Error::Malformed("extended attributes that no entry has"));
            }
            xattrs.insert(name.into(), value.into());
        }
        Ok(Meta {
            mode,
            uid,
            gid,
            modified,
            xattrs,
        })
    }

    pub fn op(&mut self) -> Result<Op<'a>, Error> {
        Ok(match self.byte()? {
            1 => Op::Remove {
                name: self.name()?,
                keep: self.byte()? != 0,
            },
            2 => Op::New {
                name: self.name()?,
                id: self.id()?,
                kind: self.kind()?,
            },
            3 => Op::Name {
                name: self.name()?,
                id: self.id()?,
            },
            4 => Op::Size {
                id: self.id()?,
                size: self.size()?,
            },
            5 => Op::Data {
                id: self.id()?,
                block: self.u64()?,
                pieces: self.u32()?,
                bytes: self.bytes(BLOCK_BYTES)?,
            },
            6 => Op::Hole {
                id: self.id()?,
                block: self.u64()?,
            },
            7 => Op::Meta {
                id: self.id()?,
                meta: self.meta()?,
            },
            8 => Op::End {
                digest: self.array::<DIGEST_BYTES>()?,
            },
            _ => return Err(Error::Malformed("an operation is not known")),
        })
    }
}

const ENDS: Error = Error::Malformed("it ends early");

// What the longest operation needs is less than a frame has.
const _: () = assert!(BLOCK_BYTES + 64 < FRAME_BYTES_MAX);
const _: () = assert!(2 * XATTR_BYTES_MAX + 64 * XATTR_BYTES_MAX / 16 < FRAME_BYTES_MAX);
const _: () = assert!(DEPTH_MAX < NAME_BYTES_MAX && block::PIECE_BYTES < BLOCK_BYTES);
