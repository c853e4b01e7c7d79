//! Folders that come with a workload: applied beside where they are to be, put there before it is
//! restored, and taken back if it does not run here. The bundle of a container is put there ahead,
//! since its runtime is started long before the restore, and filled where it is.
//!
//! Invariants: what is made is written down before, where a reboot does not reach it; nothing is
//! put that is not proven; what was put is taken back by its inode, so that nothing else ever is.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_files::{Digest, Error, Keep, Placed, Staging, Totals, admit, may_come};
use pageferry_proto::id::MigrationId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::{BundleFolder, CopiedForm, CopiedPath, FilesHeader};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::migration::folders::failed;
use crate::migration::text::{chain, internal};
use crate::net::stream::{ReadStreamError, StreamReader};
use crate::runtime::rootfs::{Bundle, RootPlace};

/// What the node keeps of folders, and where it writes down which are coming.
#[derive(Clone, Debug)]
pub struct Shelf {
    state: PathBuf,
    keep: Keep,
}

/// Folders of one migration. Clones are of the same.
#[derive(Clone, Debug)]
pub struct Folders {
    shelf: Shelf,
    id: MigrationId,
    all: Arc<Mutex<Vec<Folder>>>,
}

#[derive(Clone, Debug)]
struct Folder {
    placed: Placed,
    /// It is put before anything comes, and filled where it is.
    ahead: bool,
    /// What this node has kept of it, and begins with.
    kept: Option<Digest>,
    /// None of one that a dead daemon has begun.
    staging: Option<Arc<Mutex<Stage>>>,
}

/// Where a folder is applied.
#[derive(Debug)]
enum Stage {
    /// Nothing has come, and what is kept has not been read.
    Claimed {
        place: PathBuf,
        base: Option<Digest>,
    },
    /// The same of one that is applied where it is.
    Ahead {
        root: PathBuf,
        base: Option<Digest>,
    },
    Open(Box<Staging>),
    /// It is the workload's, or taken back.
    Gone,
}

impl Stage {
    /// Opens it if it is not.
    fn open(&mut self) -> Result<&mut Staging, Error> {
        let opened = match self {
            Self::Claimed { place, base } => Some(Staging::open(place, *base)?),
            Self::Ahead { root, base } => Some(Staging::open_root(root, *base)?),
            Self::Open(_) | Self::Gone => None,
        };
        if let Some(staging) = opened {
            *self = Self::Open(Box::new(staging));
        }
        match self {
            Self::Open(staging) => Ok(staging),
            Self::Claimed { .. } | Self::Ahead { .. } | Self::Gone => Err(Error::Cut),
        }
    }
}

/// As it is written down.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    path: PathBuf,
    place: PathBuf,
    inode: Option<(u64, u64)>,
    was_there: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    ahead: bool,
}

impl Shelf {
    /// With its notes in the folder `state`, which need not be there.
    pub fn new(state: PathBuf) -> Self {
        Self {
            keep: Keep::new(state.clone()),
            state,
        }
    }

    /// What the node keeps of workloads that have left.
    pub fn keep(&self) -> Keep {
        self.keep.clone()
    }

    fn note(&self, id: MigrationId) -> PathBuf {
        self.state.join(format!("{id}.coming"))
    }

    /// Removes what migrations that are not known have left on its way. They have put nothing but
    /// ahead: what is put has a record before.
    pub fn clean_up(&self, is_known: impl Fn(MigrationId) -> bool) {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        for entry in entries {
            let path = entry.path();
            let name = path
                .file_stem()
                .and_then(|name| name.to_str()?.parse().ok());
            let is_note = path
                .extension()
                .is_some_and(|extension| extension == "coming");
            let Some(id) = name.filter(|id| is_note && !is_known(*id)) else {
                continue;
            };
            let left = Folders::new(self.clone(), id);
            for folder in left.lock().iter_mut().filter(|folder| !folder.ahead) {
                folder.placed.inode = None;
            }
            if let Err(failure) = left.take_back() {
                tracing::warn!(migration = %id, "a folder is left of its beginning: {failure}");
            }
        }
    }
}

impl Folders {
    /// Those of a migration, as far as they are written down.
    pub fn new(shelf: Shelf, id: MigrationId) -> Self {
        let noted = fs::read(shelf.note(id)).ok();
        let noted = noted.and_then(|bytes| serde_json::from_slice::<Vec<Noted>>(&bytes).ok());
        let folder = |noted: Noted| Folder {
            placed: Placed {
                path: noted.path,
                place: noted.place,
                inode: noted.inode,
                was_there: noted.was_there,
            },
            ahead: noted.ahead,
            kept: None,
            staging: None,
        };
        let all = noted.into_iter().flatten().map(folder).collect();
        Self {
            shelf,
            id,
            all: Arc::new(Mutex::new(all)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Folder>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_down(&self) -> Result<(), Failure> {
        let noted: Vec<Noted> = self.lock().iter().map(Noted::of).collect();
        let note = self.shelf.note(self.id);
        let bytes = serde_json::to_vec(&noted).map_err(|error| internal(&error))?;
        let written = self.shelf.keep.write(&note, &bytes);
        written.map_err(|error| failed(&error, ErrorCode::NodeUnfit))
    }

    /// Makes a place for each of them; that of a container's own is `root`. Blocks.
    pub fn prepare(&self, copied: &[CopiedPath], root: Option<&RootPlace>) -> Result<(), Failure> {
        check_forms(copied, root)?;
        if copied.is_empty() {
            return Ok(());
        }
        let taken = |error: Error| failed(&error, ErrorCode::PathTaken);
        let mut needed = std::collections::BTreeMap::<PathBuf, Totals>::new();
        for (index, coming) in copied.iter().enumerate() {
            let bundle = bundle_of(coming, root);
            let path = bundle.map_or(Path::new(&coming.path), |(bundle, _)| &bundle.path);
            let was_there = may_come(path).map_err(taken)?;
            let keep = &self.shelf.keep;
            let there = coming.base.and_then(|base| keep.has(path, &base));
            let kept = coming.base.filter(|_| there.is_some());
            let offered = Totals {
                entries: coming.entries,
                bytes: coming.bytes,
            };
            let missing = offered.without(there.unwrap_or_default());
            // Several may come to one folder.
            let parent = path.parent().unwrap_or(path).to_owned();
            let totals = needed.entry(parent).or_default();
            totals.entries = totals.entries.saturating_add(missing.entries);
            totals.bytes = totals.bytes.saturating_add(missing.bytes);
            admit(path, totals).map_err(taken)?;
            self.lock().push(Folder {
                placed: Placed {
                    path: path.to_owned(),
                    place: Keep::place(path, &self.id.to_string(), index),
                    inode: None,
                    was_there,
                },
                ahead: bundle.is_some(),
                kept,
                staging: None,
            });
        }
        self.write_down()?;
        let keep = &self.shelf.keep;
        for folder in self.lock().iter_mut() {
            let Placed { path, place, .. } = &folder.placed;
            let claimed = keep.claim(path, place, folder.kept.is_some());
            folder.placed.inode = Some(claimed.map_err(taken)?);
        }
        self.write_down()?;
        for (folder, coming) in self.lock().iter_mut().zip(copied) {
            let stage = folder.stage(bundle_of(coming, root))?;
            folder.staging = Some(Arc::new(Mutex::new(stage)));
        }
        Ok(())
    }

    /// Which of them this node has as the offer says.
    pub fn kept(&self) -> Vec<u32> {
        let all = self.lock();
        let kept = all
            .iter()
            .zip(0..)
            .filter(|(folder, _)| folder.kept.is_some());
        kept.map(|(_, index)| index).collect()
    }

    /// Checks that the final round has a difference of each of them.
    pub fn check_last(&self, files: u32) -> Result<(), Failure> {
        match usize::try_from(files) == Ok(self.lock().len()) {
            true => Ok(()),
            false => Err(malformed(
                "the final round lacks a folder, or has one too many",
            )),
        }
    }

    /// What precedes a difference.
    pub async fn header(reader: &mut StreamReader) -> Result<FilesHeader, Failure> {
        let mut bytes = [0; FilesHeader::BYTES];
        reader
            .read_exact(&mut bytes)
            .await
            .map_err(|error| lost(&error))?;
        FilesHeader::decode(bytes).map_err(|_| malformed("a difference has no round"))
    }

    /// Applies a difference as it comes, to its end.
    pub async fn take(
        &self,
        header: FilesHeader,
        reader: &mut StreamReader,
    ) -> Result<(), Failure> {
        let index = usize::try_from(header.folder).map_err(|error| internal(&error))?;
        let staging = self
            .lock()
            .get(index)
            .and_then(|folder| folder.staging.clone());
        let staging = staging.ok_or_else(|| malformed("a difference is of no folder"))?;
        let mut is_whole = false;
        while !reader.is_over().await.map_err(|error| lost(&error))? {
            if is_whole {
                return Err(malformed("something comes behind the end of a difference"));
            }
            let mut head = [0; 8];
            reader
                .read_exact(&mut head)
                .await
                .map_err(|error| lost(&error))?;
            let differs = |error: Error| failed(&error, ErrorCode::NodeUnfit);
            let (length, checksum) = Staging::frame(head).map_err(differs)?;
            let mut frame = vec![0; length];
            reader
                .read_exact(&mut frame)
                .await
                .map_err(|error| lost(&error))?;
            let staging = Arc::clone(&staging);
            let applied = spawn_blocking(move || {
                let mut staging = staging.lock().unwrap_or_else(PoisonError::into_inner);
                staging.open()?.apply(&frame, checksum)
            });
            let applied = applied.await.map_err(|error| internal(&error))?;
            is_whole = applied.map_err(differs)?;
        }
        match is_whole {
            true => Ok(()),
            false => Err(malformed("a difference has no end")),
        }
    }

    /// Puts all of them where the workload has them. Blocks.
    pub fn put(&self) -> Result<(), Failure> {
        for folder in self.lock().iter() {
            let staging = folder.staging.as_ref().ok_or_else(no_staging)?;
            let mut staging = staging.lock().unwrap_or_else(PoisonError::into_inner);
            let put = staging.open().and_then(|staging| match folder.ahead {
                true => Keep::check_put(staging, &folder.placed),
                false => Keep::put(staging, &folder.placed),
            });
            put.map_err(|error| failed(&error, ErrorCode::PathTaken))?;
            tracing::info!(migration = %self.id, path = %folder.placed.path.display(), "put");
        }
        Ok(())
    }

    /// The workload runs here: they are its own for good. Succeeds when that is done.
    pub fn settle(&self) {
        let all = std::mem::take(&mut *self.lock());
        for folder in all {
            let path = &folder.placed.path;
            let staging = folder.staging.as_ref().map(gone);
            let remembered = match staging {
                Some(Stage::Open(mut staging)) => self.shelf.keep.remember(path, &staging.record()),
                Some(Stage::Claimed { .. } | Stage::Ahead { .. } | Stage::Gone) | None => Ok(()),
            };
            if let Err(error) = remembered.and_then(|()| Keep::settle(&folder.placed)) {
                let failure = failed(&error, ErrorCode::NodeUnfit);
                tracing::warn!(migration = %self.id, "of a folder that came: {failure}");
            }
        }
        drop(fs::remove_file(self.shelf.note(self.id)));
    }

    /// Says that nothing of them is taken back, as somebody may use it yet.
    pub fn stay(&self) {
        for folder in self.lock().iter() {
            tracing::error!(migration = %self.id, path = %folder.placed.path.display(),
                "is left of a workload that could not be killed: remove it when that has ended");
        }
    }

    /// The workload does not run here: nothing of them stays. Blocks; succeeds when there is
    /// nothing.
    pub fn take_back(&self) -> Result<(), Failure> {
        let mut all = self.lock();
        let mut failures = Vec::new();
        all.retain(|folder| {
            if let Some(staging) = &folder.staging {
                // Whoever applies something ends first.
                drop(gone(staging));
            }
            let undone = Keep::undo(&folder.placed);
            undone.is_err_and(|error| {
                let path = folder.placed.path.display();
                let failure = failed(&error, ErrorCode::NodeUnfit);
                failures.push(format!("{path}: {}", failure.text()));
                true
            })
        });
        if !failures.is_empty() {
            let text = format!("folders that came are left: {}", failures.join("; "));
            return Err(Failure::new(ErrorCode::NodeUnfit, text));
        }
        drop(fs::remove_file(self.shelf.note(self.id)));
        Ok(())
    }
}

impl Folder {
    /// Where it is applied. A bundle is put where it is to be.
    fn stage(&self, bundle: Option<(&Bundle, BundleFolder)>) -> Result<Stage, Failure> {
        let (place, base) = (self.placed.place.clone(), self.kept);
        let Some((bundle, like)) = bundle else {
            return Ok(Stage::Claimed { place, base });
        };
        bundle.make_in(&Keep::tree(&place), like).map_err(|error| {
            let text = format!("the bundle {}: {error}", bundle.path.display());
            Failure::new(ErrorCode::NodeUnfit, text)
        })?;
        let put = Keep::put_ahead(&self.placed);
        put.map_err(|error| failed(&error, ErrorCode::PathTaken))?;
        let root = bundle.root();
        Ok(Stage::Ahead { root, base })
    }
}

/// The bundle that something that comes is of, if it is.
fn bundle_of<'a>(
    coming: &CopiedPath,
    root: Option<&'a RootPlace>,
) -> Option<(&'a Bundle, BundleFolder)> {
    match (coming.form, root) {
        (CopiedForm::Root(like), Some(RootPlace::Bundle(bundle))) => Some((bundle, like)),
        (CopiedForm::Folder | CopiedForm::Root(_) | CopiedForm::Layer, _) => None,
    }
}

/// Checks that what comes as a container's own is what it has here, once.
fn check_forms(copied: &[CopiedPath], root: Option<&RootPlace>) -> Result<(), Failure> {
    let own = copied.iter().map(|coming| coming.form);
    let own: Vec<_> = own.filter(|form| *form != CopiedForm::Folder).collect();
    match (&own[..], root) {
        ([], None) | ([CopiedForm::Root(_)], Some(RootPlace::Bundle(_))) => Ok(()),
        ([], Some(_)) => Err(malformed(
            "the container comes without its root file system",
        )),
        _ => Err(malformed(
            "what comes with a container is none of what it has here",
        )),
    }
}

impl Noted {
    fn of(folder: &Folder) -> Self {
        let placed = &folder.placed;
        Self {
            ahead: folder.ahead,
            path: placed.path.clone(),
            place: placed.place.clone(),
            inode: placed.inode,
            was_there: placed.was_there,
        }
    }
}

/// What it was until now.
fn gone(stage: &Arc<Mutex<Stage>>) -> Stage {
    let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut *stage, Stage::Gone)
}

fn no_staging() -> Failure {
    Failure::new(ErrorCode::Internal, "a folder that came is not there")
}

fn malformed(why: &str) -> Failure {
    Failure::new(ErrorCode::Malformed, why)
}

fn lost(error: &ReadStreamError) -> Failure {
    Failure::new(ErrorCode::PeerLost, chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where folders come to, and what is known of them.
    fn node() -> (tempfile::TempDir, Shelf) {
        let root = tempfile::tempdir().expect("a folder");
        let shelf = Shelf::new(root.path().join("state"));
        (root, shelf)
    }

    fn coming(path: &Path, bytes: u64, base: Option<Digest>) -> CopiedPath {
        CopiedPath {
            path: path.to_str().expect("UTF-8").to_owned(),
            form: CopiedForm::Folder,
            entries: 1,
            bytes,
            base,
        }
    }

    #[test]
    fn one_that_cannot_be_taken_back_leaves_no_other() {
        let (root, shelf) = node();
        let paths = ["one", "two"].map(|name| root.path().join(name));
        let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
        let folders = Folders::new(shelf.clone(), id);
        let all = paths.each_ref().map(|path| coming(path, 0, None));
        folders.prepare(&all, None).expect("room");
        let places: Vec<PathBuf> = {
            let all = folders.lock();
            all.iter()
                .map(|folder| folder.placed.place.clone())
                .collect()
        };
        for (path, place) in paths.iter().zip(&places) {
            fs::rename(place.join("tree"), path).expect("put");
        }
        let in_the_way = places[0].with_extension("undone");
        fs::create_dir(&in_the_way).expect("a folder");
        let failure = folders.take_back().expect_err("something is in the way");
        assert!(failure.text().contains("/one"), "{failure}");
        assert!(paths[0].exists() && !paths[1].exists());
        // Whoever starts again finds it.
        fs::remove_dir(&in_the_way).expect("removed");
        Folders::new(shelf.clone(), id)
            .take_back()
            .expect("taken back");
        assert!(!paths[0].exists() && !shelf.note(id).exists());
    }

    #[test]
    fn what_is_missing_of_a_folder_that_is_kept_must_have_room() {
        let (root, shelf) = node();
        let path = root.path().join("data");
        fs::create_dir(&path).expect("a folder");
        let digest = [7; 32];
        shelf.keep().set_aside(&path, &digest).expect("aside");
        let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
        let refused =
            Folders::new(shelf.clone(), id).prepare(&[coming(&path, 1 << 60, Some(digest))], None);
        let code = refused.map_err(|failure| failure.code());
        assert_eq!(code, Err(ErrorCode::DiskShort));
        let folders = Folders::new(shelf, id);
        folders
            .prepare(&[coming(&path, 0, Some(digest))], None)
            .expect("room");
        assert_eq!(folders.kept(), [0]);
    }
}
