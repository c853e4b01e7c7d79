//! Small files that prove to the target that a path is the same storage.
//!
//! They are written before the offer and removed when it is answered, whatever the answer. Those of
//! a daemon that died are removed by the next one, which has their paths from the journal; those
//! whose paths never got there, by whoever next writes one beside them.
//!
//! Written, synced and closed at the source before the target is told of them, and opened by a name
//! that it has never asked for: that is what a file system with close-to-open consistency needs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use pageferry_proto::wire::shared::{MARKER_PART_BYTES, Marker};
use serde::{Deserialize, Serialize};

use crate::runtime::detached;

/// A marker that is older than this belongs to nobody: an offer is answered within a minute. Both
/// times are the storage's, so clocks of nodes do not matter.
const LEFT_AFTER: Duration = Duration::from_secs(3600);

/// Entries of a folder that are looked at for markers that were left.
const ENTRIES_MAX: usize = 65_536;

/// A marker that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    path: PathBuf,
    /// Who owns the folder, where root may not write: the server of an NFS export takes root for
    /// nobody unless told otherwise.
    owner: Option<(u32, u32)>,
}

/// Markers that go when this does.
#[derive(Debug, Default)]
pub struct Markers(Vec<Written>);

impl Markers {
    /// Those that a journal tells of.
    pub fn recovered(written: Vec<Written>) -> Self {
        Self(written)
    }

    /// What the journal must know.
    pub fn written(&self) -> &[Written] {
        &self.0
    }

    /// Writes a marker into `folder`; none if nothing can be written there.
    pub fn write(&mut self, folder: &Path) -> io::Result<Option<Marker>> {
        let marker = Marker::new(random()?);
        let path = folder.join(marker.file_name());
        let metadata = fs::metadata(folder)?;
        let mut owner = None;
        let mut wrote = write(&path, &marker);
        if let Err(error) = &wrote
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            owner = Some((metadata.uid(), metadata.gid()));
            wrote = as_owner(owner, || write(&path, &marker));
        }
        // Part of it may be there, whatever the error.
        let written = Written { path, owner };
        match wrote {
            Ok(()) => {
                remove_left(&written);
                self.0.push(written);
                Ok(Some(marker))
            }
            Err(error) => {
                written.remove();
                if cannot_be_written(&error) {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
        }
    }

    /// Has all of them removed, by a thread that the storage may hold for as long as it does not
    /// answer.
    pub fn remove(&mut self) {
        let written = std::mem::take(&mut self.0);
        if !written.is_empty() {
            drop(detached::begin("markers", move || {
                written.iter().for_each(Written::remove);
            }));
        }
    }
}

impl Drop for Markers {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Written {
    fn remove(&self) {
        match as_owner(self.owner, || fs::remove_file(&self.path)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!("{} is left behind: {error}", self.path.display());
            }
        }
    }
}

/// Whether `marker` is in `folder`, with its content.
pub fn found(folder: &Path, marker: &Marker) -> io::Result<bool> {
    let path = folder.join(marker.file_name());
    let read = || -> io::Result<bool> {
        let mut content = Vec::new();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)?;
        file.take(MARKER_PART_BYTES as u64 + 1)
            .read_to_end(&mut content)?;
        Ok(content == marker.content)
    };
    let mut found = read();
    if let Err(error) = &found
        && error.kind() == io::ErrorKind::PermissionDenied
        && let Ok(metadata) = fs::metadata(folder)
    {
        found = as_owner(Some((metadata.uid(), metadata.gid())), read);
    }
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other,
    }
}

fn write(path: &Path, marker: &Marker) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(&marker.content)?;
    file.sync_all()?;
    drop(file);
    // The name, too, where that is not with the server already.
    if let Some(folder) = path.parent() {
        match File::open(folder).and_then(|folder| folder.sync_all()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Nothing can be written there: it is read-only, forbidden to us, or full.
fn cannot_be_written(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::Unsupported
    )
}

/// Removes markers beside `newest` that nobody has removed in [`LEFT_AFTER`].
fn remove_left(newest: &Written) {
    let (Some(folder), Ok(metadata)) = (newest.path.parent(), fs::metadata(&newest.path)) else {
        return;
    };
    let before = metadata
        .mtime()
        .saturating_sub(LEFT_AFTER.as_secs().cast_signed());
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.take(ENTRIES_MAX).flatten() {
        let is_marker = entry.file_name().to_str().is_some_and(Marker::is_name);
        let is_old = |found: fs::Metadata| found.is_file() && found.mtime() < before;
        if is_marker && entry.metadata().is_ok_and(is_old) {
            let left = Written {
                path: entry.path(),
                owner: newest.owner,
            };
            left.remove();
        }
    }
}

/// Does `work` as somebody else, as far as files are concerned, on a thread of its own.
fn as_owner<T: Send>(
    owner: Option<(u32, u32)>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let Some((uid, gid)) = owner else {
        return work();
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The kernel says no by changing nothing; then `work` fails as it did before.
            setfsgid(Gid::from_raw(gid));
            setfsuid(Uid::from_raw(uid));
            work()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn random() -> io::Result<[u8; 2 * MARKER_PART_BYTES]> {
    let mut bytes = [0; 2 * MARKER_PART_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
