//! Whether somebody else uses a bundle whose container is to leave: it goes aside with that, and is
//! removed in time.
//!
//! Absent: who has a folder of it open and nothing else; who reads a file is no reason to stay.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use procfs::FromBufRead;
use procfs::process::{MountInfo, MountInfos, Process};

use super::identity;

/// Most folders between where a process is and a root.
const DEPTH_MAX: usize = 256;

/// Refuses a bundle if it is used by who is not among `pids`: a process that has its root or its
/// working directory in it, a mount of something in it, or a second container, of which the
/// runtimes keep in `runtimes` what they know. Blocks.
pub fn check(bundle: &Path, pids: &[i32], runtimes: &[&Path]) -> Result<(), Failure> {
    let used = |by: String| {
        let text = format!(
            "{by} uses the bundle {}, which is to leave with its container: end that",
            bundle.display()
        );
        Err(Failure::new(ErrorCode::FolderUnfit, text))
    };
    let unknown = |error: &dyn std::error::Error| {
        let text = format!("who uses {} cannot be told: {error}", bundle.display());
        Failure::new(ErrorCode::NodeUnfit, text)
    };
    let here = fs::metadata(bundle).map_err(|error| unknown(&error))?;
    let here = (here.dev(), here.ino());
    // Those of this thread, should it have others.
    let own = fs::read("/proc/thread-self/mountinfo").map_err(|error| unknown(&error))?;
    let own = MountInfos::from_buf_read(&*own);
    let own = own.map_err(|error| unknown(&error))?.0;
    let shown = Shown::of(bundle, &own, runtimes);
    if let Some(by) = shown.by(&own) {
        return used(by);
    }
    let mut seen: Vec<PathBuf> =
        vec![fs::read_link("/proc/thread-self/ns/mnt").unwrap_or_default()];
    for pid in others(pids) {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let places = ["root", "cwd"].map(|name| process.join(name));
        if places.into_iter().any(|place| is_in(place, here)) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            return used(format!("process {pid} ({})", name.trim_end()));
        }
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else {
            continue;
        };
        if seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let mounts = Process::new(pid).and_then(|process| process.mountinfo());
        if let Some(by) = mounts.ok().and_then(|all| shown.by(&all.0)) {
            return used(format!("{by} of process {pid}"));
        }
    }
    match containers(bundle, runtimes).as_slice() {
        [] | [_] => Ok(()),
        more => used(format!("more than one container ({})", more.join(", "))),
    }
}

/// Processes that are neither in the tree of `pids` nor of this daemon.
fn others(pids: &[i32]) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_known = |pid: i32| pid == own || pids.contains(&pid);
    let others = all.filter(|pid| !is_known(*pid));
    let others = others.filter(|pid| !identity::ancestors(*pid).into_iter().any(is_known));
    others.collect()
}

/// Whether a folder, or one that it is in, is this one; wherever somebody has it mounted.
fn is_in(mut place: PathBuf, (device, inode): (u64, u64)) -> bool {
    let mut below = None;
    for _ in 0..DEPTH_MAX {
        // Who has ended uses nothing.
        let Ok(here) = fs::metadata(&place) else {
            return false;
        };
        let here = (here.dev(), here.ino());
        if here == (device, inode) {
            return true;
        }
        if below == Some(here) {
            return false;
        }
        below = Some(here);
        place.push("..");
    }
    false
}

/// Where a bundle is, for whoever shows something of it elsewhere.
struct Shown<'a> {
    bundle: &'a Path,
    /// Its file system, and its path there.
    inside: Option<(String, PathBuf)>,
    /// A runtime's own mounts are no others'.
    runtimes: &'a [&'a Path],
}

impl<'a> Shown<'a> {
    /// `own` are the mounts by which it has its path.
    fn of(bundle: &'a Path, own: &[MountInfo], runtimes: &'a [&'a Path]) -> Self {
        let above = own
            .iter()
            .filter(|mount| bundle.starts_with(&mount.mount_point));
        // The innermost, and of several there the last.
        let above = above.max_by_key(|mount| mount.mount_point.as_os_str().len());
        let inside = above.and_then(|above| {
            let below = bundle.strip_prefix(&above.mount_point).ok()?;
            Some((above.majmin.clone(), Path::new(&above.root).join(below)))
        });
        Self {
            bundle,
            inside,
            runtimes,
        }
    }

    /// What of these mounts shows something of it, but where it is.
    fn by(&self, mounts: &[MountInfo]) -> Option<String> {
        let is_inside = |mount: &MountInfo| {
            let inside = self.inside.as_ref();
            inside.is_some_and(|(device, path)| {
                mount.majmin == *device && Path::new(&mount.root).starts_with(path)
            })
        };
        let is_own = |mount: &MountInfo| {
            let mut own = self.runtimes.iter().copied().chain([self.bundle]);
            own.any(|folder| mount.mount_point.starts_with(folder))
        };
        let shows = |mount: &&MountInfo| {
            (is_inside(mount) && !is_own(mount)) || has_layer(mount, self.bundle)
        };
        let found = mounts.iter().find(shows)?;
        Some(format!("the mount {}", found.mount_point.display()))
    }
}

/// Whether an overlay has a layer in there.
fn has_layer(mount: &MountInfo, bundle: &Path) -> bool {
    let layers = mount.super_options.iter().filter(|(name, _)| {
        ["lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"].contains(&name.as_str())
    });
    let mut layers = layers.filter_map(|(_, value)| value.as_deref());
    mount.fs_type == "overlay"
        && layers.any(|all| {
            all.split(':')
                .any(|layer| Path::new(layer).starts_with(bundle))
        })
}

/// Containers that runtimes have by this bundle: runc notes it as a label, crun by its name.
fn containers(bundle: &Path, runtimes: &[&Path]) -> Vec<String> {
    let label = format!("bundle={}", bundle.display());
    let names = |text: &[u8]| {
        let state = serde_json::from_slice::<serde_json::Value>(text).unwrap_or_default();
        let labels = state["config"]["labels"].as_array();
        let labels = labels.into_iter().flatten();
        let by_label = labels
            .filter_map(|value| value.as_str())
            .any(|has| has == label);
        by_label
            || state["bundle"]
                .as_str()
                .is_some_and(|has| Path::new(has) == bundle)
    };
    let folders = runtimes
        .iter()
        .filter_map(|runtime| fs::read_dir(runtime).ok());
    let folders = folders.flatten().flatten().map(|entry| entry.path());
    let has = |folder: &PathBuf| {
        let states = ["status", "state.json"].map(|name| fs::read(folder.join(name)));
        states.into_iter().flatten().any(|text| names(&text))
    };
    let found = folders.filter(has);
    let mut found: Vec<String> = found.map(|folder| folder.display().to_string()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_is_in_a_bundle_and_stays_refuses_it() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("web");
        let inner = bundle.join("rootfs/srv");
        fs::create_dir_all(&inner).unwrap();
        check(&bundle, &[], &[]).unwrap();
        // Not of the daemon: as a shell of an operator.
        let mut shell = Command::new("setsid");
        let script = "sleep 600 >/dev/null 2>&1 & echo $!";
        let shell = shell.args(["sh", "-c", script]).current_dir(&inner);
        let said = String::from_utf8(shell.output().unwrap().stdout).unwrap();
        let pid: i32 = said.trim().parse().unwrap();
        let refused = check(&bundle, &[], &[]);
        let inside = check(&bundle, &[pid], &[]);
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::FolderUnfit);
        assert!(refused.text().contains("(sleep)"), "{refused}");
        inside.unwrap();
    }

    #[test]
    fn a_mount_of_something_in_a_bundle_is_told_from_others() {
        let mounts = |lines: &[&str]| {
            MountInfos::from_buf_read(lines.join("\n").as_bytes())
                .unwrap()
                .0
        };
        let own = [
            "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
            "2 1 8:2 /data /srv rw - ext4 /dev/sda2 rw",
        ];
        let found = |line: &str| {
            let all = mounts(&[own[0], own[1], line]);
            let runtimes = [Path::new("/run/runc")];
            Shown::of(Path::new("/srv/web"), &mounts(&own), &runtimes).by(&all)
        };
        for other in [
            "3 1 8:2 /data/web /srv/web/criu-root rw - ext4 /dev/sda2 rw",
            "3 1 8:2 /data/web/rootfs /run/runc/web/criu-root rw - ext4 /dev/sda2 rw",
            "3 1 8:2 /data/webs /mnt rw - ext4 /dev/sda2 rw",
            "3 1 8:1 /data/web /mnt rw - ext4 /dev/sda1 rw",
            "3 1 0:40 / /m rw - overlay overlay rw,lowerdir=/srv/webs:/l,upperdir=/u,workdir=/w",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
        for user in [
            "3 1 8:2 /data/web /mnt rw - ext4 /dev/sda2 rw",
            "3 1 8:2 /data/web/rootfs/etc /mnt rw - ext4 /dev/sda2 rw",
            "3 1 0:40 / /mnt rw - overlay overlay rw,lowerdir=/l:/srv/web/rootfs,upperdir=/u",
        ] {
            assert_eq!(found(user).as_deref(), Some("the mount /mnt"), "{user}");
        }
    }

    #[test]
    fn a_second_container_of_a_bundle_is_found_where_runtimes_note_it() {
        let root = tempfile::tempdir().unwrap();
        let (bundle, run) = (root.path().join("web"), root.path().join("run"));
        fs::create_dir(&bundle).unwrap();
        let note = |id: &str, name: &str, text: String| {
            fs::create_dir_all(run.join(id)).unwrap();
            fs::write(run.join(id).join(name), text).unwrap();
        };
        let path = bundle.display();
        let runc = format!(r#"{{"config":{{"labels":["a=b","bundle={path}"]}}}}"#);
        note("one", "state.json", runc);
        let others = format!(r#"{{"bundle":"{path}s"}}"#);
        note("other", "status", others);
        check(&bundle, &[], &[&run]).unwrap();
        note("two", "status", format!(r#"{{"bundle":"{path}"}}"#));
        let refused = check(&bundle, &[], &[&run]).unwrap_err();
        assert!(refused.text().contains("/one, "), "{refused}");
        assert!(refused.text().contains("/two)"), "{refused}");
    }
}
