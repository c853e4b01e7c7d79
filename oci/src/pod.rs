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
//! RESTORED/UID/NAME: create is the runtime's
//! ```
//!
//! Invariants: a pod that is the destination of a migration has its container created once by a
//! restore, and by the runtime only after that: never beside its source. The mark of that outlives
//! a reboot, and is on disk before the container runs. A refusal stays until a reboot, after which
//! nobody says anything any more, which is a failure too.

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

/// What is known at this node of containers of pods.
#[derive(Clone, Debug)]
pub struct Places {
    folder: PathBuf,
    marks: PathBuf,
}

/// Which containers were restored: outlives a reboot, as pods do.
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

    /// Nothing is restored at a place: `why` is what whoever comes there hears.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn refuse(&self, place: &Place, why: &str) -> io::Result<()> {
        write_whole(&place.below(&self.folder.join("refused")), why.as_bytes())
    }

    /// Why nothing is restored at a place.
    pub fn refusal(&self, place: &Place) -> Option<String> {
        fs::read_to_string(place.below(&self.folder.join("refused"))).ok()
    }

    /// What is restored at a place is about to run: whatever comes there later is created anew.
    /// Durable when this returns.
    ///
    /// # Errors
    /// When it may be lost.
    pub fn mark_restored(&self, place: &Place) -> io::Result<()> {
        write_whole(&place.below(&self.marks), b"")
    }

    /// It has not run after all.
    ///
    /// # Errors
    /// When it still says so.
    pub fn unmark(&self, place: &Place) -> io::Result<()> {
        match fs::remove_file(place.below(&self.marks)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether something was restored at a place, and has run.
    pub fn is_restored(&self, place: &Place) -> bool {
        place.below(&self.marks).exists()
    }
}

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
    fn what_was_restored_or_refused_is_known_by_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path().join("run"), folder.path().join("var"));
        assert!(!places.is_restored(&place()) && places.refusal(&place()).is_none());
        places.mark_restored(&place()).unwrap();
        places.mark_restored(&place()).unwrap();
        assert!(places.is_restored(&place()));
        places.unmark(&place()).unwrap();
        places.unmark(&place()).unwrap();
        assert!(!places.is_restored(&place()));
        places.refuse(&place(), "the source goes on").unwrap();
        assert_eq!(places.refusal(&place()).unwrap(), "the source goes on");
    }
}
