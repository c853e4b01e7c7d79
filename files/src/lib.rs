//! Folders that travel: what is in one, what of it the other node lacks, and the proof that it has
//! all of it.
//!
//! ```text
//!  SOURCE                                              TARGET
//!  walk ─► Source::difference ─► frames of ops ══════► Staging::apply ─► Keep::put
//!          against the tree that                       into a folder of its own, or one that
//!          the target has                              is there; what it has written it reads
//!                                                      back
//!          └─► digest of the tree ───────────────────► must be that of its own tree
//! ```
//!
//! Both sides keep a [`Tree`]: each name, each node with its metadata, and a hash of every block
//! that holds something. The source's says what the target has; a difference is what is not in it.
//!
//! Invariants:
//!
//! - **A time stamp alone proves nothing.** A file is passed over if size, times and inode are what
//!   they were, *and* its last change is older than the look before by more than a clock's tick,
//!   *and* nobody could store to it through a mapping at that look ([`Suspects`]). Else its blocks
//!   are compared. Where a file system does not mark stores through a mapping at all, every file is
//!   compared, every time.
//! - **Nothing outside the folder is reached.** No symbolic link is followed and no mount entered,
//!   at either side, whatever the other says: the kernel resolves each path beneath an open folder.
//! - **Of an overlay its upper layer travels**, and another overlay over the same layers shows the
//!   same then: it is changed through what it shows. What hides something below is absence there;
//!   what only the overlay that made it understands never travels, or is refused.
//! - **A difference that has begun is sent to its end**, or the migration ends: the source takes
//!   what it has encoded for what the target has.
//! - **What is proven has been read.** The target's tree has the metadata and the bytes that its
//!   file system gave back after they were written, and it is on disk before it is acknowledged.
//!
//! Absent: files that are no part of a folder, access and birth times, flags of inodes (immutable,
//! append-only), compression on the wire, and the network.

#![forbid(unsafe_code)]

mod block;
mod error;
mod keep;
mod kernel;
mod make;
mod name;
mod op;
mod read;
mod record;
mod shown;
mod source;
mod staging;
mod tree;
mod walk;
mod within;
mod xattr;

pub use error::{Error, ErrorKind};
pub use keep::{
    CACHED_MAX, HIDDEN, Identity, Keep, Placed, admit, admit_in, check_hidden, identity_of,
    may_come, may_leave, remove_all,
};
pub use name::Name;
pub use record::Record;
pub use shown::Shown;
pub use source::{Report, Source, Suspects};
pub use staging::Staging;
pub use tree::{DIGEST_BYTES, Digest, Tree};
pub use walk::{Key, Totals};

/// Most entries of one folder, at any depth.
pub const ENTRIES_MAX: usize = 4 << 20;

/// Longest name within the folder, in bytes: what the kernel resolves at once.
pub const NAME_BYTES_MAX: usize = 4095;

/// Longest component of one, in bytes.
pub const COMPONENT_BYTES_MAX: usize = 255;

/// Most folders within each other.
pub const DEPTH_MAX: usize = 256;

/// Most bytes of all extended attributes of one entry, names included.
pub const XATTR_BYTES_MAX: usize = 64 << 10; // 64 KiB

/// Longest file, in bytes (1 PiB), holes included.
pub const FILE_BYTES_MAX: u64 = 1 << 50;

/// Most blocks that hold something, of all files together: 1 TiB, and 1 GiB of hashes in memory.
pub const BLOCKS_MAX: u64 = 1 << 25;

/// Longest frame, in bytes, without its header: no operation is longer.
pub const FRAME_BYTES_MAX: usize = 512 << 10; // 512 KiB
