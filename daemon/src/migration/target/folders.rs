//! Folders that come with a workload: applied beside where they are to be, put there before it is
//! restored, and taken back if it does not run here. The bundle of a container is put there ahead,
//! since its runtime is started long before the restore, and filled where it is; what has been
//! written over an image comes to the overlay that the engine has mounted by then, and goes with
//! that.
//!
//! Invariants: what is made is written down before, where a reboot does not reach it; nothing is
//! put that is not proven; what was put is taken back by its inode, so that nothing else ever is.
//! From before the workload may run no inode is written down any more: whoever starts again takes
//! nothing back that may be in use, whatever becomes of the note.
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_files::{Digest, Error, Identity, Keep, Placed, Staging, Totals, admit, may_come};
use pageferry_proto::id::MigrationId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;
use pageferry_proto::wire::copied::{BundleFolder, CopiedForm, FilesHeader};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::own::{Own, bundle_of, check_forms};
use super::stage::{Stage, found, gone, stage};
use super::volumes::Volumes;
use crate::migration::folders::failed;
use crate::migration::text::{chain, internal};
use crate::net::stream::{ReadStreamError, StreamReader};
use crate::runtime::rootfs::open_like;

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
    volumes: Volumes,
}

/// The volume of a pod's that something comes to, if it does, and what it comes through.
type Theirs = (Option<String>, Arc<Mutex<Stage>>);

#[derive(Clone, Debug)]
struct Folder {
    /// With which member it comes.
    member: usize,
    /// None of what comes to something that an engine has made.
    placed: Option<Placed>,
    /// The volume of its pod's that it comes to.
    volume: Option<String>,
    /// It is put before anything comes, and filled where it is.
    ahead: bool,
    /// What a bundle is made like when it has all.
    like: Option<BundleFolder>,
    /// The workload may run, or have run.
    may_run: bool,
    /// What this node has kept of it, and begins with.
    kept: Option<Digest>,
    /// None of one that a dead daemon has begun.
    staging: Option<Arc<Mutex<Stage>>>,
}

/// As it is written down.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    path: PathBuf,
    place: PathBuf,
    inode: Option<Identity>,
    was_there: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stand_in: Option<Identity>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    ahead: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    may_run: bool,
}

/// What a note of volumes is called.
const VOLUMES: &str = "volumes";

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
                .is_some_and(|extension| extension == "coming" || extension == VOLUMES);
            let Some(id) = name.filter(|id| is_note && !is_known(*id)) else {
                continue;
            };
            let left = Folders::new(self.clone(), id);
            for folder in left.lock().iter_mut().filter(|folder| !folder.ahead) {
                if let Some(placed) = &mut folder.placed {
                    placed.inode = None;
                }
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
            member: 0,
            placed: Some(Placed {
                path: noted.path,
                place: noted.place,
                inode: noted.inode,
                was_there: noted.was_there,
                stand_in: noted.stand_in,
            }),
            volume: None,
            ahead: noted.ahead,
            like: None,
            may_run: noted.may_run,
            kept: None,
            staging: None,
        };
        let all = noted.into_iter().flatten().map(folder).collect();
        let volumes = shelf.state.join(format!("{id}.{VOLUMES}"));
        Self {
            volumes: Volumes::new(shelf.keep(), volumes),
            shelf,
            id,
            all: Arc::new(Mutex::new(all)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Folder>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_down(&self) -> Result<(), Failure> {
        let noted: Vec<Noted> = self.lock().iter().filter_map(Noted::of).collect();
        let note = self.shelf.note(self.id);
        let bytes = serde_json::to_vec(&noted).map_err(|error| internal(&error))?;
        let written = self.shelf.keep.write(&note, &bytes);
        written.map_err(|error| failed(&error, ErrorCode::NodeUnfit))
    }

    /// Makes a place for each that comes with these members, in their order. Where somebody looks
    /// for them before they come, an empty folder is there from now on. Blocks.
    pub fn prepare(&self, members: &[Own<'_>]) -> Result<(), Failure> {
        members
            .iter()
            .try_for_each(|own| check_forms(own.copied, own.root))?;
        if members.iter().all(|own| own.copied.is_empty()) {
            return Ok(());
        }
        self.plan(members)?;
        self.write_down()?;
        let taken = |error: Error| failed(&error, ErrorCode::PathTaken);
        let keep = &self.shelf.keep;
        for folder in self.lock().iter_mut() {
            if let Some(placed) = &mut folder.placed {
                let claimed = keep.claim(&placed.path, &placed.place, folder.kept.is_some());
                placed.inode = Some(claimed.map_err(taken)?);
                // An empty folder of somebody's stays his until something is put over it.
                let is_free = !placed.was_there || self.volumes.has(&placed.path);
                let is_looked_for = members[folder.member].are_looked_for;
                if is_looked_for && !folder.ahead && is_free {
                    placed.stand_in = Some(Keep::stand_in(placed).map_err(taken)?);
                }
            }
        }
        self.write_down()?;
        for placed in self
            .lock()
            .iter()
            .filter_map(|folder| folder.placed.as_ref())
        {
            Keep::put_stand_in(placed).map_err(taken)?;
        }
        let coming = members.iter().flat_map(Own::each);
        for (folder, (coming, root)) in self.lock().iter_mut().zip(coming) {
            if let Some(placed) = &folder.placed {
                let bundle = bundle_of(coming, root).map(|(bundle, _)| bundle);
                let stage = stage((placed, folder.kept), bundle)?;
                folder.staging = Some(Arc::new(Mutex::new(stage)));
            }
        }
        Ok(())
    }

    /// Has volumes made that some of them are. Blocks.
    pub fn make_volumes(&self, volumes: &[VolumeDescription]) -> Result<(), Failure> {
        self.volumes.make(volumes)
    }

    /// Says where each of them comes to, if it may come there.
    fn plan(&self, members: &[Own<'_>]) -> Result<(), Failure> {
        let taken = |error: Error| failed(&error, ErrorCode::PathTaken);
        let mut needed = std::collections::BTreeMap::<PathBuf, Totals>::new();
        let each = members.iter().enumerate();
        let each = each.flat_map(|(member, own)| own.each().map(move |one| (member, one)));
        for (index, (member, (coming, root))) in each.enumerate() {
            let offered = Totals {
                entries: coming.entries,
                bytes: coming.bytes,
            };
            if matches!(coming.form, CopiedForm::Layer | CopiedForm::Volume) {
                let is_volume = coming.form == CopiedForm::Volume;
                self.lock().push(Folder {
                    member,
                    placed: None,
                    volume: is_volume.then(|| coming.path.clone()),
                    ahead: false,
                    like: None,
                    may_run: false,
                    kept: None,
                    staging: Some(Arc::new(Mutex::new(Stage::Awaited(offered)))),
                });
                continue;
            }
            let bundle = bundle_of(coming, root);
            let path = bundle.map_or(Path::new(&coming.path), |(bundle, _)| &bundle.path);
            let was_there = may_come(path).map_err(taken)?;
            let keep = &self.shelf.keep;
            let there = coming.base.and_then(|base| keep.has(path, &base));
            let kept = coming.base.filter(|_| there.is_some());
            let missing = offered.without(there.unwrap_or_default());
            // Several may come to one folder.
            let parent = path.parent().unwrap_or(path).to_owned();
            let totals = needed.entry(parent).or_default();
            totals.entries = totals.entries.saturating_add(missing.entries);
            totals.bytes = totals.bytes.saturating_add(missing.bytes);
            admit(path, totals).map_err(taken)?;
            self.lock().push(Folder {
                member,
                placed: Some(Placed {
                    path: path.to_owned(),
                    place: Keep::place(path, &self.id.to_string(), index),
                    inode: None,
                    was_there,
                    stand_in: None,
                }),
                volume: None,
                ahead: bundle.is_some(),
                like: bundle.map(|(_, like)| like),
                may_run: false,
                kept,
                staging: None,
            });
        }
        Ok(())
    }

    /// The overlay is mounted that a layer of a member comes to. Before anything comes.
    pub fn found(&self, member: usize, overlay: &Path) -> Result<(), Failure> {
        let layers = self.of_engine(|folder| folder.member == member).into_iter();
        let mut layers = layers.filter(|(volume, _)| volume.is_none());
        layers.try_for_each(|(_, stage)| found(&stage, Stage::Overlay(overlay.to_owned())))
    }

    /// The volumes are there that some of a member come to: each where `place` says. Before
    /// anything comes.
    pub fn found_volumes(
        &self,
        member: usize,
        place: impl Fn(&str) -> Result<PathBuf, Failure>,
    ) -> Result<(), Failure> {
        for (volume, stage) in self.of_engine(|folder| folder.member == member) {
            if let Some(volume) = volume {
                let (root, base) = (place(&volume)?, None);
                found(&stage, Stage::Ahead { root, base })?;
            }
        }
        Ok(())
    }

    /// The workload is restored: checks that what an engine has made is what has what came. A
    /// runtime that had died was started again, by an engine that makes another one then.
    pub fn check_restored(&self) -> Result<(), Failure> {
        for (_, stage) in self.of_engine(|_| true) {
            let Stage::Proven(shown) = gone(&stage) else {
                return Err(no_staging());
            };
            let is_there = shown.is_there();
            if !is_there.map_err(|error| failed(&error, ErrorCode::NodeUnfit))? {
                let text = "the engine has made the container anew since its files came";
                return Err(Failure::new(ErrorCode::RuntimeFailed, text));
            }
        }
        Ok(())
    }

    /// Closes what is open of what an engine has made, and could not unmount.
    pub fn close(&self) {
        for (_, stage) in self.of_engine(|_| true) {
            drop(gone(&stage));
        }
    }

    /// Those that come to something that an engine has made, of the folders that are `wanted`: to a
    /// volume, or else to an overlay.
    fn of_engine(&self, wanted: impl Fn(&Folder) -> bool) -> Vec<Theirs> {
        let all = self.lock();
        let theirs = all
            .iter()
            .filter(|folder| folder.placed.is_none() && wanted(folder));
        let theirs = theirs.filter_map(|folder| {
            Some((folder.volume.clone(), Arc::clone(folder.staging.as_ref()?)))
        });
        theirs.collect()
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
        let all = self.lock().clone();
        for folder in &all {
            let staging = folder.staging.as_ref().ok_or_else(no_staging)?;
            let mut stage = staging.lock().unwrap_or_else(PoisonError::into_inner);
            let put = stage.open().and_then(|staging| match &folder.placed {
                Some(placed) if folder.ahead => Keep::check_put(staging, placed),
                Some(placed) => Keep::put(staging, placed),
                None => staging.check_proven(),
            });
            // An engine that undoes a restore could not unmount what is open here.
            let put = put.and_then(|()| match &folder.placed {
                Some(_) => Ok(()),
                None => stage.prove(),
            });
            put.map_err(|error| failed(&error, ErrorCode::PathTaken))?;
            if let (Some(placed), Some(like)) = (&folder.placed, folder.like) {
                open_like(&placed.path, like).map_err(|error| internal(&error))?;
            }
            if let Some(placed) = &folder.placed {
                tracing::info!(migration = %self.id, path = %placed.path.display(), "put");
            }
        }
        Ok(())
    }

    /// The workload runs here: they are its own for good. Succeeds when that is done.
    pub fn settle(&self) {
        let all = std::mem::take(&mut *self.lock());
        for folder in all {
            let staging = folder.staging.as_ref().map(gone);
            let Some(placed) = &folder.placed else {
                continue;
            };
            let keep = &self.shelf.keep;
            let remembered = match staging {
                Some(Stage::Open(mut staging)) => keep.remember(&placed.path, &staging.record()),
                _ => Ok(()),
            };
            if let Err(error) = remembered.and_then(|()| Keep::settle(placed)) {
                let failure = failed(&error, ErrorCode::NodeUnfit);
                tracing::warn!(migration = %self.id, "of a folder that came: {failure}");
            }
        }
        self.forget();
        self.volumes.settle();
    }

    /// The workload may run from now on: whoever finds them written down takes nothing back of
    /// them. Durable if it succeeds. Who has put them knows their inodes yet, and takes them back
    /// if nothing has run.
    pub fn hand_over(&self) -> Result<(), Failure> {
        self.volumes.hand_over()?;
        let mut is_written = true;
        for folder in self.lock().iter_mut() {
            let has_inode = folder.placed.as_ref().is_some_and(|at| at.inode.is_some());
            is_written &= folder.may_run || !has_inode;
            folder.may_run = true;
        }
        if is_written {
            return Ok(());
        }
        let written = self.write_down();
        if written.is_err() {
            for folder in self.lock().iter_mut() {
                folder.may_run = false;
            }
        }
        written
    }

    /// Nothing of them is taken back, as `why` says; also not by who starts again.
    pub fn stay(&self, why: &str) {
        if let Err(failure) = self.hand_over() {
            tracing::error!(migration = %self.id, "a note of folders is not changed: {failure}");
        }
        for placed in self
            .lock()
            .iter()
            .filter_map(|folder| folder.placed.as_ref())
        {
            tracing::error!(migration = %self.id, path = %placed.path.display(),
                "is left {why}: remove it when it is certain that nobody needs it");
        }
    }

    fn forget(&self) {
        if let Err(error) = self.shelf.keep.forget(&self.shelf.note(self.id)) {
            let failure = failed(&error, ErrorCode::NodeUnfit);
            tracing::warn!(migration = %self.id, "of a note of folders: {failure}");
        }
    }

    /// The workload does not run here: nothing of them stays. Blocks; succeeds when there is
    /// nothing.
    pub fn take_back(&self) -> Result<(), Failure> {
        // Whoever says that they stay does not wait for this.
        let mut all = self.lock().clone();
        let mut failures = Vec::new();
        all.retain(|folder| {
            if let Some(staging) = &folder.staging {
                // Whoever applies something ends first.
                drop(gone(staging));
            }
            let Some(placed) = &folder.placed else {
                return false;
            };
            if folder.may_run && placed.inode.is_none() && placed.path.exists() {
                tracing::error!(migration = %self.id, path = %placed.path.display(),
                    "is left of a workload that did not run here: which folder was its own was \
                     not written down any more; remove it");
            }
            let undone = Keep::undo(placed);
            undone.is_err_and(|error| {
                let path = placed.path.display();
                let failure = failed(&error, ErrorCode::NodeUnfit);
                failures.push(format!("{path}: {}", failure.text()));
                true
            })
        });
        *self.lock() = all;
        if !failures.is_empty() {
            let text = format!("folders that came are left: {}", failures.join("; "));
            return Err(Failure::new(ErrorCode::NodeUnfit, text));
        }
        self.forget();
        self.volumes.take_back()
    }
}

impl Noted {
    fn of(folder: &Folder) -> Option<Self> {
        let placed = folder.placed.as_ref()?;
        Some(Self {
            ahead: folder.ahead,
            may_run: folder.may_run,
            path: placed.path.clone(),
            place: placed.place.clone(),
            inode: placed.inode.filter(|_| !folder.may_run),
            was_there: placed.was_there,
            stand_in: placed.stand_in.filter(|_| !folder.may_run),
        })
    }
}

fn no_staging() -> Failure {
    Failure::new(ErrorCode::Internal, "a folder that came is not there")
}

pub(super) fn malformed(why: &str) -> Failure {
    Failure::new(ErrorCode::Malformed, why)
}

fn lost(error: &ReadStreamError) -> Failure {
    Failure::new(ErrorCode::PeerLost, chain(error))
}

#[cfg(test)]
#[path = "folders_tests.rs"]
mod tests;
