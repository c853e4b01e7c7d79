//! Folders that somebody has bound into a folder of his, and has left there.
//!
//! Who removes such a folder with all that is in it removes the files of the other. So what is
//! bound is unmounted, and folders are removed only when they are empty.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Most mounts on top of each other.
const STACK_MAX: usize = 16;

/// Unmounts all that is mounted at `name` in `folder`, and removes both if nothing else is in them.
/// A folder that is not there is no error.
///
/// # Errors
/// What cannot be unmounted: nobody may delete the folder then.
pub fn release(folder: &Path, name: &str) -> io::Result<()> {
    let bound = folder.join(name);
    unmount(&bound)?;
    for folder in [&bound, folder] {
        // With anything in it, it is no leftover.
        drop(fs::remove_dir(folder));
    }
    Ok(())
}

/// Unmounts all that is mounted at a path. One that is not there is no error.
///
/// # Errors
/// What cannot be unmounted.
pub fn unmount(path: &Path) -> io::Result<()> {
    for _ in 0..STACK_MAX {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there, or it is not there.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Removes what is left of something that exists only with its file `state`: files, and folders
/// that are empty, in this order. Nothing if there is that file.
pub fn remove_unless(state: &Path, left: &[PathBuf]) {
    if state.exists() {
        return;
    }
    for path in left {
        // Nothing of a folder that somebody uses is a leftover.
        drop(fs::remove_dir(path));
        if path.is_file() {
            drop(fs::remove_file(path));
        }
    }
}

/// Removes a folder with the empty ones in it, if there is nothing else: a cgroup that nobody is
/// in, with what a killed runtime has made below it.
pub fn remove_empty(folder: &Path) {
    for below in fs::read_dir(folder).into_iter().flatten().flatten() {
        drop(fs::remove_dir(below.path()));
    }
    drop(fs::remove_dir(folder));
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    fn bind(from: &Path, to: &Path) {
        let none: Option<&str> = None;
        mount(Some(from), to, none, MsFlags::MS_BIND, none).expect("needs root");
    }

    #[test]
    fn what_is_bound_is_let_go_and_its_files_stay() {
        let base = std::env::temp_dir().join(format!("pageferry-bound-{}", std::process::id()));
        let (files, state) = (base.join("files"), base.join("state"));
        let bound = state.join("root");
        for folder in [&files, &bound] {
            fs::create_dir_all(folder).expect("a folder for temporary files");
        }
        fs::write(files.join("kept"), "").expect("ours");
        // In a mount namespace of this thread, whose mounts nobody else sees.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("needs root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("needs root");
        bind(&files, &bound);
        bind(&files, &bound);
        assert!(bound.join("kept").exists());
        release(&state, "root").expect("unmounted");
        assert!(files.join("kept").exists());
        assert!(!state.exists());
        // A folder that somebody uses stays, and one that is not there is no error.
        fs::create_dir_all(&bound).expect("ours");
        fs::write(state.join("state.json"), "").expect("ours");
        release(&state, "root").expect("nothing is mounted");
        assert!(state.join("state.json").exists() && !bound.exists());
        release(&base.join("none"), "root").expect("nothing is there");
        fs::remove_dir_all(base).expect("ours");
    }

    #[test]
    fn what_is_left_is_removed_unless_there_is_what_it_belongs_to() {
        let base = std::env::temp_dir().join(format!("pageferry-left-{}", std::process::id()));
        let [folder, used] = ["folder", "used"].map(|name| base.join(name));
        for folder in [&folder, &used] {
            fs::create_dir_all(folder).expect("a folder for temporary files");
            fs::write(folder.join("config"), "").expect("ours");
        }
        let state = folder.join("state");
        let left = [folder.join("config"), folder.clone(), used.clone()];
        fs::write(&state, "").expect("ours");
        remove_unless(&state, &left);
        assert!(folder.join("config").exists());
        fs::remove_file(&state).expect("ours");
        remove_unless(&state, &left);
        assert!(!folder.exists() && used.join("config").exists());
        fs::remove_dir_all(base).expect("ours");
    }
}
