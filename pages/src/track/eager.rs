//! What CRIU copies by itself in the freeze, and how much that is.
//!
//! Everything that is not lazy: own copies of a file's pages, executable and locked memory, memory
//! that could not be tracked, and shared memory without a lasting file. Shared memory belongs to an
//! object, not to a process: workers of one server map the same one, and CRIU dumps it once.

use std::fs;
use std::os::linux::fs::MetadataExt;

use pageferry_sys::pagemap::Pagemap;

use super::maps::{self, Flags, Mapping};
use super::walk::{Found, Look, Walker};

/// Memory that CRIU dumps with its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Eager {
    /// Bytes in private mappings.
    pub private_bytes: u64,
    /// Shared memory, each object once.
    pub shared: Vec<SharedMemory>,
}

/// One object of shared memory: anonymous, of System V, or a memfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Device and inode: its identity on this node.
    pub identity: (u64, u64),
    /// What it is called in `maps`.
    pub name: String,
    /// Bytes in use.
    pub bytes: u64,
}

impl Eager {
    /// All of it, in bytes.
    pub fn bytes(&self) -> u64 {
        self.private_bytes + self.shared.iter().map(|object| object.bytes).sum::<u64>()
    }

    /// Adds what another process of the workload has; what both share counts once.
    pub fn merge(&mut self, other: Self) {
        self.private_bytes += other.private_bytes;
        for object in other.shared {
            self.share(object);
        }
    }

    /// Adds a segment of System V that no process maps, by its id: CRIU copies all of a namespace
    /// of the workload's own.
    pub fn add_segment(&mut self, id: i32, bytes: u64) {
        self.shared.push(SharedMemory {
            identity: (NO_DEVICE, u64::from(id.cast_unsigned())),
            name: format!("segment {id}"),
            bytes,
        });
    }

    fn share(&mut self, object: SharedMemory) {
        if self
            .shared
            .iter()
            .all(|known| known.identity != object.identity)
        {
            self.shared.push(object);
        }
    }

    /// Adds one mapping of process `pid` that is not lazy. What cannot be counted is counted whole.
    pub(super) fn add(
        &mut self,
        pid: i32,
        mapping: &Mapping,
        flags: Flags,
        pagemap: &Pagemap,
        walker: &mut Walker,
    ) {
        if mapping.is_shared_memory() {
            self.share(shared_memory(pid, mapping));
            return;
        }
        // CRIU knows the kernel's own mappings, and leaves out what the kernel may drop.
        if !mapping.private || mapping.is_kernel_made() || flags.any(Flags::DROPPABLE) {
            return;
        }
        let look = if mapping.is_private_file() {
            Look::Copies
        } else {
            Look::Any
        };
        let mut found = Found::default();
        self.private_bytes += match walker.walk(pagemap, mapping.range.clone(), look, &mut found) {
            Ok(()) => found.live_pages().bytes(),
            Err(_) => mapping.range.end - mapping.range.start,
        };
    }
}

/// Shared memory of these processes, each object once, in bytes. One that has ended has none.
pub fn shared_bytes(pids: &[i32]) -> u64 {
    let mut all = Eager::default();
    for pid in pids {
        let mappings = maps::read(*pid).unwrap_or_default();
        let shared = mappings.iter().filter(|found| found.is_shared_memory());
        shared.for_each(|mapping| all.share(shared_memory(*pid, mapping)));
    }
    all.bytes()
}

fn shared_memory(pid: i32, mapping: &Mapping) -> SharedMemory {
    let (start, end) = (mapping.range.start, mapping.range.end);
    let (major, minor) = mapping.device;
    let device = (u64::from(major) << 32) | u64::from(minor);
    let metadata = fs::metadata(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
    SharedMemory {
        identity: (device, mapping.inode),
        name: mapping.name.clone(),
        bytes: match metadata {
            Ok(metadata) => metadata.st_blocks() * BLOCK_BYTES,
            Err(_) => end - start,
        },
    }
}

/// The device of what nobody maps.
const NO_DEVICE: u64 = u64::MAX;

/// Unit of `st_blocks`, in bytes.
const BLOCK_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_that_nobody_maps_count_beside_what_has_their_number() {
        let mut eager = Eager::default();
        eager.merge(Eager {
            private_bytes: 1,
            shared: vec![SharedMemory {
                identity: (1, 7),
                name: "/dev/zero (deleted)".to_owned(),
                bytes: 4096,
            }],
        });
        eager.add_segment(7, 8192);
        eager.add_segment(8, 4096);
        assert_eq!(eager.bytes(), 1 + 4096 + 8192 + 4096);
    }
}
