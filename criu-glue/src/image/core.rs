//! `core-PID.img`: what is known of one task.

use std::path::Path;

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// The fields of use to us, of the first thread of a process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Core {
    #[prost(message, optional, tag = "3")]
    pub process: Option<ProcessCore>,
}

/// What belongs to the whole process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct ProcessCore {
    /// Orphans below it become its children (`PR_SET_CHILD_SUBREAPER`).
    #[prost(bool, optional, tag = "18")]
    pub child_subreaper: Option<bool>,
}

/// Reads the image of process `vpid` in an images directory.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn read(images: &Path, vpid: u32) -> Result<Core, ImageError> {
    let path = images.join(format!("core-{vpid}.img"));
    parse(&read_file(&path)?).map_err(at(&path))
}

fn parse(bytes: &[u8]) -> Result<Core, FormatError> {
    let records = records(bytes, &[MAGIC_COMMON, MAGIC])?;
    decode(records.first().ok_or(FormatError::Empty)?, 0)
}

const MAGIC: u32 = 0x5505_3847;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_does_with_orphans_is_read_among_fields_that_are_not_known() {
        let mut image = [MAGIC_COMMON, MAGIC].map(u32::to_le_bytes).concat();
        // mtype 1; tc { task_state 1, child_subreaper true }
        let record = [0x08, 1, 0x1a, 5, 0x08, 1, 0x90, 0x01, 1];
        image.extend(9_u32.to_le_bytes());
        image.extend(record);
        let core = parse(&image).expect("well formed");
        let process = core.process.expect("a process");
        assert_eq!(process.child_subreaper, Some(true));
    }
}
