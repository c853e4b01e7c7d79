//! What a runtime binds for a moment into the root file system of a container that comes, in the
//! node's own namespace. Whoever deletes that root file system would delete it, too, if the runtime
//! is killed meanwhile.
//!
//! Invariant: nothing is unmounted that was mounted before the runtime was started, and nothing of
//! another file system than what it binds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::spec::Spec;
use crate::runtime::mounts::{Mounted, mounted_at};

/// Most mounts on top of each other.
const STACK_MAX: usize = 16;

/// All that is bound into a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binds {
    /// The root file system.
    root: PathBuf,
    all: Vec<Place>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    source: PathBuf,
    path: PathBuf,
    /// The ids of what is mounted there, before the runtime is started.
    before: Vec<i32>,
}

impl Binds {
    /// Looks where they are to be, before the runtime is started.
    pub fn look(spec: &Spec, bundle: &Path) -> io::Result<Self> {
        let (root, all) = spec.places(bundle);
        if fs::canonicalize(&root).is_ok_and(|root| root == Path::new("/")) {
            let text = "the container has the node's own root folder for its root file system";
            return Err(io::Error::other(text));
        }
        let looked = all.into_iter().map(|(source, path)| {
            // It comes, and nothing is mounted in what is not there.
            let before = match fs::canonicalize(&path) {
                Ok(here) => mounted_at(&here)?.1,
                Err(_) => Vec::new(),
            };
            Ok(Place {
                source,
                path,
                before: before.into_iter().map(|mount| mount.id).collect(),
            })
        });
        let all = looked.collect::<io::Result<_>>()?;
        Ok(Self { root, all })
    }

    /// Unmounts what the runtime has left there.
    pub fn release(&self) {
        let Ok(root) = fs::canonicalize(&self.root) else {
            return;
        };
        for place in &self.all {
            // What is in it may lead anywhere.
            let here = fs::canonicalize(&place.path).ok();
            let Some(here) = here.filter(|here| here.starts_with(&root) && *here != root) else {
                continue;
            };
            if let Err(error) = place.unmount(&here) {
                tracing::error!(%error, "{} has a volume bound in it, which is deleted with the \
                    root file system of a container", here.display());
            }
        }
    }
}

impl Place {
    fn unmount(&self, here: &Path) -> io::Result<()> {
        for _ in 0..STACK_MAX {
            let (_, there) = mounted_at(here)?;
            let (bound, _) = mounted_at(&self.source)?;
            // One that has moved away since, or has come, is on the same file system.
            let is_left =
                |mount: &Mounted| !self.before.contains(&mount.id) && mount.device == bound.device;
            if !there.last().is_some_and(is_left) {
                break;
            }
            umount2(here, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use serde_json::json;

    #[test]
    fn only_what_was_bound_since_is_unmounted() {
        let bundle = tempfile::tempdir().unwrap();
        let (root, data) = (bundle.path().join("rootfs"), bundle.path().join("data"));
        let (mine, bound) = (root.join("mine"), root.join("data"));
        for folder in [&mine, &bound, &data] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(data.join("kept"), "").unwrap();
        let bind = |place: &str| {
            json!({
                "destination": place, "type": "bind", "source": data, "options": ["rbind"],
            })
        };
        let spec = |path: &Path| {
            let spec = json!({
                "root": {"path": path}, "mounts": [bind("/data"), bind("/mine")],
                "linux": {"cgroupsPath": "/web", "namespaces": []},
            });
            Spec::parse(spec.to_string().as_bytes()).unwrap()
        };
        // In a mount namespace of this thread, whose mounts nobody else sees.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let put = |from: &Path, to: &Path| {
            mount(Some(from), to, none, MsFlags::MS_BIND, none).unwrap();
        };
        put(&data, &mine);
        let binds = Binds::look(&spec(&root), bundle.path()).unwrap();
        binds.release();
        // What was there before anybody began.
        assert!(mine.join("kept").exists());
        put(&data, &mine);
        put(&data, &bound);
        put(&data, &bound);
        let binds: Binds = serde_json::from_value(serde_json::to_value(&binds).unwrap()).unwrap();
        binds.release();
        assert!(!bound.join("kept").exists());
        let (_, left) = mounted_at(&mine).unwrap();
        assert_eq!(left.len(), 1);
        // What somebody has mounted since, which is not bound.
        mount(Some("none"), &bound, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        binds.release();
        assert_eq!(mounted_at(&bound).unwrap().1.len(), 1);
        let refused = Binds::look(&spec(Path::new("/")), bundle.path()).unwrap_err();
        assert!(refused.to_string().contains("root folder"), "{refused}");
    }
}
