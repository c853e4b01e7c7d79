//! Root file systems that containers write to: they travel, with what they are in.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Component, Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::BundleFolder;

/// What the specification calls the configuration of a bundle.
pub const CONFIG: &str = "config.json";

/// One at its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFiles {
    /// A folder in the bundle, which goes aside with it.
    Bundle {
        /// The folder of the bundle.
        bundle: PathBuf,
        /// The root file system.
        root: PathBuf,
    },
    /// The upper layer of an overlay, which its engine removes.
    Layer {
        /// The folder of the layer.
        upper: PathBuf,
        /// Where the overlay is mounted.
        overlay: PathBuf,
    },
}

/// One at its target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootPlace {
    /// In a bundle, which is made for it.
    Bundle(Bundle),
    /// An overlay, which its engine mounts for it.
    Overlay,
}

/// A bundle that is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// Its folder.
    pub path: PathBuf,
    /// Its configuration.
    pub config: Vec<u8>,
    /// The root file system, by its path in that folder.
    pub root: PathBuf,
}

impl RootFiles {
    /// The one in `bundle` by the path that its configuration names, if nothing else is in there.
    pub fn in_bundle(bundle: &Path, named: &Path) -> Result<Self, Failure> {
        let root = within(bundle, named)?;
        let others = fs::read_dir(bundle).and_then(|entries| {
            let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
            names.collect::<io::Result<Vec<_>>>()
        });
        let others = others.map_err(|error| unfit(format!("{}: {error}", bundle.display())))?;
        let mut others = others.into_iter();
        if let Some(other) = others.find(|name| name != CONFIG && name != root.as_os_str()) {
            return Err(unfit(format!(
                "the bundle {} has {} besides its {CONFIG} and its root file system, which would \
                 not come along: keep it elsewhere",
                bundle.display(),
                Path::new(&other).display()
            )));
        }
        Ok(Self::Bundle {
            root: bundle.join(root),
            bundle: bundle.to_owned(),
        })
    }
}

/// The name of a root file system in its bundle: what is beside it there is all that is in that.
pub fn within(bundle: &Path, named: &Path) -> Result<PathBuf, Failure> {
    let named = named.strip_prefix(bundle).unwrap_or(named);
    let mut parts = named.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => Ok(name.into()),
        _ => Err(unfit(format!(
            "the container may write to its root file system {}, which is not in its bundle {} by \
             one name: it cannot come along",
            named.display(),
            bundle.display()
        ))),
    }
}

/// What is said of the folder of a bundle.
pub fn folder_of(bundle: &Path) -> io::Result<BundleFolder> {
    let metadata = fs::symlink_metadata(bundle)?;
    Ok(BundleFolder {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// Gives a bundle the mode and the owner that it has at the other node.
pub fn open_like(bundle: &Path, like: BundleFolder) -> io::Result<()> {
    lchown(bundle, Some(like.uid), Some(like.gid))?;
    fs::set_permissions(bundle, Permissions::from_mode(like.mode))?;
    fs::File::open(bundle)?.sync_all()
}

impl Bundle {
    /// Makes what is in it, but for what comes, in `folder`, which becomes it; there may be what
    /// was in it before. Root alone may enter it until [`open_like`].
    pub fn make_in(&self, folder: &Path) -> io::Result<()> {
        lchown(folder, Some(0), Some(0))?;
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        match fs::remove_file(folder.join(CONFIG)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut private = OpenOptions::new();
        let private = private.write(true).create_new(true).mode(0o600);
        let mut config = private.open(folder.join(CONFIG))?;
        config.write_all(&self.config)?;
        config.sync_all()?;
        let root = folder.join(&self.root);
        match fs::create_dir(&root) {
            // Not where a link leads to.
            Err(error) if fs::symlink_metadata(&root).is_ok_and(|there| there.is_dir()) => {
                tracing::debug!("{} is built upon: {error}", root.display());
                Ok(())
            }
            made => made,
        }
    }

    /// Where the root file system is.
    pub fn root(&self) -> PathBuf {
        self.path.join(&self.root)
    }
}

fn unfit(text: String) -> Failure {
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_root_file_system_is_in_its_bundle_with_nothing_else() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path();
        fs::create_dir_all(path.join("files/rootfs")).unwrap();
        fs::create_dir_all(path.join("files/backup")).unwrap();
        fs::write(path.join(CONFIG), "{}").unwrap();
        let found = |named: &str| RootFiles::in_bundle(path, Path::new(named));
        let own = Ok(RootFiles::Bundle {
            bundle: path.to_owned(),
            root: path.join("files"),
        });
        assert_eq!(found("files/"), own);
        assert_eq!(found(&path.join("files").to_string_lossy()), own);
        // What is beside it deeper down would go with the bundle, and not come along.
        for outside in [
            "files/rootfs",
            "/srv/rootfs",
            "../rootfs",
            "files/../../rootfs",
            ".",
            "",
        ] {
            let refused = found(outside).unwrap_err();
            assert!(refused.text().contains("not in its bundle"), "{refused}");
        }
        fs::write(path.join("notes"), "").unwrap();
        let refused = found("files").unwrap_err();
        assert!(refused.text().contains("has notes besides"), "{refused}");
    }

    #[test]
    fn a_bundle_is_made_as_the_other_node_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = Bundle {
            path: "/srv/web".into(),
            config: b"{}".to_vec(),
            root: "rootfs".into(),
        };
        let like = BundleFolder {
            mode: 0o710,
            uid: 5,
            gid: 6,
        };
        // What was kept may have another configuration.
        for _ in 0..2 {
            bundle.make_in(folder.path()).unwrap();
            let private = folder_of(folder.path()).unwrap();
            assert_eq!((private.mode, private.uid, private.gid), (0o700, 0, 0));
            open_like(folder.path(), like).unwrap();
            assert_eq!(folder_of(folder.path()).unwrap(), like);
            assert_eq!(fs::read(folder.path().join(CONFIG)).unwrap(), b"{}");
            assert!(folder.path().join("rootfs").is_dir());
            fs::write(folder.path().join(CONFIG), "other").unwrap();
        }
        // What leads elsewhere is no root file system.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::remove_dir(folder.path().join("rootfs")).unwrap();
        symlink(elsewhere.path(), folder.path().join("rootfs")).unwrap();
        bundle.make_in(folder.path()).unwrap_err();
        assert_eq!(bundle.root(), Path::new("/srv/web/rootfs"));
    }
}
