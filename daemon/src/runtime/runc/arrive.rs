//! A container at its target: its name is free, its bundle is here, and `runc restore` makes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::ContainerDescription;
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_sys::bound;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};

use super::spec::Spec;
use super::{BOUND, OUTPUT, PROGRAM, ROOT, folder, read_config};
use crate::runtime::{cpu, files};

/// A container that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    id: String,
    container: ContainerDescription,
}

/// How the runtime is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where it writes what goes wrong.
    pub log: PathBuf,
    /// The folder it has for the container.
    pub state: PathBuf,
}

/// What a runtime may leave behind that was killed while it restored; in a file of the migration's
/// folder.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    state: PathBuf,
    cgroups: Vec<PathBuf>,
}

const NOTE: &str = "container.json";

/// What `runc checkpoint` writes beside the images, and `runc restore` reads before it asks for
/// them: the standard streams. No container comes with others.
const STREAMS: (&str, &str) = (
    "descriptors.json",
    r#"["/dev/null","/dev/null","/dev/null"]"#,
);

impl Arriving {
    /// Takes in hand what is offered.
    pub fn begin(id: &ContainerId, description: &WorkloadDescription) -> Result<Self, Failure> {
        let container = description.container.clone().ok_or_else(|| {
            let text = format!("the offer does not say what the container {id} is");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })?;
        let id = id.to_string();
        Ok(Self { id, container })
    }

    /// Compares what it needs with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        check_namespaces(description)?;
        let state = folder(&self.id);
        if state.exists() {
            return Err(Failure::new(
                ErrorCode::NameTaken,
                format!(
                    "the target has a container {} already, or what is left of one ({}): end it \
                     there first, or have it moved under another name",
                    self.id,
                    state.display()
                ),
            ));
        }
        if let Some(source) = &description.cpu {
            cpu::read().check(source)?;
        }
        self.check_bundle()?;
        let root = Path::new("/");
        let mut all = description.files.iter();
        all.try_for_each(|file| files::check(file, root, false))
    }

    fn check_bundle(&self) -> Result<(), Failure> {
        let bundle = Path::new(&self.container.bundle);
        let differs = |why: &str| {
            Failure::new(
                ErrorCode::FileDiffers,
                format!(
                    "the bundle {} of the container {} is not the same at the target: {why}",
                    bundle.display(),
                    self.id
                ),
            )
        };
        // Also a source that refuses less than this node is not followed.
        Spec::parse(&self.container.config)?.check()?;
        let here = read_config(bundle).map_err(|failure| differs(failure.text()))?;
        if here != self.container.config {
            return Err(differs("its config.json is another one"));
        }
        Ok(())
    }

    /// Namespaces that are made for it before it is restored: CRIU makes the others.
    pub fn namespaces() -> Vec<NamespaceKind> {
        vec![NamespaceKind::Net]
    }

    /// How the runtime is started to restore it. Makes what it needs in `directory`, which is the
    /// migration's.
    pub fn restore(&self, directory: &Path) -> io::Result<Restore> {
        let state = folder(&self.id);
        let images = prepare(directory, &state)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let log = directory.join(OUTPUT);
        let arguments = [
            "--root",
            ROOT,
            "--log",
            &path(&log),
            "restore",
            "--detach",
            "--manage-cgroups-mode",
            "ignore",
            "--image-path",
            &path(&images),
            "--work-path",
            &path(directory),
            "--bundle",
            &self.container.bundle,
            &self.id,
        ];
        Ok(Restore {
            program: PROGRAM.into(),
            arguments: arguments.map(str::to_owned).to_vec(),
            log,
            state,
        })
    }
}

/// Refuses what no source of this build offers.
pub fn check_namespaces(description: &WorkloadDescription) -> Result<(), Failure> {
    let own = [
        Namespaces::NET,
        Namespaces::UTS,
        Namespaces::IPC,
        Namespaces::PID,
    ];
    let own = own.into_iter().fold(Namespaces::MNT, Namespaces::with);
    if description.own_namespaces != own || !description.shared.is_empty() {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            "a container has namespaces of its own, and nothing shared with its node",
        ));
    }
    Ok(())
}

/// Notes in `directory` what a killed runtime may leave in its folder `state` for the container, and
/// makes what it reads of images by itself; where that is.
pub fn prepare(directory: &Path, state: &Path) -> io::Result<PathBuf> {
    let images = directory.join("streams");
    fs::create_dir_all(&images)?;
    fs::write(images.join(STREAMS.0), STREAMS.1)?;
    let note = Note {
        state: state.to_owned(),
        cgroups: Vec::new(),
    };
    note.write(directory)?;
    Ok(images)
}

/// The cgroup that a runtime has made for a container: process `pid` is to become the CRIU that
/// restores it, and is in it alone. What else the runtime has made is noted in `directory`.
pub fn made_for(
    pid: i32,
    (freezers, hierarchies): (&FreezerRoot, &Hierarchies),
    directory: &Path,
) -> Result<Freezer, Failure> {
    let unfit = |text: String| Failure::new(ErrorCode::NodeUnfit, text);
    let path = freezers.current_of(pid).ok_or_else(|| {
        unfit(format!(
            "the cgroup that {PROGRAM} has made for the container cannot be seen"
        ))
    })?;
    let freezer = Freezer::open(&path).map_err(|error| unfit(error.to_string()))?;
    let inside = freezer
        .processes()
        .map_err(|error| unfit(error.to_string()))?;
    if inside != [pid] {
        return Err(unfit(format!(
            "{PROGRAM} restores into the cgroup {}, where others are ({inside:?})",
            path.display()
        )));
    }
    let all = hierarchies
        .iter()
        .filter_map(|hierarchy| hierarchy.current(pid));
    // In hierarchies that the runtime does not use it is where its parent was.
    let cgroups = all
        .filter(|folder| folder.file_name() == path.file_name())
        .collect();
    let noted = Note::read(directory).and_then(|note| Note { cgroups, ..note }.write(directory));
    noted.map_err(|error| unfit(format!("what {PROGRAM} makes cannot be noted: {error}")))?;
    Ok(freezer)
}

/// Removes what a runtime has left that was killed while it restored: nothing, if it undid that by
/// itself. Nobody of the container may be left.
pub fn sweep(directory: &Path) {
    let Ok(note) = Note::read(directory) else {
        return;
    };
    if let Err(error) = bound::release(&note.state, BOUND) {
        tracing::error!(%error, "{} has the root file system of a container bound in it, which is \
            deleted with it", note.state.display());
    }
    for cgroup in note.cgroups {
        // With anybody in it, it is no leftover.
        drop(fs::remove_dir(cgroup));
    }
}

impl Note {
    fn read(directory: &Path) -> io::Result<Self> {
        let text = fs::read(directory.join(NOTE))?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn write(&self, directory: &Path) -> io::Result<()> {
        fs::write(directory.join(NOTE), serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{
        "root": {"readonly": true},
        "linux": {
            "cgroupsPath": "/web",
            "namespaces": [
                {"type": "ipc"}, {"type": "mount"}, {"type": "network"}, {"type": "pid"},
                {"type": "uts"}
            ]
        }
    }"#;

    fn arriving(bundle: &Path, config: &str) -> Arriving {
        Arriving {
            id: "web".to_owned(),
            container: ContainerDescription {
                bundle: bundle.to_string_lossy().into_owned(),
                config: config.into(),
                containerd: None,
            },
        }
    }

    #[test]
    fn the_bundle_must_be_here_and_say_the_same() {
        let bundle = tempfile::tempdir().unwrap();
        let check = |config| arriving(bundle.path(), config).check_bundle();
        let refused = |config| check(config).expect_err("refused");
        assert_eq!(refused(CONFIG).code(), ErrorCode::FileDiffers);
        fs::write(bundle.path().join("config.json"), CONFIG).unwrap();
        check(CONFIG).unwrap();
        let other = CONFIG.replace("/web", "/other");
        assert!(
            refused(&other)
                .text()
                .contains("config.json is another one")
        );
        // What no source of this build offers.
        let writable = CONFIG.replace("true", "false");
        fs::write(bundle.path().join("config.json"), &writable).unwrap();
        assert_eq!(refused(&writable).code(), ErrorCode::UnsupportedWorkload);
    }

    #[test]
    fn what_a_killed_runtime_leaves_is_noted_before_it_is_started_and_swept() {
        let folder = tempfile::tempdir().unwrap();
        let restore = arriving(Path::new("/b"), CONFIG)
            .restore(folder.path())
            .unwrap();
        assert_eq!(restore.state, Path::new("/run/runc/web"));
        assert_eq!(restore.arguments.last().map(String::as_str), Some("web"));
        let streams = fs::read_to_string(folder.path().join("streams/descriptors.json")).unwrap();
        assert_eq!(streams.matches("/dev/null").count(), 3);
        // As if it had been killed, with its folder and an empty cgroup left.
        let (state, cgroup) = (folder.path().join("state"), folder.path().join("cgroup"));
        fs::create_dir_all(state.join(BOUND)).unwrap();
        fs::create_dir(&cgroup).unwrap();
        let note = Note {
            state: state.clone(),
            cgroups: vec![cgroup.clone()],
        };
        assert!(Note::read(folder.path()).unwrap().cgroups.is_empty());
        note.write(folder.path()).unwrap();
        sweep(folder.path());
        assert!(!state.exists() && !cgroup.exists());
    }
}
