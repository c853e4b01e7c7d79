//! What CRIU will make of the images it is given.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use criu_glue::image::pstree::{self, Process};
use criu_glue::image::{ImageError, core, mm, pagemap};
use pageferry_proto::id::{MemberIndex, SpaceId};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::migration::text::{chain, internal};

/// What CRIU will make.
pub(super) struct Images {
    /// Processes with memory.
    pub(super) spaces: BTreeSet<SpaceId>,
    /// Pids and thread ids, and those of dead leaders of sessions and groups: they are made again
    /// for a moment.
    pub(super) tasks: Vec<i32>,
    /// The root must adopt orphans from the beginning.
    pub(super) adopts: bool,
}

/// Rewrites the page maps of a member's images for a lazy restore.
pub(super) fn make_images_lazy(images: &Path, member: MemberIndex) -> Result<Images, Failure> {
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
            pagemap::rewrite(images, vpid).map_err(|error| criu_failed(&error))?;
            mm::reserve(images, vpid).map_err(|error| criu_failed(&error))?;
            let space = SpaceId::of(member, vpid);
            spaces.insert(space.map_err(|error| internal(&error))?);
        }
    }
    let tree = pstree::read(images).map_err(|error| criu_failed(&error))?;
    for process in &tree {
        let leaders = [process.session, process.group].into_iter();
        // Of a leader in another pid namespace there is none.
        let leaders = leaders.filter(|leader| *leader != 0);
        tasks.extend(leaders.filter_map(|leader| i32::try_from(leader).ok()));
    }
    let adopts = adopts(images, &tree)?;
    Ok(Images {
        spaces,
        tasks,
        adopts,
    })
}

/// Whether a child of the root is of a session that the root did not have when it was born: it was
/// adopted, and is to be adopted again. An init does that anyway.
fn adopts(images: &Path, tree: &[Process]) -> Result<bool, Failure> {
    let Some(root) = tree.first().filter(|root| root.pid != 1) else {
        return Ok(false);
    };
    let adopted = tree.iter().find(|process| {
        let sessions = [root.session, process.pid];
        process.parent == root.pid && !sessions.contains(&process.session)
    });
    let Some(adopted) = adopted else {
        return Ok(false);
    };
    let core = core::read(images, root.pid).map_err(|error| criu_failed(&error))?;
    let is_reaper = core.process.and_then(|process| process.child_subreaper);
    if is_reaper == Some(true) {
        return Ok(true);
    }
    Err(Failure::new(
        ErrorCode::UnsupportedWorkload,
        format!(
            "process {} is of session {}, of which process {}, its parent, is not, and that parent \
             adopts no orphans (PR_SET_CHILD_SUBREAPER): nobody could give it that session again",
            adopted.pid, adopted.session, root.pid
        ),
    ))
}

pub(super) fn criu_failed(error: &ImageError) -> Failure {
    Failure::new(ErrorCode::CriuFailed, chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, session: u32) -> Process {
        Process {
            pid,
            parent,
            group: session,
            session,
            threads: vec![pid],
        }
    }

    #[test]
    fn a_root_adopts_where_a_child_is_of_a_session_that_is_not_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let adopts = |tree: &[Process]| adopts(folder.path(), tree);
        let root = process(100, 0, 100);
        let leader = process(101, 100, 101);
        assert_eq!(adopts(&[root.clone(), leader]), Ok(false));
        let grandchild = process(103, 101, 101);
        assert_eq!(adopts(&[root.clone(), grandchild]), Ok(false));
        let init = [process(1, 0, 1), process(3, 1, 2)];
        assert_eq!(adopts(&init), Ok(false));
        let orphan = process(103, 100, 102);
        let without_core = adopts(&[root, orphan]).expect_err("there is no image of the root");
        assert_eq!(without_core.code(), ErrorCode::CriuFailed);
    }
}
