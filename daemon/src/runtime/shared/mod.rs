//! Storage that both nodes share, as the operator declares it.
//!
//! Files are not moved. A workload may write only what is below such a path, so it must be proven
//! that the path is the same storage at the target ([`Storage::offer`], [`check`]); what was
//! written must be with the storage before the target reads it ([`sync`]), and the target must see
//! it ([`lengths`]); and memory that both nodes' page caches would have to agree on must not be
//! there ([`mappings`]).
//!
//! A mount below a declared path counts like the path: it is proven and synced by itself. Paths are
//! those of the node, without symbolic links, as the kernel names open files.
//!
//! Absent: making storage shared; locks (see the protocol's refusals); moving files.

pub mod kind;
pub mod lengths;
pub mod mappings;
pub mod marker;
pub mod sync;

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::WorkloadDescription;
use pageferry_proto::wire::shared::{SHARED_PATHS_MAX, SharedPath};
use procfs::process::Process;

use super::mounts::decoded;
use kind::Kind;
use marker::Markers;

/// How long a marker may take to be seen at the target: servers of file systems in user space keep
/// what is in a folder for a second or more.
const SEEN_WITHIN: Duration = Duration::from_secs(3);

/// How often it is looked for.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// File systems that hold no files of anybody's: they are not shared, and not in the way.
const NOT_STORAGE: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

/// What is declared to be shared, at the source.
#[derive(Clone, Debug, Default)]
pub struct Storage {
    /// As declared, without symbolic links.
    paths: Vec<PathBuf>,
    /// Those, and the mounts below them.
    places: BTreeSet<Place>,
    /// What was mounted around the paths when they were looked up.
    mounts: BTreeSet<Mounted>,
}

/// A path that is on one file system, with whatever is mounted below it apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    path: PathBuf,
    /// Number of the device of the file system.
    device: u64,
    /// Which file system, by its number in statfs(2).
    number: u64,
}

/// Something mounted at this node, by a line of mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mounted {
    path: PathBuf,
    /// What of the file system is there.
    root: String,
    device: String,
    /// Name of the file system.
    kind: String,
}

impl Mounted {
    /// Whether what one of `paths` leads to depends on it.
    fn is_around(&self, paths: &[PathBuf]) -> bool {
        let related = |path: &PathBuf| self.path.starts_with(path) || path.starts_with(&self.path);
        self.is_storage() && paths.iter().any(related)
    }

    fn is_storage(&self) -> bool {
        !NOT_STORAGE.contains(&self.kind.as_str())
    }
}

impl Storage {
    /// Looks up what the operator has declared. A path that is not there is refused by its name.
    pub fn find(declared: &[PathBuf]) -> Result<Self, Failure> {
        let resolved = declared.iter().map(|path| {
            let found = fs::canonicalize(path).and_then(|found| Ok((fs::metadata(&found)?, found)));
            match found {
                Ok((metadata, found)) if metadata.is_dir() || metadata.is_file() => Ok(found),
                Ok(_) => Err(differs(path, "is neither a file nor a folder")),
                Err(error) => Err(differs(path, &format!("is not at the source: {error}"))),
            }
        });
        let paths: Vec<PathBuf> = resolved.collect::<Result<_, _>>()?;
        let mounts = mounts_around(&paths)?;
        let places = places(&paths, &mounts)?;
        Ok(Self {
            paths,
            places,
            mounts,
        })
    }

    /// The declared paths, as open files below them are named.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Whether nothing is declared.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Whether something of it has caches that do not agree between nodes.
    pub fn is_incoherent(&self) -> bool {
        let incoherent = |place: &Place| kind::of_number(place.number) == Kind::OnOpen;
        self.places.iter().any(incoherent)
    }

    /// The number of the file system that `path` is on, if it is below a declared path; as looked
    /// up once: nothing is asked of the storage.
    pub fn number_at(&self, path: &Path) -> Option<u64> {
        let around = self
            .places
            .iter()
            .filter(|place| path.starts_with(&place.path));
        let nearest = around.max_by_key(|place| place.path.as_os_str().len());
        nearest.map(|place| place.number)
    }

    /// Refuses mounts at, below or above the declared paths that the target knows nothing of. Asks
    /// the kernel's table alone, and nothing of the storage.
    pub fn check_unchanged(&self) -> Result<(), Failure> {
        let now = mounts_around(&self.paths)?;
        let changed = |mounted: &Mounted, how: &str| {
            let why = format!("was {how} since the move began: move it again");
            Err(differs(&mounted.path, &why))
        };
        if let Some(mounted) = now.difference(&self.mounts).next() {
            return changed(mounted, "mounted");
        }
        match self.mounts.difference(&now).next() {
            Some(mounted) => changed(mounted, "unmounted"),
            None => Ok(()),
        }
    }

    /// What the target must find, and the markers by which it does: they are to live until it has
    /// answered.
    pub fn offer(&self, markers: &mut Markers) -> Result<Vec<SharedPath>, Failure> {
        let offered = self.places.iter();
        offered.map(|place| offer(&place.path, markers)).collect()
    }
}

/// Checks at the target that all that is declared is the same storage here; blocks as [`check`].
pub fn check_all(description: &WorkloadDescription) -> Result<(), Failure> {
    let here = boot_id().map_err(|error| {
        let text = format!("the boot id of the target cannot be read: {error}");
        Failure::new(ErrorCode::NodeUnfit, text)
    })?;
    let boot_ids = [description.boot_id, here];
    let mut paths = description.shared.iter();
    paths.try_for_each(|path| check(path, boot_ids))
}

/// Checks at the target that a declared path is the same storage here.
///
/// Blocks for as long as its marker may take to be seen. `boot_ids` are those of source and target.
pub fn check(shared: &SharedPath, boot_ids: [[u8; 16]; 2]) -> Result<(), Failure> {
    let path = Path::new(&shared.path);
    let refused = |why: &str| Err(differs(path, why));
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return refused(&format!("is not at the target: {error}")),
    };
    if metadata.is_dir() != shared.directory {
        return refused("is a folder at one node and a file at the other");
    }
    let (kind, number) = match kind::of(path) {
        Ok(found) => found,
        Err(error) => return refused(&format!("cannot be looked at by the target: {error}")),
    };
    let local = [kind, kind::of_number(shared.file_system)] == [Kind::Local; 2];
    if local && boot_ids[0] != boot_ids[1] {
        return refused(&format!(
            "is on {} at the source and on {} at the target, which two kernels cannot share",
            kind::name(shared.file_system),
            kind::name(number)
        ));
    }
    let Some(marker) = &shared.marker else {
        return if is_same(shared, &metadata) {
            Ok(())
        } else {
            refused(
                "is not the same storage at the target: nothing could be written there, and inode \
                 or times differ",
            )
        };
    };
    let folder = match folder_of(path, &metadata) {
        Some(folder) => folder,
        None => return refused("is mounted by itself at the target, and not at the source"),
    };
    let deadline = Instant::now() + SEEN_WITHIN;
    loop {
        match marker::found(folder, marker) {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < deadline => std::thread::sleep(LOOK_PERIOD),
            Ok(false) => {
                return refused(&format!(
                    "is not the same storage at the target: {}, which the source has written in \
                     {}, is not there",
                    marker.file_name(),
                    folder.display()
                ));
            }
            Err(error) => {
                return refused(&format!("cannot be read by the target: {error}"));
            }
        }
    }
}

/// The boot id of this kernel.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(number.to_be_bytes())
}

fn offer(path: &Path, markers: &mut Markers) -> Result<SharedPath, Failure> {
    let unreadable =
        |error: io::Error| differs(path, &format!("cannot be read by the source: {error}"));
    let name = path
        .to_str()
        .ok_or_else(|| differs(path, "has a name that is not UTF-8"))?;
    let metadata = fs::metadata(path).map_err(unreadable)?;
    let (_, file_system) = kind::of(path).map_err(unreadable)?;
    let marker = match folder_of(path, &metadata) {
        Some(folder) => markers.write(folder).map_err(|error| {
            Failure::new(
                ErrorCode::SyncFailed,
                format!(
                    "writing to {}, which is to be shared, failed: {error}",
                    folder.display()
                ),
            )
        })?,
        None => None,
    };
    // Writing the marker has changed a folder.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    Ok(SharedPath {
        path: name.to_owned(),
        directory: metadata.is_dir(),
        file_system,
        inode: metadata.ino(),
        born_ns: born(&metadata),
        changed_ns: changed(&metadata),
        marker,
    })
}

/// Where a marker of `path` is; none if that proves nothing of it, since it is a mount by itself.
fn folder_of<'a>(path: &'a Path, metadata: &Metadata) -> Option<&'a Path> {
    if metadata.is_dir() {
        return Some(path);
    }
    path.parent().filter(|_| !is_mount_point(path))
}

fn is_same(shared: &SharedPath, metadata: &Metadata) -> bool {
    let born = born(metadata);
    let times = if born == 0 || shared.born_ns == 0 {
        changed(metadata) == shared.changed_ns
    } else {
        born == shared.born_ns
    };
    times && metadata.ino() == shared.inode
}

fn born(metadata: &Metadata) -> u64 {
    let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
    let born = metadata.created().ok().and_then(since);
    born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(u64::MAX))
}

fn changed(metadata: &Metadata) -> u64 {
    let seconds = u64::try_from(metadata.ctime()).unwrap_or(0);
    let nanoseconds = u64::try_from(metadata.ctime_nsec()).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

fn is_mount_point(path: &Path) -> bool {
    mounts().is_ok_and(|mounts| mounts.iter().any(|mounted| mounted.path == path))
}

/// What is mounted at this node.
fn mounts() -> Result<Vec<Mounted>, procfs::ProcError> {
    let mounts = Process::myself()?.mountinfo()?.into_iter();
    let mounted = |mount: procfs::process::MountInfo| Mounted {
        path: decoded(&mount.mount_point.to_string_lossy()),
        root: mount.root,
        device: mount.majmin,
        kind: mount.fs_type,
    };
    Ok(mounts.map(mounted).collect())
}

fn mounts_around(paths: &[PathBuf]) -> Result<BTreeSet<Mounted>, Failure> {
    if paths.is_empty() {
        return Ok(BTreeSet::new());
    }
    let mounts = mounts()
        .map_err(|error| differs(&paths[0], &format!("cannot be looked at: mounts: {error}")))?;
    let around = mounts.into_iter().filter(|mount| mount.is_around(paths));
    Ok(around.collect())
}

/// `paths` and what is mounted below them; of a path within another one only the outer.
fn places(paths: &[PathBuf], mounts: &BTreeSet<Mounted>) -> Result<BTreeSet<Place>, Failure> {
    let below = mounts.iter().map(|mounted| &mounted.path);
    let below = below.filter(|mounted| paths.iter().any(|path| mounted.starts_with(path)));
    let mut places = BTreeSet::new();
    for path in paths.iter().chain(below).cloned() {
        let found = fs::metadata(&path).and_then(|found| Ok((found.dev(), kind::of(&path)?.1)));
        match found {
            Ok((device, number)) => {
                places.insert(Place {
                    path,
                    device,
                    number,
                });
            }
            // Something is mounted over the folder it is in.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !paths.contains(&path) => {}
            Err(error) => {
                return Err(differs(&path, &format!("cannot be looked at: {error}")));
            }
        }
    }
    let outer = |place: &Place| {
        !places.iter().any(|other| {
            other.path != place.path
                && other.device == place.device
                && place.path.starts_with(&other.path)
                && !is_mount_point(&place.path)
        })
    };
    let places: BTreeSet<Place> = places
        .iter()
        .filter(|place| outer(place))
        .cloned()
        .collect();
    if places.len() > SHARED_PATHS_MAX {
        return Err(Failure::new(
            ErrorCode::Limit,
            format!(
                "{} paths, mounts below them included, are to be shared; at most \
                 {SHARED_PATHS_MAX} may be",
                places.len()
            ),
        ));
    }
    Ok(places)
}

fn differs(path: &Path, why: &str) -> Failure {
    Failure::new(
        ErrorCode::SharedDiffers,
        format!("--shared {} {why}", path.display()),
    )
}

#[cfg(test)]
pub(crate) mod tests;
