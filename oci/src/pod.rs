//! Containers of pods that are the destinations of migrations.
//!
//! Kubernetes has such a container created when it likes, by an id that nobody has foreseen. So the
//! program says first that it has come, and waits; whoever expects the pod finds it by the pod's
//! UID and the container's name in it, and writes the order by its id.
//!
//! ```text
//! create: came/UID/NAME, locked ──► order, by id ──► restore
//!           │                        refused/UID/NAME ──► failure
//!           └── nobody has said anything for long ──► failure
//! MARKS/UID/NAME: "going" ──► "ran": create is the runtime's
//!                     └── neither "ran" nor refused for long ──► failure
//! ```
//!
//! One that is ahead of others of its pod (`ahead.rs`) is at its place as all are; only its engine
//! hears earlier of it.
//!
//! Invariants: a pod that is the destination of a migration has its container created once by a
//! restore, and by the runtime only when that has run: never beside its source. The mark outlives a
//! reboot; that it is going is on disk before the container may run, and that it ran is said only
//! when it is known, so that one of which neither is known is created by nobody. A refusal stays
//! until a reboot, after which nobody says anything any more, which is a failure too.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::order::FOLDER;

/// Which container of which pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The pod's UID.
    pub pod: String,
    /// What the pod calls the container.
    pub container: String,
}

/// A container that is to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Came {
    /// The engine's name space.
    pub space: String,
    /// What the engine calls it.
    pub id: String,
    /// The folder of its bundle.
    pub bundle: PathBuf,
    /// The process that is to become its runtime.
    pub pid: i32,
}

/// How far a container of a pod has come that is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It is about to run, or has been: neither is known.
    Going,
    /// It has run: it is one like others from then on.
    Ran,
}

/// What is known at this node of containers of pods.
#[derive(Clone, Debug)]
pub struct Places {
    folder: PathBuf,
    marks: PathBuf,
}

/// Which containers have come here: outlives a reboot, as pods do.
const MARKS: &str = "/var/lib/pageferry/pods";

/// The annotation of a pod that is the destination of a migration.
const MIGRATION: &str = "pageferry.dev/migration";

/// Annotations of the engine.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// A configuration, as far as it says what is to be restored.
#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Place {
    /// The place of the container that is configured by `config`, a `config.json`, if its pod is
    /// the destination of a migration.
    ///
    /// # Errors
    /// What such a configuration lacks.
    pub fn of(config: &[u8]) -> Result<Option<Self>, String> {
        // One that is none the runtime refuses.
        let Ok(Annotated { annotations }) = serde_json::from_slice(config) else {
            return Ok(None);
        };
        let value = |name: &str| annotations.get(name).map_or("", String::as_str);
        if value(MIGRATION).is_empty() || value(CONTAINER_TYPE) != "container" {
            return Ok(None);
        }
        let named = |name: &str| match Path::new(value(name)).file_name()
            == Some(value(name).as_ref())
        {
            true => Ok(value(name).to_owned()),
            false => Err(format!(
                "the annotation {name} of a container that is to be restored is {:?}: containerd \
                 2.0 or newer says there what it is",
                value(name)
            )),
        };
        Ok(Some(Self {
            pod: named(SANDBOX_UID)?,
            container: named(CONTAINER_NAME)?,
        }))
    }

    fn below(&self, folder: &Path) -> PathBuf {
        folder.join(&self.pod).join(&self.container)
    }
}

impl Places {
    /// Those of this node.
    pub fn of_node() -> Self {
        Self::at(FOLDER.into(), MARKS.into())
    }

    /// Those of other folders: the second outlives a reboot.
    pub fn at(folder: PathBuf, marks: PathBuf) -> Self {
        Self { folder, marks }
    }

    /// Says that a container has come. It waits for as long as the file is open.
    ///
    /// # Errors
    /// When that cannot be said.
    pub fn come(&self, place: &Place, came: &Came) -> io::Result<File> {
        let path = place.below(&self.folder.join("came"));
        make_parent(&path)?;
        let new = path.with_extension(format!("{}.new", came.pid));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(came)?)?;
        file.lock()?;
        // Who looks for it finds it whole, and locked.
        fs::rename(&new, &path)?;
        Ok(file)
    }

    /// The container that has come to a place, and waits there.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn came(&self, place: &Place) -> io::Result<Option<Came>> {
        let path = place.below(&self.folder.join("came"));
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Ok(Some(serde_json::from_reader(&file)?)),
            // Who had come has gone again.
            Ok(()) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Nothing is restored at a place: `why` is what whoever comes there hears. Of one that has run
    /// nothing changes: it is one like others.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn refuse(&self, place: &Place, why: &str) -> io::Result<()> {
        if self.mark(place)? == Some(Mark::Ran) {
            return Ok(());
        }
        write_whole(&place.below(&self.folder.join("refused")), why.as_bytes())
    }

    /// Why nothing is restored at a place.
    pub fn refusal(&self, place: &Place) -> Option<String> {
        fs::read_to_string(place.below(&self.folder.join("refused"))).ok()
    }

    /// What is restored at a place is about to run: until it is known that it has, nothing is
    /// created there. Durable when this returns. Of one that ran before nothing changes.
    ///
    /// # Errors
    /// When it may be lost.
    pub fn mark_going(&self, place: &Place) -> io::Result<()> {
        match self.mark(place)? {
            Some(Mark::Ran) => Ok(()),
            Some(Mark::Going) | None => write_whole(&place.below(&self.marks), GOING),
        }
    }

    /// What was restored at a place has run: whatever comes there later is created anew. Durable
    /// when this returns.
    ///
    /// # Errors
    /// When it may be lost.
    pub fn mark_ran(&self, place: &Place) -> io::Result<()> {
        write_whole(&place.below(&self.marks), RAN)
    }

    /// What was going has not run after all. Of one that has run nothing changes.
    ///
    /// # Errors
    /// When it still says so.
    pub fn unmark(&self, place: &Place) -> io::Result<()> {
        if self.mark(place)? == Some(Mark::Ran) {
            return Ok(());
        }
        match fs::remove_file(place.below(&self.marks)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// How far what was restored at a place has come; none if nothing was about to run there.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn mark(&self, place: &Place) -> io::Result<Option<Mark>> {
        match fs::read(place.below(&self.marks)) {
            Ok(text) if text == RAN => Ok(Some(Mark::Ran)),
            // Whatever else it says is no proof.
            Ok(_) => Ok(Some(Mark::Going)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a mark says.
const GOING: &[u8] = b"going\n";
const RAN: &[u8] = b"ran\n";

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Writes a file that is there whole or not at all, and on disk.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    make_parent(path)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The names of folders that were just made, too.
    let above = path.ancestors().skip(1).take(SYNCED);
    let folders = above.filter(|folder| **folder != *OsStr::new(""));
    folders
        .into_iter()
        .try_for_each(|folder| File::open(folder)?.sync_all())
}

/// Folders above a file that may have been made for it.
const SYNCED: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            pod: "u-1".to_owned(),
            container: "web".to_owned(),
        }
    }

    fn config(changes: &[(&str, &str)]) -> Vec<u8> {
        let usual = [
            (MIGRATION, "0123"),
            (CONTAINER_TYPE, "container"),
            (CONTAINER_NAME, "web"),
            (SANDBOX_UID, "u-1"),
        ];
        let all: BTreeMap<_, _> = usual.iter().chain(changes).copied().collect();
        serde_json::json!({"annotations": all})
            .to_string()
            .into_bytes()
    }

    #[test]
    fn a_container_has_a_place_if_its_pod_is_a_destination() {
        assert_eq!(Place::of(&config(&[])), Ok(Some(place())));
        for other in [
            &config(&[(CONTAINER_TYPE, "sandbox")])[..],
            &config(&[(MIGRATION, "")]),
            b"{}",
            b"no json",
        ] {
            assert_eq!(Place::of(other), Ok(None));
        }
        for bad in ["", "..", "a/b", "/"] {
            let error = Place::of(&config(&[(SANDBOX_UID, bad)])).unwrap_err();
            assert!(error.contains(SANDBOX_UID), "{error}");
        }
    }

    #[test]
    fn who_has_come_is_there_for_as_long_as_he_waits() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path().join("run"), folder.path().join("var"));
        let came = |pid| Came {
            space: "k8s.io".to_owned(),
            id: "0a".to_owned(),
            bundle: "/b".into(),
            pid,
        };
        assert_eq!(places.came(&place()).unwrap(), None);
        let first = places.come(&place(), &came(7)).unwrap();
        assert_eq!(places.came(&place()).unwrap(), Some(came(7)));
        // Kubernetes tries again.
        let second = places.come(&place(), &came(8)).unwrap();
        drop(first);
        assert_eq!(places.came(&place()).unwrap(), Some(came(8)));
        drop(second);
        assert_eq!(places.came(&place()).unwrap(), None);
    }

    #[test]
    fn what_has_run_or_was_refused_is_known_by_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path().join("run"), folder.path().join("var"));
        let mark = || places.mark(&place()).unwrap();
        assert!(mark().is_none() && places.refusal(&place()).is_none());
        places.mark_going(&place()).unwrap();
        places.mark_going(&place()).unwrap();
        assert_eq!(mark(), Some(Mark::Going));
        places.mark_ran(&place()).unwrap();
        // A daemon that was started again lets it go once more.
        places.mark_going(&place()).unwrap();
        assert_eq!(mark(), Some(Mark::Ran));
        // Nor does another migration change that, which was to come there and was given up.
        places.refuse(&place(), "it was given up").unwrap();
        places.unmark(&place()).unwrap();
        assert_eq!((mark(), places.refusal(&place())), (Some(Mark::Ran), None));
        fs::write(place().below(&places.marks), "").unwrap();
        assert_eq!(mark(), Some(Mark::Going));
        places.unmark(&place()).unwrap();
        places.unmark(&place()).unwrap();
        assert_eq!(mark(), None);
        places.refuse(&place(), "the source goes on").unwrap();
        assert_eq!(places.refusal(&place()).unwrap(), "the source goes on");
    }
}
