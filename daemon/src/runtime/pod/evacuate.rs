//! The end of a pod that runs elsewhere: who is in its cgroup, which stays frozen, is killed and
//! taken out of it, to where a killed task dies; until the kubelet has removed the cgroup.
//!
//! Until then the kubelet knows of a pod, and may have its container begun anew: the `runc init` of
//! that is frozen as soon as it is in the cgroup, and killed here. The process that keeps the
//! sandbox is taken out alive: its shim would not see it end otherwise, and stay.
//!
//! Invariants: nothing is thawed in the pod's cgroup; what is left to do is noted, on disk, before
//! it is begun, and goes on in the next life of the daemon.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::identity::FolderId;
use serde::{Deserialize, Serialize};

use crate::runtime::identity::{self, Identity};

/// Where it is noted what is left to do.
const NOTES: &str = "/var/lib/pageferry/evacuations";

/// How often it is looked who is there: soon enough that nobody starts without need.
const POLL: Duration = Duration::from_millis(50);

/// How often later on.
const POLL_LATER: Duration = Duration::from_secs(1);

/// Until when that is.
const LATER: Duration = Duration::from_secs(60);

/// A pod that is to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evacuation {
    /// Its UID, which is the name of the note.
    pub uid: String,
    /// Its cgroup, with what that is known by, and in which boot.
    pub cgroup: PathBuf,
    /// That.
    pub id: FolderId,
    /// That.
    pub boot: String,
    /// The cgroup to which they are taken, which is thawed.
    pub place: PathBuf,
    /// The process that keeps its sandbox, and when that was started; if it is known.
    pub keeper: Option<(i32, u64)>,
}

impl Evacuation {
    /// Of the pod `uid` with this cgroup.
    pub fn of(
        (uid, keeper): (&str, Option<(i32, u64)>),
        cgroup: &Freezer,
        freezers: &FreezerRoot,
    ) -> io::Result<Self> {
        Ok(Self {
            uid: uid.to_owned(),
            cgroup: cgroup.path().to_owned(),
            id: FolderId::of(cgroup.path())?,
            boot: identity::boot()?,
            place: freezers.plan(&format!("ended-{uid}")).path().to_owned(),
            keeper,
        })
    }

    /// Notes it, durably.
    pub fn note(&self) -> io::Result<()> {
        let folder = Path::new(NOTES);
        fs::create_dir_all(folder)?;
        let (new, path) = (folder.join(format!("{}.new", self.uid)), self.noted());
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(new, path)?;
        File::open(folder)?.sync_all()
    }

    fn noted(&self) -> PathBuf {
        Path::new(NOTES).join(&self.uid)
    }

    /// Goes on, in a thread of its own, until the pod's cgroup is gone. Each container of the pod
    /// asks for it, and there is one.
    pub fn go_on(self) {
        if !ending().insert(self.uid.clone()) {
            return;
        }
        let named = thread::Builder::new().name("evacuate".to_owned());
        let uid = self.uid.clone();
        let spawned = named.spawn(move || {
            let began = Instant::now();
            while self.is_there() {
                if let Err(error) = self.once() {
                    tracing::warn!(pod = self.uid, %error, "a pod that runs elsewhere");
                }
                let late = LATER < began.elapsed();
                thread::sleep(if late { POLL_LATER } else { POLL });
            }
            self.end();
            ending().remove(&self.uid);
        });
        if let Err(error) = spawned {
            ending().remove(&uid);
            tracing::error!(pod = uid, %error, "a pod that runs elsewhere is ended only when the \
                daemon is started again");
        }
    }

    fn is_there(&self) -> bool {
        identity::boot().is_ok_and(|boot| boot == self.boot) && self.id.is_at(&self.cgroup)
    }

    /// Kills who is there, and takes all out.
    pub fn once(&self) -> io::Result<()> {
        // Nothing else of ours may have been made.
        fs::create_dir_all(&self.place)?;
        let place = Freezer::at(self.place.clone());
        place.thaw().map_err(io::Error::other)?;
        for group in below(&self.cgroup)? {
            let held = Freezer::at(group.clone());
            if group != self.cgroup {
                // Frozen by the pod's all the same: `runc delete` fails for one that is by itself.
                held.thaw().map_err(io::Error::other)?;
            }
            for pid in held.processes().unwrap_or_default() {
                // One of another pid namespace reads as 0, which would mean ourselves.
                if pid <= 0 {
                    continue;
                }
                if !self.is_keeper(pid) {
                    // One that is gone already is what is wanted.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
                match fs::write(place.procs_file(), pid.to_string()) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                    Ok(()) | Err(_) => {}
                }
            }
        }
        Ok(())
    }

    fn is_keeper(&self, pid: i32) -> bool {
        let started = || Identity::of(pid).ok().map(|now| now.started);
        self.keeper
            .is_some_and(|(keeper, then)| keeper == pid && started() == Some(then))
    }

    fn end(&self) {
        tracing::info!(
            pod = self.uid,
            "nothing is left of a pod that runs elsewhere"
        );
        let removed = Freezer::at(self.place.clone()).remove();
        if let Err(error) = removed {
            tracing::warn!(pod = self.uid, %error, "a cgroup is left");
        }
        if let Err(error) = fs::remove_file(self.noted()) {
            tracing::warn!(pod = self.uid, %error, "it is looked for once more at the next start");
        }
    }
}

/// Pods that are being ended by this process.
fn ending() -> MutexGuard<'static, BTreeSet<String>> {
    static ENDING: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    ENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Goes on with what a daemon before this one has begun.
pub fn go_on() {
    for entry in fs::read_dir(NOTES).into_iter().flatten().flatten() {
        if entry.path().extension().is_some() {
            continue;
        }
        let read = fs::read(entry.path()).and_then(|text| Ok(serde_json::from_slice(&text)?));
        match read {
            Ok(evacuation) => Evacuation::go_on(evacuation),
            Err(error) => tracing::error!(note = %entry.path().display(), %error,
                "a pod that runs elsewhere may not be ended here"),
        }
    }
}

/// A cgroup, and those below it.
fn below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(folder) = all.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        let folders = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
        all.extend(folders.map(|entry| entry.path()));
    }
    Ok(all)
}
