//! The workload's file locks on storage that both nodes have: found in the freeze, let go between
//! the commit and `Go`, and taken back before a thaw if that comes of it.
//!
//! ```text
//! freeze ─ found; one that cannot be given away gives the freeze up, and is tried again: most
//!          programs have such locks for some milliseconds
//! tell ─── beside the images: `pageferry-locks`; and in the migration's folder: `locks`
//! let go ─ `locks` becomes `locks.let-go`, then each of them is let go
//! thaw ─── what is in `locks.let-go` is taken back first
//! ```
//!
//! Invariants: a lock is let go only when it is written down that it was, in a folder that lives as
//! long as the workload does; nothing is thawed as long as one of those is missing.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pageferry_cgroup::aside::Ready;
use pageferry_cgroup::freezer::Freezer;
use pageferry_inject::InjectError;
use pageferry_inject::locks::{self, FileLock, LockKind, Missing};
use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::shared::LOCKS_FILE;
use pageferry_sys::task::Status;
use tokio::task::block_in_place;

use super::sending::Sums;
use super::waits::Waits;
use crate::migration::text::{chain, internal};
use crate::runtime::detached;
use crate::runtime::locks::{Found, Locks, awaited, check_again};

/// The shortest pause after a freeze that met a lock that cannot move, and how much longer it may
/// be.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_SPREAD_MS: u64 = 180;

/// Locks that are to be let go, and that were.
const HELD: &str = "locks";
const LET_GO: &str = "locks.let-go";

/// The file locks of one workload.
#[derive(Debug)]
pub(super) struct FileLocks {
    locks: Locks,
    /// The migration's folder.
    directory: PathBuf,
    /// Those of the present freeze.
    held: Vec<FileLock>,
    /// Until they are let go, or the freeze is over.
    ready: Option<Ready>,
}

impl FileLocks {
    /// Those that are found by `locks`.
    pub(super) fn new(locks: Locks, directory: PathBuf) -> Self {
        Self {
            locks,
            directory,
            held: Vec::new(),
            ready: None,
        }
    }

    /// Finds those of the frozen tree. What comes of a freeze that meets one that cannot be given
    /// away; nothing if it meets none.
    pub(super) async fn freeze(
        &mut self,
        pids: &[i32],
        waits: &Waits,
    ) -> Result<Option<SourceEvent>, Failure> {
        let found = found(&self.locks, pids, waits).await?;
        self.held = found.held;
        let Some(unfit) = found.unfit.first() else {
            return Ok(None);
        };
        let pause = pause(RandomState::new().build_hasher().finish());
        tracing::info!(?pause, ?unfit, "the freeze is given up");
        Sums::default().given_up(unfit.refused(), pause).map(Some)
    }

    /// Whether nothing has come up since those of the frozen tree were found. Asks the kernel
    /// alone.
    pub(super) fn check_again(&self, pids: &[i32]) -> Result<(), Failure> {
        check_again(&self.held, pids)
    }

    /// Writes down what is to be let go, for the target beside the `images` and for this node.
    /// Answers with how many there are.
    pub(super) fn tell(&mut self, images: &Path, freezer: &Freezer) -> Result<u32, Failure> {
        let held = self.directory.join(HELD);
        if self.held.is_empty() {
            // That of a freeze before this one.
            return remove(&held).map(|()| 0);
        }
        let named = |lock: &FileLock| {
            let ids = Status::read(lock.pid)
                .map_err(|error| internal(&error))?
                .ids;
            let pid = ids.last().copied().unwrap_or(lock.pid);
            // What is of this node says nothing at the target.
            let (file, started) = (None, None);
            Ok(FileLock {
                pid,
                file,
                started,
                ..lock.clone()
            })
        };
        let named: Vec<FileLock> = self
            .held
            .iter()
            .map(named)
            .collect::<Result<_, Failure>>()?;
        let limit = |error: io::Error| {
            let text = format!("the file locks of the workload cannot be told: {error}");
            Failure::new(ErrorCode::Limit, text)
        };
        locks::write(&held, &self.held).map_err(limit)?;
        locks::write(&images.join(LOCKS_FILE), &named).map_err(limit)?;
        let calling = self.held.iter().find(|lock| needs_call(lock));
        self.ready = calling.map(|lock| freezer.keep_ready(lock.pid));
        u32::try_from(named.len()).map_err(|error| internal(&error))
    }

    /// What is to be let go when the commit is durable. Fails if somebody waits for one, who would
    /// have it before the target: none is let go then.
    pub(super) fn begin_letting_go(&mut self) -> Result<ToLetGo, Failure> {
        let (held, let_go) = (self.directory.join(HELD), self.directory.join(LET_GO));
        if read(&let_go)?.is_none()
            && let Some(list) = read(&held)?
        {
            // A copy of which a process has ended is not what comes back.
            if locks::ended(&list).is_empty() {
                check_unawaited(&list)?;
            }
            fs::rename(&held, &let_go).map_err(|error| internal(&error))?;
        }
        let locks = read(&let_go)?.unwrap_or_default();
        let ready = self.ready.take();
        Ok(ToLetGo { locks, ready })
    }

    /// Takes back what was let go, for the frozen tree in `freezer`. While another has one of them
    /// this fails, and the tree must stay frozen. Who has ended since is lost, which is answered.
    pub(super) async fn take_back(
        &mut self,
        freezer: &Freezer,
    ) -> Result<Option<Failure>, Failure> {
        block_in_place(|| self.ready = None);
        let let_go = self.directory.join(LET_GO);
        let Some(list) = read(&let_go)? else {
            return Ok(None);
        };
        let ended = if freezer.exists() && !freezer.is_empty() {
            let began = Instant::now();
            let (list, frozen) = (list.clone(), freezer.clone());
            let taking = detached::done("locks", move || locks::take_frozen(&list, &frozen));
            let taken = taking.await?;
            let taken = taken.map_err(|error| cannot("taken back", &error))?;
            if let Some(missing) = taken.missing {
                return Err(taken_by_another(&missing));
            }
            tracing::info!(took = ?began.elapsed(), "file locks are taken back");
            taken.ended
        } else {
            list.iter().map(|lock| lock.pid).collect()
        };
        remove(&let_go)?;
        Ok(lost(&ended, freezer))
    }
}

/// Locks of a committed workload that its target is to take.
#[derive(Debug)]
pub(super) struct ToLetGo {
    locks: Vec<FileLock>,
    ready: Option<Ready>,
}

impl ToLetGo {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.locks.is_empty()
    }

    /// Whether a process must let go of one itself, so that nobody may trace it.
    pub(super) fn needs_calls(&self) -> bool {
        self.locks.iter().any(needs_call)
    }

    /// Lets go of all of them, once CRIU has stepped back. The tree in `freezer` is frozen, stays
    /// so, and is read back so. What fails for a copy of which a process has ended is
    /// `workload-gone`.
    pub(super) async fn let_go(
        self,
        freezer: &Freezer,
        stepped_back: Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (began, count) = (Instant::now(), self.locks.len());
        let (frozen, list) = (freezer.clone(), self.locks.clone());
        let letting = detached::done("locks", move || {
            stepped_back?;
            // From here on threads stand aside.
            drop(self.ready);
            let ended = locks::let_go_frozen(&self.locks, &frozen);
            let ended = ended.map_err(|error| cannot("let go", &error))?;
            if frozen.is_frozen().map_err(|error| internal(&error))? {
                return Ok(ended);
            }
            let text = "the workload is not frozen any more after its file locks were let go";
            Err(Failure::new(ErrorCode::FreezeFailed, text))
        });
        let done = letting.await.and_then(|done| done);
        let ended = done.map_err(|failure| match lost(&locks::ended(&list), freezer) {
            Some(lost) => {
                let text = format!("{}; {}", failure.text(), lost.text());
                Failure::new(lost.code(), text)
            }
            None => failure,
        })?;
        if let Some(lost) = lost(&ended, freezer) {
            tracing::warn!(%lost, "what the target has is the only whole copy");
        }
        tracing::debug!(count, took = ?began.elapsed(), "file locks are let go");
        Ok(())
    }
}

/// Whether only its process can let go of it.
fn needs_call(lock: &FileLock) -> bool {
    lock.kind == LockKind::Posix
}

/// Deleted files are asked about at their storage, which may not answer.
async fn found(locks: &Locks, pids: &[i32], waits: &Waits) -> Result<Found, Failure> {
    if locks.is_empty() {
        return Ok(Found::default());
    }
    let (locks, pids) = (locks.clone(), pids.to_vec());
    let looking = detached::done("locks", move || locks.find(&pids, true));
    waits.on(Wait::Storage, looking).await?
}

/// A list in the migration's folder, if it is there.
fn read(path: &Path) -> Result<Option<Vec<FileLock>>, Failure> {
    match locks::read(path) {
        Ok(list) => Ok(Some(list)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::new(
            ErrorCode::Internal,
            format!("{}: {error}", path.display()),
        )),
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(internal(&error)),
        _ => Ok(()),
    }
}

/// What has ended of a frozen copy, if anything.
fn lost(ended: &[i32], freezer: &Freezer) -> Option<Failure> {
    let ended: BTreeSet<i32> = ended.iter().copied().collect();
    if ended.is_empty() {
        return None;
    }
    let listed: Vec<String> = ended.iter().map(i32::to_string).collect();
    let left = if freezer.is_empty() {
        "nothing of it is left"
    } else {
        "the others are left"
    };
    let text = format!(
        "of the frozen copy {} ended after its file locks were to be given away (process {}): \
         {left}",
        if ended.len() == 1 {
            "one process has"
        } else {
            "processes have"
        },
        listed.join(", "),
    );
    Some(Failure::new(ErrorCode::WorkloadGone, text))
}

/// Fails if somebody waits for one of `held`, all of whose processes are frozen.
fn check_unawaited(held: &[FileLock]) -> Result<(), Failure> {
    match awaited(held, &[], true) {
        Ok(None) => Ok(()),
        Ok(Some(awaited)) => Err(awaited.refused()),
        Err(error) => Err(internal(&error)),
    }
}

fn taken_by_another(missing: &Missing) -> Failure {
    let (lock, holder) = (&missing.lock, missing.holder);
    let holder = holder.map(|pid| format!("process {pid}"));
    let holder = holder.unwrap_or_else(|| "another".to_owned());
    Failure::new(
        ErrorCode::LockTaken,
        format!(
            "{holder} has what process {} of the workload had, a {lock}: the workload stays frozen \
             until it is given back, and then goes on by itself",
            lock.pid
        ),
    )
}

fn cannot(what: &str, error: &InjectError) -> Failure {
    let text = format!(
        "the file locks of the workload cannot be {what}: {}",
        chain(error)
    );
    Failure::new(ErrorCode::FreezeFailed, text)
}

/// How long the workload runs before the next try: random, so as not to meet it in step.
fn pause(random: u64) -> Duration {
    PAUSE_MIN + Duration::from_millis(random % PAUSE_SPREAD_MS)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use pageferry_cgroup::freezer::FreezerRoot;
    use pageferry_proto::wire::code::ErrorCode;
    use pageferry_trial::Trial;
    use tokio::sync::watch;

    use super::*;
    use crate::runtime::shared::Storage;
    use crate::runtime::shared::tests::fuse::{Fuse, Silent};

    /// The other process of these tests.
    #[test]
    fn workload() {
        pageferry_trial::obey();
    }

    /// A frozen process with a lock of each kind. Thawed and killed on drop.
    struct Frozen {
        trial: Trial,
        freezer: Freezer,
        database: PathBuf,
        folder: tempfile::TempDir,
        locks: FileLocks,
        waits: Waits,
        _cut: watch::Sender<bool>,
    }

    impl Frozen {
        fn start() -> Self {
            let mut trial = Trial::start("migration::source::locked::tests::workload");
            let folder = tempfile::tempdir().unwrap();
            let database = folder.path().join("shared/database");
            fs::create_dir_all(database.parent().unwrap()).unwrap();
            fs::create_dir_all(folder.path().join("images")).unwrap();
            trial.tell("threads 5");
            for lock in ["posix write 0 100", "ofd read 200 0", "flock write 0 0"] {
                trial.tell(&format!("lock-file {} {lock}", database.display()));
            }
            let pid = trial.pid();
            let root = FreezerRoot::detect().unwrap();
            let freezer = root.plan(&format!("locked-{pid}"));
            freezer.make().unwrap();
            freezer.adopt(|| Ok(vec![pid])).unwrap();
            freezer.freeze().unwrap();
            let shared = database.parent().unwrap().to_owned();
            let storage = Storage::find(&[shared]).unwrap();
            let found = Locks::on(&storage, None);
            let (cut, cancelled) = watch::channel(false);
            Self {
                locks: FileLocks::new(found, folder.path().to_owned()),
                trial,
                freezer,
                database,
                folder,
                waits: Waits::new(cancelled),
                _cut: cut,
            }
        }

        /// What another process could take: as words for the trial process.
        fn free(&self) -> Vec<&'static str> {
            let mut other = Trial::start("migration::source::locked::tests::workload");
            let mut free = Vec::new();
            for lock in ["posix read 0 100", "posix write 200 0", "flock read 0 0"] {
                let order = format!("lock-file {} {lock}", self.database.display());
                if other.try_tell(&order).is_ok() {
                    free.push(lock);
                }
            }
            free
        }

        async fn find(&mut self) {
            let pids = [self.trial.pid()];
            let unfit = self.locks.freeze(&pids, &self.waits).await.unwrap();
            assert!(unfit.is_none(), "{unfit:?}");
        }

        fn tell(&mut self) -> u32 {
            let images = self.folder.path().join("images");
            self.locks.tell(&images, &self.freezer).unwrap()
        }

        fn has(&self, file: &str) -> bool {
            self.folder.path().join(file).exists()
        }
    }

    impl Drop for Frozen {
        fn drop(&mut self) {
            let _ = self.freezer.kill(Duration::from_secs(10));
            let _ = self.freezer.remove();
        }
    }

    const ALL: [&str; 3] = ["posix read 0 100", "posix write 200 0", "flock read 0 0"];

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn locks_are_let_go_when_that_is_asked_for_and_taken_back_before_a_thaw() {
        let mut frozen = Frozen::start();
        frozen.find().await;
        for _ in 0..20 {
            assert_eq!(frozen.tell(), 3);
            assert_eq!(frozen.free(), [""; 0]);
            // Nothing was let go.
            frozen.locks.take_back(&frozen.freezer).await.unwrap();
            assert_eq!(frozen.tell(), 3);
            let begin_letting_go = frozen.locks.begin_letting_go().unwrap();
            assert!(begin_letting_go.needs_calls() && !begin_letting_go.is_empty());
            assert!(!frozen.has(HELD) && frozen.has(LET_GO));
            begin_letting_go
                .let_go(&frozen.freezer, Ok(()))
                .await
                .unwrap();
            assert_eq!(frozen.free(), ALL);
            // Asked for again, as after a restart.
            let again = FileLocks::new(Locks::default(), frozen.folder.path().to_owned());
            let mut again = std::mem::replace(&mut frozen.locks, again);
            let begin_letting_go = frozen.locks.begin_letting_go().unwrap();
            begin_letting_go
                .let_go(&frozen.freezer, Ok(()))
                .await
                .unwrap();
            frozen.locks.take_back(&frozen.freezer).await.unwrap();
            assert_eq!(frozen.free(), [""; 0]);
            assert!(!frozen.has(LET_GO) && frozen.freezer.is_frozen().unwrap());
            std::mem::swap(&mut frozen.locks, &mut again);
        }
        frozen.freezer.thaw().unwrap();
        assert_eq!(frozen.trial.tell("signals"), "0");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn while_another_has_a_lock_nothing_is_thawed() {
        let mut frozen = Frozen::start();
        frozen.find().await;
        frozen.tell();
        let begin_letting_go = frozen.locks.begin_letting_go().unwrap();
        begin_letting_go
            .let_go(&frozen.freezer, Ok(()))
            .await
            .unwrap();
        let mut other = Trial::start("migration::source::locked::tests::workload");
        let order = format!("lock-file {} posix read 50 1", frozen.database.display());
        let fd = other.tell(&order);
        for _ in 0..3 {
            let failure = frozen.locks.take_back(&frozen.freezer).await.unwrap_err();
            assert_eq!(failure.code(), ErrorCode::LockTaken);
            let who = format!("process {} has", other.pid());
            assert!(failure.text().starts_with(&who), "{failure}");
            assert!(frozen.has(LET_GO));
        }
        other.tell(&format!("close {fd}"));
        frozen.locks.take_back(&frozen.freezer).await.unwrap();
        assert_eq!(frozen.free(), [""; 0]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_copy_whose_process_died_has_let_go_and_comes_back_as_lost() {
        let mut frozen = Frozen::start();
        frozen.find().await;
        frozen.tell();
        let failed = || Err(Failure::new(ErrorCode::Traced, "somebody traces it"));
        let letting_go = frozen.locks.begin_letting_go().unwrap();
        let failure = letting_go.let_go(&frozen.freezer, failed()).await;
        assert_eq!(failure.unwrap_err().code(), ErrorCode::Traced);
        frozen.trial.signal(libc::SIGKILL);
        let letting_go = frozen.locks.begin_letting_go().unwrap();
        let failure = letting_go.let_go(&frozen.freezer, failed()).await;
        let failure = failure.unwrap_err();
        assert_eq!(failure.code(), ErrorCode::WorkloadGone, "{failure}");
        let letting_go = frozen.locks.begin_letting_go().unwrap();
        letting_go.let_go(&frozen.freezer, Ok(())).await.unwrap();
        assert_eq!(frozen.free(), ALL);
        let lost = frozen.locks.take_back(&frozen.freezer).await.unwrap();
        assert_eq!(lost.unwrap().code(), ErrorCode::WorkloadGone);
        assert!(!frozen.has(LET_GO));
        let lost = frozen.locks.take_back(&frozen.freezer).await.unwrap();
        assert_eq!(lost, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn for_whom_waits_since_the_freeze_nothing_is_let_go() {
        let mut frozen = Frozen::start();
        frozen.find().await;
        frozen.tell();
        let pids = [frozen.trial.pid()];
        assert_eq!(frozen.locks.check_again(&pids), Ok(()));
        let mut other = Trial::start("migration::source::locked::tests::workload");
        let order = format!(
            "lock-file {} flock write 0 0 wait",
            frozen.database.display()
        );
        other.tell_silently(&order);
        let deadline = Instant::now() + Duration::from_secs(20);
        while frozen.locks.check_again(&pids).is_ok() {
            assert!(Instant::now() < deadline, "nobody waits");
        }
        let failure = frozen.locks.begin_letting_go().unwrap_err();
        assert_eq!(failure.code(), ErrorCode::SharedLock);
        assert!(frozen.has(HELD) && !frozen.has(LET_GO));
        // A copy that is not whole does not come back for that.
        frozen.trial.signal(libc::SIGKILL);
        assert!(!frozen.locks.begin_letting_go().unwrap().is_empty());
        assert!(frozen.has(LET_GO));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_list_of_an_earlier_freeze_is_not_let_go() {
        let mut frozen = Frozen::start();
        frozen.find().await;
        assert_eq!(frozen.tell(), 3);
        frozen.freezer.thaw().unwrap();
        for fd in 0..64 {
            let target = fs::read_link(format!("/proc/{}/fd/{fd}", frozen.trial.pid()));
            if target.is_ok_and(|target| target == frozen.database) {
                frozen.trial.tell(&format!("close {fd}"));
            }
        }
        frozen.freezer.freeze().unwrap();
        frozen.find().await;
        assert_eq!(frozen.tell(), 0);
        assert!(frozen.locks.begin_letting_go().unwrap().is_empty());
        assert!(!frozen.has(HELD) && !frozen.has(LET_GO));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_server_that_does_not_answer_about_a_deleted_file_holds_no_freeze_that_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let fuse = Fuse::mount(folder.path());
        fuse.state().uncached = true;
        let storage = Storage::find(std::slice::from_ref(&fuse.path)).unwrap();
        let locks = Locks::on(&storage, None);
        let path = fuse.path.join("data");
        let _open = File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (cut, cancelled) = watch::channel(false);
        let waits = Waits::new(cancelled);
        let silent = Silent::begin(&fuse);
        let looking = tokio::spawn({
            let waits = waits.clone();
            let own = [std::process::id().cast_signed()];
            async move { found(&locks, &own, &waits).await }
        });
        let asked = async {
            while waits.list().is_empty() {
                tokio::task::yield_now().await;
            }
            cut.send_replace(true);
            looking.await.unwrap()
        };
        let looked = tokio::time::timeout(Duration::from_secs(20), asked).await;
        drop(silent);
        let failure = looked.expect("it is cut").unwrap_err();
        assert_eq!(failure.code(), ErrorCode::Aborted);
    }
}
