//! What the kubelet has bound into the container of a pod, by where that is: what it makes again at
//! the target, what travels, and what does neither.
//!
//! Pure, but for the kind of file system that a folder is on.

use std::path::{Component, Path};

use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};

/// Kinds of volumes that the kubelet fills, with the same at both nodes.
const FILLED: [&str; 4] = ["configmap", "downward-api", "projected", "secret"];

/// What it calls those that are the pod's own, for as long as that lives: they travel.
const EMPTY_DIR: &str = "empty-dir";

/// Where the kubelet has the volumes of a pod, in its folder of it; the kind of one is behind this.
const VOLUMES: &str = "volumes";
const KIND_PREFIX: &str = "kubernetes.io~";

/// Where it has what containers see of volumes by a `subPath`.
const SUB_PATHS: &str = "volume-subpaths";

/// Whether something that is bound is the kubelet's, of this pod, or of its sandbox.
pub(super) fn is_made(source: &Path, uid: &str) -> bool {
    folder_of(source, "pods", uid) || is_sandboxes(source)
}

/// Whether a path leads through `folder` and something in it of this name.
fn folder_of(path: &Path, folder: &str, name: &str) -> bool {
    let parts: Vec<&str> = parts(path);
    parts.windows(2).any(|pair| pair == [folder, name])
}

/// Whether it is of a sandbox of containerd.
fn is_sandboxes(path: &Path) -> bool {
    let parts = parts(path);
    let engine = parts
        .iter()
        .any(|part| part.starts_with("io.containerd.grpc.v1.cri"));
    engine && parts.contains(&"sandboxes")
}

fn parts(path: &Path) -> Vec<&str> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    });
    parts.collect()
}

/// Whether something that is bound is a volume of pod `uid`'s own, whole.
pub(super) fn is_own(source: &Path, uid: &str) -> bool {
    folder_of(source, "pods", uid) && volume_name(source).is_some()
}

/// What a pod calls the volume of its own that the kubelet has at this path.
pub fn volume_name(path: &Path) -> Option<&str> {
    let parts = parts(path);
    let [.., "pods", _, VOLUMES, kind, name] = parts[..] else {
        return None;
    };
    (kind.strip_prefix(KIND_PREFIX) == Some(EMPTY_DIR)).then_some(name)
}

/// Its contents would have to be copied by mappings.
fn is_of_huge_pages(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|on| on.filesystem_type() == HUGETLBFS_MAGIC)
}

/// What of the kubelet's folder of pod `uid` something is, unless the kubelet at the target makes
/// the same again: nothing else there may be taken for that, since what is in it would be lost.
pub(super) fn unmoved(source: &Path, uid: &str) -> Option<String> {
    let parts = parts(source);
    let at = parts.windows(2).position(|pair| pair == ["pods", uid])?;
    match parts.get(at + 2..).unwrap_or_default() {
        ["etc-hosts"] => None,
        // Where a container says why it has ended.
        ["containers", _, _] => None,
        [VOLUMES, kind, _, ..] => {
            let known = kind.strip_prefix(KIND_PREFIX);
            match known {
                Some(kind) if FILLED.contains(&kind) => None,
                Some(EMPTY_DIR) if is_own(source, uid) => {
                    is_of_huge_pages(source).then(|| "an emptyDir of huge pages".to_owned())
                }
                _ => Some(format!("a volume of the kind {}", known.unwrap_or(kind))),
            }
        }
        [SUB_PATHS, name, ..] => Some(format!("a subPath of the volume {name}")),
        other => Some(format!("the kubelet's {:?} of its pod", other.join("/"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e";

    #[test]
    fn what_the_kubelet_binds_is_of_this_pod_or_its_sandbox() {
        let kubelet = format!("/var/lib/kubelet/pods/{UID}");
        for made in [
            format!("{kubelet}/etc-hosts"),
            format!("{kubelet}/volumes/kubernetes.io~projected/token"),
            "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/0a/resolv.conf".to_owned(),
            "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/0a/shm".to_owned(),
        ] {
            assert!(is_made(Path::new(&made), UID), "{made}");
        }
        for other in [
            "/srv/data",
            "/var/lib/kubelet/pods/other/etc-hosts",
            "/sandboxes/0a",
        ] {
            assert!(!is_made(Path::new(other), UID), "{other}");
        }
    }

    #[test]
    fn of_what_the_kubelet_has_only_that_moves_which_it_makes_again() {
        let unmoved = |rest: &str| {
            let path = format!("/var/lib/kubelet/pods/{UID}/{rest}");
            unmoved(Path::new(&path), UID)
        };
        for made in [
            "etc-hosts",
            "containers/web/1f0c9a3e",
            "volumes/kubernetes.io~configmap/config",
            "volumes/kubernetes.io~projected/kube-api-access-x2v4z",
            "volumes/kubernetes.io~secret/token/..data",
            "volumes/kubernetes.io~empty-dir/cache",
        ] {
            assert_eq!(unmoved(made), None, "{made}");
        }
        for (other, named) in [
            ("volumes/kubernetes.io~empty-dir/d/within", "empty-dir"),
            ("volumes/kubernetes.io~empty-dir", "kubernetes.io~empty-dir"),
            ("volumes/empty-dir/d", "empty-dir"),
            ("volumes/kubernetes.io~csi/pvc/mount", "csi"),
            ("volumes/secret/d", "secret"),
            ("volumes/kubernetes.io~secret", "kubernetes.io~secret"),
            (
                "volume-subpaths/config/web/0",
                "subPath of the volume config",
            ),
            ("volumes-x/kubernetes.io~secret/d", "volumes-x"),
            (
                "volumeDevices/kubernetes.io~local-volume/d",
                "volumeDevices",
            ),
            ("plugins/kubernetes.io~empty-dir/d", "plugins"),
            ("containers/web", "containers/web"),
            ("", "of its pod"),
        ] {
            let what = unmoved(other).unwrap_or_default();
            assert!(what.contains(named), "{other}: {what}");
        }
        assert_eq!(super::unmoved(Path::new("/srv/data"), UID), None);
    }

    #[test]
    fn a_volume_of_a_pods_own_is_known_by_its_name() {
        let path = format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~empty-dir/cache");
        assert_eq!(volume_name(Path::new(&path)), Some("cache"));
        assert!(is_own(Path::new(&path), UID) && !is_own(Path::new(&path), "other"));
        for other in [
            format!("{path}/within"),
            format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~secret/cache"),
            "/srv/volumes/kubernetes.io~empty-dir/cache".to_owned(),
            "/srv/data".to_owned(),
        ] {
            assert_eq!(volume_name(Path::new(&other)), None, "{other}");
        }
    }
}
