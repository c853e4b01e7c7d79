//! Netlink sockets with messages that nobody has read: CRIU does not carry them.

use std::collections::HashSet;
use std::io;

use super::diag::{BY_FAMILY, Diag, attribute, number};
use super::{Passing, State, descriptors, name_of};

pub(super) fn look(diag: &mut Diag, pids: &[i32]) -> io::Result<Vec<Passing>> {
    let mut unread = HashSet::new();
    diag.dump(BY_FAMILY, &request(), |record| {
        unread.extend(parse(record));
    })?;
    // The answer itself is one.
    unread.retain(|inode| u64::from(*inode) != diag.inode);
    let found = descriptors::owners(pids, &unread).into_values();
    let found = found.map(|owner| Passing {
        state: State::Unread,
        holder: format!("{} at its descriptor {}", name_of(owner.pid), owner.number),
    });
    Ok(found.collect())
}

/// `struct netlink_diag_req`.
fn request() -> [u8; 20] {
    let mut request = [0; 20];
    request[0] = u8::try_from(libc::AF_NETLINK).unwrap_or_default();
    request[1] = ALL_PROTOCOLS;
    request[8..12].copy_from_slice(&SHOW.to_ne_bytes());
    request
}

/// The inode of a `struct netlink_diag_msg` whose socket holds messages.
fn parse(record: &[u8]) -> Option<u32> {
    let inode = number(record, 16)?;
    let memory = attribute(record, RECORD_BYTES, MEMORY)?;
    // `SK_MEMINFO_RMEM_ALLOC` is the first.
    (inode != 0 && 0 < number(memory, 0)?).then_some(inode)
}

const RECORD_BYTES: usize = 28;
/// `NDIAG_PROTO_ALL`.
const ALL_PROTOCOLS: u8 = 0xff;
/// `NETLINK_DIAG_MEMINFO`.
const MEMORY: u16 = 0;
/// `NDIAG_SHOW_MEMINFO`.
const SHOW: u32 = 0x1;
