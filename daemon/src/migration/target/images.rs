//! What CRIU will make of the images it is given.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use criu_glue::image::pagemap;
use pageferry_proto::id::SpaceId;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::migration::text::{chain, internal};

/// What CRIU will make.
pub(super) struct Images {
    /// Processes with memory.
    pub(super) spaces: BTreeSet<SpaceId>,
    /// Pids and thread ids.
    pub(super) tasks: Vec<i32>,
}

/// Rewrites the page maps for a lazy restore.
pub(super) fn make_images_lazy(images: &Path) -> Result<Images, Failure> {
    let (mut spaces, mut tasks) = (BTreeSet::new(), Vec::new());
    let entries = fs::read_dir(images).map_err(|error| internal(&error))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = |kind| -> Option<u32> {
            let name = name.to_str()?.strip_prefix(kind)?;
            name.strip_suffix(".img")?.parse().ok()
        };
        tasks.extend(number("core-").and_then(|task| i32::try_from(task).ok()));
        // Only a process that has memory has this image: zombies have none.
        if let Some(vpid) = number("mm-") {
            pagemap::rewrite(images, vpid)
                .map_err(|error| Failure::new(ErrorCode::CriuFailed, chain(&error)))?;
            spaces.insert(SpaceId(vpid));
        }
    }
    Ok(Images { spaces, tasks })
}
