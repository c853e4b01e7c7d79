//! Folders that travel with the workload, at the source: one difference of each in every round, and
//! the last when the workload stands still.
//!
//! Invariants: a folder is where it was until the workload runs elsewhere; then it goes aside,
//! once,
//! and only if it is still the one that has travelled; a difference that was begun is sent to its
//! end, or nothing of the folder is sent any more.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pageferry_files::{Digest, Error, Keep, Report, Source, Suspects, may_leave};
use pageferry_proto::id::{MigrationId, Round};
use pageferry_proto::migration::policy::FilesReport;
use pageferry_proto::migration::source::Wait;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::{COPIED_PATHS_MAX, CopiedForm, CopiedPath, FilesHeader};
use pageferry_proto::wire::stream::StreamKind;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::failure::lost;
use super::waits::Waits;
use crate::migration::folders::failed;
use crate::migration::text::internal;
use crate::net::stream::DataSender;
use crate::runtime::oci::habits::Runtime;
use crate::runtime::pod;
use crate::runtime::rootfs::{self, RootFiles};
use crate::runtime::{copied, in_use};

/// How often it is looked whether all names of a layer's files are in it.
const LOOKS: usize = 3;

/// Frames that wait for the network: at most 4 MiB.
const FRAMES_MAX: usize = 8;

/// Folders that travel.
#[derive(Debug)]
pub(super) struct Folders {
    keep: Keep,
    all: Vec<Folder>,
    /// Where it is written down what the target has in the end.
    note: PathBuf,
    /// Nothing was sent yet.
    is_first: bool,
}

#[derive(Debug)]
struct Folder {
    /// What goes aside; none of a layer or a volume of a pod's, which its engine removes.
    gone: Option<Gone>,
    /// None of one that a dead daemon has sent.
    source: Option<Arc<Mutex<Source>>>,
    /// It goes aside with the bundle that it is in.
    is_bundles: bool,
    /// It begins with what the target says it has.
    has_base: bool,
}

/// What goes aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Gone {
    path: PathBuf,
    /// Device and number of its inode.
    inode: (u64, u64),
    /// What the target has in the end.
    digest: Option<Digest>,
}

/// Says which processes the workload has now.
pub(super) type Members = Arc<dyn Fn() -> Result<Vec<i32>, Failure> + Send + Sync>;

/// A difference that is being sent.
struct Course {
    members: Members,
    /// What goes aside with it, if it is in a bundle.
    bundle: Option<PathBuf>,
    frozen: bool,
}

impl Course {
    /// Files that the workload may store to, as of now: of one that runs all, if that cannot be
    /// told.
    fn suspects(&self) -> Result<Suspects, Failure> {
        let mut failed = Ok(());
        let suspects = Suspects::look(|| {
            let pids = (self.members)()
                .map_err(|failure| failed = Err(failure))
                .ok()?;
            let found = copied::suspects(&pids);
            found.map_err(|error| failed = Err(unreadable(&error))).ok()
        });
        match failed {
            Err(failure) if self.frozen => Err(failure),
            Err(failure) => {
                tracing::debug!("every file is compared: {failure}");
                Ok(suspects)
            }
            Ok(()) => Ok(suspects),
        }
    }
}

impl Folder {
    /// Opens what is at `root`, and goes aside with `path`; with it comes what the target is told.
    fn open(
        keep: &Keep,
        (path, root): (&Path, &Path),
        (name, form): (String, CopiedForm),
        pids: &[i32],
    ) -> Result<(Self, CopiedPath), Failure> {
        let unfit = |error: Error| failed(&error, ErrorCode::FolderUnfit);
        let record = keep.recall(path);
        let base = record.as_ref().map(pageferry_files::Record::digest);
        let source = Source::open(root, record).map_err(unfit)?;
        let (totals, files) = source.look().map_err(unfit)?;
        copied::check_writers(root, &files, pids)?;
        copied::check_mounted(root, pids)?;
        let metadata = fs::symlink_metadata(path).map_err(|error| internal(&error))?;
        let told = CopiedPath {
            path: name,
            form,
            entries: totals.entries,
            bytes: totals.bytes,
            base,
        };
        let folder = Self {
            gone: Some(Gone {
                path: path.to_owned(),
                inode: (metadata.dev(), metadata.ino()),
                digest: None,
            }),
            source: Some(Arc::new(Mutex::new(source))),
            is_bundles: path != root,
            has_base: base.is_some(),
        };
        Ok((folder, told))
    }

    /// The same of the volume `name` of a pod.
    fn open_volume(
        (path, name): (&Path, &str),
        pids: &[i32],
    ) -> Result<(Self, CopiedPath), Failure> {
        let unfit = |error: Error| failed(&error, ErrorCode::FolderUnfit);
        let source = Source::open_volume(path).map_err(unfit)?;
        let (totals, files) = source.look().map_err(unfit)?;
        copied::check_writers(path, &files, pids)?;
        copied::check_mounted(path, pids)?;
        let told = CopiedPath {
            path: name.to_owned(),
            form: CopiedForm::Volume,
            entries: totals.entries,
            bytes: totals.bytes,
            base: None,
        };
        Ok((Self::of_engine(source), told))
    }

    /// One that goes when its engine removes it.
    fn of_engine(source: Source) -> Self {
        Self {
            gone: None,
            source: Some(Arc::new(Mutex::new(source))),
            is_bundles: false,
            has_base: false,
        }
    }

    /// The same of the upper layer of an overlay.
    fn open_layer(
        (upper, overlay): (&Path, &Path),
        pids: &[i32],
    ) -> Result<(Self, CopiedPath), Failure> {
        let unfit = |error: Error| failed(&error, ErrorCode::FolderUnfit);
        let source = Source::open_layer(upper, overlay).map_err(unfit)?;
        let (totals, files) = source.look().map_err(unfit)?;
        // A name that comes or goes meanwhile is missing for a moment.
        let mut checked = source.check_names();
        for _ in 1..LOOKS {
            if checked.is_ok() {
                break;
            }
            checked = source.check_names();
        }
        checked.map_err(unfit)?;
        copied::check_writers(overlay, &files, pids)?;
        let told = CopiedPath {
            path: String::new(),
            form: CopiedForm::Layer,
            entries: totals.entries,
            bytes: totals.bytes,
            base: None,
        };
        Ok((Self::of_engine(source), told))
    }
}

impl Folders {
    /// Opens folders, for each tree at these paths, and a container's own; with them comes what the
    /// target is told, of each tree by itself. All processes are `pids`. Nothing is changed.
    pub(super) fn open(
        keep: Keep,
        id: MigrationId,
        trees: &[(Vec<PathBuf>, Option<RootFiles>)],
        pids: &[i32],
    ) -> Result<(Self, Vec<Vec<CopiedPath>>), Failure> {
        let count = trees
            .iter()
            .map(|(paths, root)| paths.len() + usize::from(root.is_some()));
        if COPIED_PATHS_MAX < count.sum() {
            let text = format!("more than {COPIED_PATHS_MAX} folders are to travel");
            return Err(Failure::new(ErrorCode::Limit, text));
        }
        let (mut all, mut told) = (Vec::new(), Vec::new());
        for (paths, root) in trees {
            let opened = open_all(&keep, paths, root.as_ref(), pids)?;
            let (folders, tells): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
            all.extend(folders);
            told.push(tells);
        }
        let folders = Self {
            note: note(&keep, id),
            keep,
            all,
            is_first: true,
        };
        Ok((folders, told))
    }

    /// Those that a dead daemon has left here. Without a note nothing was sent to its end.
    pub(super) fn recovered(keep: Keep, id: MigrationId) -> Self {
        let note = note(&keep, id);
        let noted = fs::read(&note).ok();
        let noted = noted.and_then(|bytes| serde_json::from_slice::<Vec<Gone>>(&bytes).ok());
        let all = noted.into_iter().flatten().map(|gone| Folder {
            gone: Some(gone),
            source: None,
            is_bundles: false,
            has_base: false,
        });
        Self {
            keep,
            all: all.collect(),
            note,
            is_first: false,
        }
    }

    /// The target has, of what it had when folders left there, these. To be told before anything is
    /// sent.
    pub(super) fn accepted(&mut self, kept: &[u32]) {
        if !self.is_first {
            return;
        }
        for (index, folder) in self.all.iter_mut().enumerate() {
            let is_kept = kept.iter().any(|kept| usize::try_from(*kept) == Ok(index));
            if folder.has_base && !is_kept {
                folder.has_base = false;
                if let Some(source) = &folder.source {
                    source
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .forget();
                }
            }
        }
    }

    /// Sends one difference of each folder.
    pub(super) async fn round(
        &mut self,
        data: &DataSender,
        round: Round,
        members: &Members,
        waits: &Waits,
    ) -> Result<FilesReport, Failure> {
        let first = std::mem::take(&mut self.is_first);
        let (sent, look) = self.send(data, round, members, false, waits).await?;
        Ok(FilesReport {
            streams: count(&sent)?,
            sent_bytes: bytes(&sent),
            // What was written while this round was sent is about what was while the last one was.
            left_bytes: if first { 0 } else { bytes(&sent) },
            look: if first { Duration::ZERO } else { look },
            first: first && !sent.is_empty(),
        })
    }

    /// Sends the last difference of each folder, of a workload that stands still, and writes down
    /// what the target has then. Answers with how many and how many bytes.
    pub(super) async fn last(
        &mut self,
        data: &DataSender,
        round: Round,
        members: &Members,
        waits: &Waits,
    ) -> Result<(u32, u64), Failure> {
        if self.all.is_empty() {
            return Ok((0, 0));
        }
        let (sent, look) = self.send(data, round, members, true, waits).await?;
        for (index, (folder, report)) in self.all.iter_mut().zip(&sent).enumerate() {
            let mut path = None;
            if let Some(gone) = &mut folder.gone {
                gone.digest = Some(report.digest);
                path = Some(gone.path.display());
            }
            let (path, compared) = (path.map(tracing::field::display), report.compared);
            tracing::info!(%round, index, path, bytes = report.bytes, compared, read = report.read,
                ?look, "last difference of a folder sent");
        }
        let gone = self.all.iter().filter_map(|folder| folder.gone.as_ref());
        let gone: Vec<&Gone> = gone.collect();
        let note = serde_json::to_vec(&gone).map_err(|error| internal(&error))?;
        let written = self.keep.write(&self.note, &note);
        written.map_err(|error| failed(&error, ErrorCode::NodeUnfit))?;
        Ok((count(&sent)?, bytes(&sent)))
    }

    async fn send(
        &mut self,
        data: &DataSender,
        round: Round,
        members: &Members,
        frozen: bool,
        waits: &Waits,
    ) -> Result<(Vec<Report>, Duration), Failure> {
        let (mut reports, mut look) = (Vec::new(), Duration::ZERO);
        for (index, folder) in self.all.iter().enumerate() {
            let bundle = folder.gone.as_ref().filter(|_| folder.is_bundles);
            let bundle = bundle.map(|gone| gone.path.clone());
            let Some(source) = &folder.source else {
                let text = "a folder was being sent when the daemon was restarted";
                return Err(Failure::new(ErrorCode::Restarted, text));
            };
            let folder = u32::try_from(index).map_err(|error| internal(&error))?;
            let header = FilesHeader { round, folder };
            let course = Course {
                members: Arc::clone(members),
                bundle,
                frozen,
            };
            let sending = send(Arc::clone(source), data, header, course);
            let (report, took) = waits.on(Wait::Files, sending).await??;
            tracing::debug!(%round, folder, ?report, ?took, "difference sent");
            reports.push(report);
            look += took;
        }
        Ok((reports, look))
    }

    /// The workload stays here.
    pub(super) fn stay(&self) {
        drop(fs::remove_file(&self.note));
    }

    /// Nothing is sent any more. An engine cannot unmount what is open here.
    pub(super) fn close(&mut self) {
        for folder in &mut self.all {
            folder.source = None;
        }
    }

    /// The workload runs elsewhere: its folders go aside. Once; what cannot is tried again by
    /// [`set_aside_left`].
    pub(super) fn set_aside(&mut self) {
        let all = std::mem::take(&mut self.all);
        let gone = all.into_iter().filter_map(|folder| folder.gone);
        let left = set_aside(&self.keep, gone);
        if !left.is_empty() {
            let written = serde_json::to_vec(&left).map_err(|error| internal(&error));
            let written = written.and_then(|bytes| {
                let written = self.keep.write(&self.note.with_extension(LEFT), &bytes);
                written.map_err(|error| failed(&error, ErrorCode::NodeUnfit))
            });
            if let Err(failure) = written {
                tracing::error!("it is not tried again to set folders aside: {failure}");
                return;
            }
        }
        drop(fs::remove_file(&self.note));
    }
}

/// Opens those of one tree.
fn open_all(
    keep: &Keep,
    paths: &[PathBuf],
    root: Option<&RootFiles>,
    pids: &[i32],
) -> Result<Vec<(Folder, CopiedPath)>, Failure> {
    let mut all = Vec::new();
    for path in paths {
        let Some(name) = path.to_str() else {
            let text = format!("the name of {} is not UTF-8", path.display());
            return Err(Failure::new(ErrorCode::FolderUnfit, text));
        };
        if let Some(volume) = pod::volume_name(path) {
            all.push(Folder::open_volume((path, volume), pids)?);
            continue;
        }
        let form = (name.to_owned(), CopiedForm::Folder);
        all.push(Folder::open(keep, (path, path), form, pids)?);
    }
    match root {
        Some(RootFiles::Bundle { bundle, root }) => {
            let unfit = |error: Error| failed(&error, ErrorCode::FolderUnfit);
            may_leave(bundle).map_err(unfit)?;
            check_unused(bundle, pids)?;
            let like = rootfs::folder_of(bundle).map_err(|error| internal(&error))?;
            let form = (String::new(), CopiedForm::Root(like));
            all.push(Folder::open(keep, (bundle, root), form, pids)?);
        }
        Some(RootFiles::Layer { upper, overlay }) => {
            all.push(Folder::open_layer((upper, overlay), pids)?);
        }
        None => {}
    }
    Ok(all)
}

/// What a note is called of folders that should have gone aside.
const LEFT: &str = "left";

/// Sets aside what could not be when its workload had left. To be called when a daemon starts.
pub fn set_aside_left(keep: &Keep) {
    let entries = fs::read_dir(keep.state()).into_iter().flatten().flatten();
    for note in entries.map(|entry| entry.path()) {
        if note.extension().is_none_or(|extension| extension != LEFT) {
            continue;
        }
        let noted = fs::read(&note).map_err(|error| internal(&error));
        let noted = noted.and_then(|bytes| {
            serde_json::from_slice::<Vec<Gone>>(&bytes).map_err(|error| internal(&error))
        });
        match noted.map(|noted| set_aside(keep, noted)) {
            Ok(left) if left.is_empty() => drop(fs::remove_file(&note)),
            // It is said which.
            Ok(_) => {}
            Err(failure) => {
                tracing::error!("{} says which folders have left: {failure}", note.display());
            }
        }
    }
}

/// Sets folders aside. Answers with those that are still where they were.
fn set_aside(keep: &Keep, all: impl IntoIterator<Item = Gone>) -> Vec<Gone> {
    let mut left = Vec::new();
    for gone in all {
        // Without one the target never had it, and somebody else decides.
        let Some(digest) = gone.digest else { continue };
        let path = gone.path.display();
        let is_here = || {
            let here = fs::symlink_metadata(&gone.path);
            here.is_ok_and(|here| (here.dev(), here.ino()) == gone.inode)
        };
        if !is_here() {
            tracing::warn!(%path, "is not what has travelled, and stays");
            continue;
        }
        match keep.set_aside(&gone.path, &digest) {
            Ok(()) => tracing::info!(%path, "set aside"),
            Err(error) => {
                let failure = failed(&error, ErrorCode::FolderUnfit);
                if is_here() {
                    tracing::error!(
                        "{path} has left with its workload and is still here: do not start \
                         anything from it; the next start of the daemon tries again: {failure}"
                    );
                    left.push(gone);
                } else {
                    tracing::warn!("{path} is set aside, but cannot be built upon: {failure}");
                }
            }
        }
    }
    left
}

/// Where it is written down what is to go aside when a migration is over. It outlives a reboot: a
/// folder that has left must not be found by whoever starts the workload again.
fn note(keep: &Keep, id: MigrationId) -> PathBuf {
    keep.state().join(format!("{id}.leaving"))
}

/// Finds and sends a difference; answers also with how long that took without the network.
async fn send(
    source: Arc<Mutex<Source>>,
    data: &DataSender,
    header: FilesHeader,
    course: Course,
) -> Result<(Report, Duration), Failure> {
    let (frames, mut found) = mpsc::channel::<Vec<u8>>(FRAMES_MAX);
    let finding = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        let mut waited = Duration::ZERO;
        let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
        let suspects = course.suspects()?;
        let mut sink = |frame: Vec<u8>| {
            let began = Instant::now();
            let taken = frames.blocking_send(frame);
            waited += began.elapsed();
            taken.map_err(|_| Error::Cut)
        };
        let report = source.difference(&suspects, course.frozen, &mut sink);
        drop(frames);
        let report = report.map_err(|error| failed(&error, ErrorCode::FolderUnfit))?;
        if !course.frozen {
            // Who has opened one since the look may have stored to it before it was read.
            source.doubt(&course.suspects()?);
            copied::check_mounted(source.path(), &(course.members)()?)?;
        }
        let pids = (course.members)()?;
        copied::check_writers(source.path(), &source.files(), &pids)?;
        if let Some(bundle) = course.bundle.as_ref().filter(|_| course.frozen) {
            check_unused(bundle, &pids)?;
        }
        Ok::<_, Failure>((report, began.elapsed().saturating_sub(waited)))
    });
    let mut writer = data
        .open(StreamKind::Files)
        .await
        .map_err(|error| lost(&error))?;
    let head = Bytes::copy_from_slice(&header.encode());
    writer.write(head).await.map_err(|error| lost(&error))?;
    while let Some(frame) = found.recv().await {
        writer
            .write(frame.into())
            .await
            .map_err(|error| lost(&error))?;
    }
    let sent = finding.await.map_err(|error| internal(&error))??;
    writer.finish();
    Ok(sent)
}

/// Refuses a bundle that not only its container uses.
fn check_unused(bundle: &Path, pids: &[i32]) -> Result<(), Failure> {
    let runtimes = Runtime::ALL.map(|runtime| Path::new(runtime.root()));
    in_use::check(bundle, pids, &runtimes)
}

fn unreadable(error: &io::Error) -> Failure {
    let text = format!("cannot tell which files the workload may write to: {error}");
    Failure::new(ErrorCode::NodeUnfit, text)
}

fn count(sent: &[Report]) -> Result<u32, Failure> {
    u32::try_from(sent.len()).map_err(|error| internal(&error))
}

fn bytes(sent: &[Report]) -> u64 {
    sent.iter().map(|report| report.bytes).sum()
}

#[cfg(test)]
#[path = "folders_tests.rs"]
mod tests;
