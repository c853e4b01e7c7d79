//! Overlays that engines have mounted as root file systems: what a container writes is in the upper
//! layer of one, and what it is over has the other node by the same image.

use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use procfs::process::{MountInfo, Process};

use super::rootfs::RootFiles;

/// The kind of file system.
const OVERLAY: &str = "overlay";

/// One that is mounted at `place`, with its upper layer: the folder that `told` says, if somebody
/// does.
pub fn find(place: &Path, told: Option<&Path>) -> Result<RootFiles, Failure> {
    let mounts = Process::myself().and_then(|own| own.mountinfo());
    let mounts = mounts.map_err(|error| unfit(format!("the node's mounts: {error}")))?;
    let upper = upper_of(&mounts.0, place)?;
    match told.filter(|told| **told != *upper) {
        Some(told) => Err(unfit(format!(
            "what the container writes is said to be in {}, and the overlay at {} has it in {}",
            told.display(),
            place.display(),
            upper.display()
        ))),
        None => Ok(RootFiles::Layer {
            upper,
            overlay: place.to_owned(),
        }),
    }
}

fn upper_of(mounts: &[MountInfo], place: &Path) -> Result<PathBuf, Failure> {
    let refused = |why: &str| {
        let text = format!(
            "the container writes to its root file system {}, which {why}",
            place.display()
        );
        Err(unfit(text))
    };
    // What is mounted last is seen.
    let Some(mount) = mounts.iter().rfind(|mount| mount.mount_point == place) else {
        return refused("is not mounted at this node: only those on an overlay are moved");
    };
    if mount.fs_type != OVERLAY {
        let kind = &mount.fs_type;
        return refused(&format!(
            "is a mount of {kind}: only those on an overlay are moved"
        ));
    }
    let options = &mount.super_options;
    if options.contains_key("userxattr") {
        return refused("is the overlay of a user, which is not moved");
    }
    let elsewhere = ["metacopy", "redirect_dir", "index"];
    let is_on = |name: &&&str| {
        options
            .get(**name)
            .is_some_and(|how| how.as_deref() == Some("on"))
    };
    if let Some(name) = elsewhere.iter().find(is_on) {
        return refused(&format!(
            "is an overlay with {name}=on, whose layer is nothing without what is below it: mount \
             it without (mountopt in storage.conf)"
        ));
    }
    let upper = options.get("upperdir").cloned().flatten();
    let upper = upper.unwrap_or_default();
    match upper.starts_with('/') && !upper.contains('\\') {
        true => Ok(upper.into()),
        false => refused(&format!(
            "has its upper layer at {upper:?}, which cannot be found"
        )),
    }
}

fn unfit(text: String) -> Failure {
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::FromBufRead;
    use procfs::process::MountInfos;

    #[test]
    fn an_upper_layer_is_that_of_the_overlay_that_is_seen() {
        let lines = [
            "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
            "2 1 0:40 / /m rw - overlay overlay rw,lowerdir=/l,upperdir=/below,workdir=/w",
            "3 1 0:41 / /m rw - overlay overlay rw,lowerdir=/l,upperdir=/store/a/diff,workdir=/w",
            "4 1 0:42 / /fuse rw - fuse.fuse-overlayfs fuse-overlayfs rw",
            "5 1 0:43 / /user rw - overlay overlay rw,upperdir=/u,userxattr",
            "6 1 0:44 / /near rw - overlay overlay rw,lowerdir=l,upperdir=a/diff",
            "7 1 0:45 / /odd rw - overlay overlay rw,upperdir=/a\\\\,b",
            "8 1 0:46 / /below rw - overlay overlay ro,lowerdir=/l",
            "9 1 0:47 / /meta rw - overlay overlay rw,upperdir=/u,redirect_dir=on,metacopy=on",
            "10 1 0:48 / /index rw - overlay overlay rw,upperdir=/u,index=on",
            "11 1 0:49 / /off rw - overlay overlay rw,upperdir=/u,index=off,redirect_dir=nofollow",
        ];
        let mounts = MountInfos::from_buf_read(lines.join("\n").as_bytes()).unwrap();
        let of = |place: &str| upper_of(&mounts.0, Path::new(place));
        assert_eq!(of("/m").unwrap(), Path::new("/store/a/diff"));
        assert_eq!(of("/off").unwrap(), Path::new("/u"));
        for (place, why) in [
            ("/meta", "metacopy=on"),
            ("/index", "index=on"),
            ("/", "a mount of ext4"),
            ("/fuse", "fuse-overlayfs"),
            ("/user", "of a user"),
            ("/near", "a/diff"),
            ("/odd", "cannot be found"),
            ("/below", "cannot be found"),
            ("/none", "is not mounted"),
        ] {
            let refused = of(place).unwrap_err();
            assert!(refused.text().contains(why), "{refused}");
        }
    }
}
