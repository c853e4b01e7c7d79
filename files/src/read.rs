//! Blocks of files, as they are read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::block::BLOCK_BYTES;

/// The next block from this one on that may hold something.
pub(crate) fn next_block(file: &File, at: u64, size: u64) -> rustix::io::Result<Option<u64>> {
    let from = at.saturating_mul(BLOCK_BYTES as u64);
    if size <= from {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(offset) if offset < size => Ok(Some(offset / BLOCK_BYTES as u64)),
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        // It has no holes, or does not tell.
        Err(Errno::INVAL) => Ok(Some(at)),
        Err(error) => Err(error),
    }
}

/// Reads a block; what a shrinking file lacks is zero.
pub(crate) fn read_block(file: &File, buffer: &mut [u8], block: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let offset = block * BLOCK_BYTES as u64 + done as u64;
        match file.read_at(&mut buffer[done..], offset) {
            Ok(0) => {
                buffer[done..].fill(0);
                break;
            }
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
