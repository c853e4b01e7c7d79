//! How long the files are that a workload writes, as its node sees them, and whether the other node
//! sees the same.
//!
//! Syncing brings what was written to the storage; it does not bring it to the target's caches. A
//! node that has looked at a file may go on believing in its old length: for a time that the server
//! chooses, or on FUSE with a write-back cache for as long as it remembers the file. What the
//! workload appended there would overwrite what it has appended here. CRIU compares lengths, too,
//! but not those of files that are only appended to.
//!
//! They travel beside CRIU's images, as a file that CRIU does not look at.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::shared::LENGTHS_FILE as FILE;
use serde::{Deserialize, Serialize};

use super::{LOOK_PERIOD, SEEN_WITHIN, sync};
use crate::runtime::mounts::Mounts;

/// A file that is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Length {
    /// Its path at both nodes.
    pub path: PathBuf,
    /// In bytes.
    pub bytes: u64,
    /// Only appended to: others may do so meanwhile.
    pub appended: bool,
}

/// The files below one of `shared` that the processes have open for writing. `mounts` is there if
/// they have a mount namespace of their own. Asks the storage, and waits for its answer.
pub fn read(pids: &[i32], shared: &[PathBuf], mounts: Option<&Mounts>) -> Vec<Length> {
    let mut found: BTreeMap<PathBuf, Length> = BTreeMap::new();
    for descriptor in pids.iter().flat_map(|pid| sync::descriptors(*pid)) {
        let flags = sync::flags(&descriptor).unwrap_or(libc::O_RDWR);
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            continue;
        }
        let Ok(name) = fs::read_link(&descriptor) else {
            continue;
        };
        let path = match mounts {
            Some(mounts) => mounts.node_path(&name),
            None => Some(name),
        };
        let Some(path) = path.filter(|path| shared.iter().any(|prefix| path.starts_with(prefix)))
        else {
            continue;
        };
        // What is deleted goes along by itself.
        if path.to_string_lossy().ends_with(" (deleted)") {
            continue;
        }
        let Ok(metadata) = fs::metadata(&descriptor) else {
            continue;
        };
        if !metadata.is_file() {
            continue;
        }
        let appended =
            flags & (libc::O_ACCMODE | libc::O_APPEND) == libc::O_WRONLY | libc::O_APPEND;
        let length = found.entry(path.clone()).or_insert(Length {
            path,
            bytes: metadata.len(),
            appended,
        });
        length.appended &= appended;
    }
    found.into_values().collect()
}

/// Puts them beside the images in `folder`.
pub fn write(folder: &Path, lengths: &[Length]) -> io::Result<()> {
    fs::write(folder.join(FILE), serde_json::to_vec(lengths)?)
}

/// Checks at the target that it sees the lengths that came with the images in `folder`. Blocks for
/// as long as they may take to be seen.
pub fn check(folder: &Path) -> Result<(), Failure> {
    let text = match fs::read(folder.join(FILE)) {
        Ok(text) => text,
        // Nothing is shared.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            let text = format!("{FILE} cannot be read: {error}");
            return Err(Failure::new(ErrorCode::Internal, text));
        }
    };
    let lengths: Vec<Length> = serde_json::from_slice(&text)
        .map_err(|error| Failure::new(ErrorCode::Malformed, format!("{FILE}: {error}")))?;
    let deadline = Instant::now() + SEEN_WITHIN;
    for length in &lengths {
        while let Err(why) = is_seen(length) {
            if Instant::now() > deadline {
                return Err(Failure::new(
                    ErrorCode::FileDiffers,
                    format!(
                        "{} is not the same at the target: {why}",
                        length.path.display()
                    ),
                ));
            }
            std::thread::sleep(LOOK_PERIOD);
        }
    }
    Ok(())
}

fn is_seen(length: &Length) -> Result<(), String> {
    let here = fs::metadata(&length.path)
        .map_err(|error| error.to_string())?
        .len();
    if here == length.bytes || length.appended && here > length.bytes {
        return Ok(());
    }
    Err(format!(
        "its storage shows {here} bytes here, and {} at the source, where it was synced",
        length.bytes
    ))
}
