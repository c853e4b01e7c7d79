//! A container at its target: its name is free, its bundle is here, and its runtime's
//! `restore` makes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageferry_cgroup::freezer::{Freezer, FreezerRoot};
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_cgroup::identity::FolderId;
use pageferry_files::may_come;
use pageferry_proto::id::ContainerId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::ContainerDescription;
use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};
use pageferry_sys::bound;
use pageferry_sys::namespace::NamespaceKind;
use serde::{Deserialize, Serialize};

use super::binds::Binds;
use super::habits::Runtime;
use super::spec::{Around, Engine, Spec};
use super::volumes::Named;
use super::{BOUND, OUTPUT, bound_in, read_config, version};
use crate::runtime::rootfs::{self, Bundle, RootPlace};
use crate::runtime::{cpu, files, shared};

/// A container that comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    runtime: Runtime,
    id: String,
    container: ContainerDescription,
}

/// How the runtime is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// The program.
    pub program: PathBuf,
    /// Whether it starts the runtime itself, with streams of its own making.
    pub is_engine: bool,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where it writes what goes wrong.
    pub log: PathBuf,
    /// What it leaves if it is killed, or fails.
    pub leaves: Leaves,
    /// The files by which a process joins the cgroups of the container, if the runtime does not put
    /// there what is to become CRIU.
    pub cgroup_procs: Vec<PathBuf>,
    /// The cgroup that it has to name then.
    pub cgroup: Option<String>,
    /// Arguments with which it is started again when its restore has failed, if any;
    pub undo: Vec<String>,
    /// and when the container runs.
    pub then: Vec<String>,
}

/// What a runtime may leave behind of a restore that did not succeed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaves {
    /// The folder that it has for the container.
    pub folder: PathBuf,
    /// The folder in which it binds the root file system, to [`BOUND`].
    pub bound_in: PathBuf,
    /// There is a container if there is this file; then nothing else was left.
    pub state: PathBuf,
    /// Files, and folders if they are empty, in the order in which they are removed.
    pub paths: Vec<PathBuf>,
    /// What it may bind into its root file system for a moment.
    #[serde(default)]
    pub volumes: Binds,
}

/// What may be left when the runtime, and whoever started it, were killed while it restored; in a
/// file of the migration's folder.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    leaves: Leaves,
    /// What the runtime's folder is known by, once it is made.
    made: Option<FolderId>,
    cgroups: Vec<(PathBuf, FolderId)>,
}

const NOTE: &str = "container.json";

/// What `checkpoint` writes beside the images, and `restore` reads before it asks for them: the
/// standard streams. No container comes with others.
const STREAMS: (&str, &str) = (
    "descriptors.json",
    r#"["/dev/null","/dev/null","/dev/null"]"#,
);

impl Arriving {
    /// Takes in hand what is offered.
    pub fn begin(
        runtime: Runtime,
        id: &ContainerId,
        description: &WorkloadDescription,
    ) -> Result<Self, Failure> {
        let container = description.container.clone().ok_or_else(|| {
            let text = format!("the offer does not say what the container {id} is");
            Failure::new(ErrorCode::UnsupportedWorkload, text)
        })?;
        let id = id.to_string();
        Ok(Self {
            runtime,
            id,
            container,
        })
    }

    /// Compares what it needs with this node. Blocks; asks about files, whose storage may not
    /// answer.
    pub fn check(&self, description: &WorkloadDescription) -> Result<(), Failure> {
        check_node(description, Namespaces::NONE)?;
        version::check(self.runtime, &self.container.runtime_version)?;
        check_free(self.runtime, &self.id)?;
        self.check_bundle(&Named::of(description))?;
        files::check_all(description)
    }

    fn check_bundle(&self, named: &Named) -> Result<(), Failure> {
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
        check_spec(&self.container, None, named)?;
        let spec = Spec::parse(&self.container.config)?;
        if spec.is_writable() {
            // It comes with its root file system, which is never put over another.
            let taken = |error: pageferry_files::Error| {
                Failure::new(
                    ErrorCode::PathTaken,
                    format!("the bundle of the container: {error}"),
                )
            };
            rootfs::within(bundle, spec.named_root())?;
            return may_come(bundle).map(drop).map_err(taken);
        }
        let here = read_config(bundle).map_err(|failure| differs(failure.text()))?;
        if here != self.container.config {
            return Err(differs("its config.json is another one"));
        }
        Ok(())
    }

    /// The bundle that is made for it, if its root file system comes with it.
    pub fn root_place(&self) -> Result<Option<RootPlace>, Failure> {
        let spec = Spec::parse(&self.container.config)?;
        if !spec.is_writable() {
            return Ok(None);
        }
        let path = PathBuf::from(&self.container.bundle);
        Ok(Some(RootPlace::Bundle(Bundle {
            root: rootfs::within(&path, spec.named_root())?,
            path,
            config: self.container.config.clone(),
        })))
    }

    /// Namespaces that are made for it before it is restored: CRIU makes the others.
    pub fn namespaces() -> Vec<NamespaceKind> {
        vec![NamespaceKind::Net]
    }

    /// How the runtime is started to restore it. Makes what it needs in `directory`, which is the
    /// migration's.
    pub fn restore(&self, directory: &Path, hierarchies: &Hierarchies) -> io::Result<Restore> {
        let images = streams(directory)?;
        let container = (self.runtime, &*self.id);
        let made = made(container, (&self.container, None), hierarchies, directory)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let arguments = [
            "--root",
            self.runtime.root(),
            "--log",
            &path(&made.log),
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
            arguments: arguments.map(str::to_owned).to_vec(),
            ..made
        })
    }
}

/// Refuses what no container has that is moved, storage that is not the same here, and a processor
/// that it cannot go on with. Namespaces that are `shared` are those of its party.
pub fn check_node(description: &WorkloadDescription, shared: Namespaces) -> Result<(), Failure> {
    let own = [
        Namespaces::NET,
        Namespaces::UTS,
        Namespaces::IPC,
        Namespaces::PID,
    ];
    let own = own.into_iter().fold(Namespaces::MNT, Namespaces::with);
    if description.own_namespaces.with(shared) != own {
        return Err(Failure::new(
            ErrorCode::UnsupportedWorkload,
            "a container has namespaces of its own",
        ));
    }
    shared::check_all(description)?;
    match &description.cpu {
        Some(source) => cpu::read().check(source),
        None => Ok(()),
    }
}

/// Refuses what the configuration has that is not moved yet, and what it binds that neither comes
/// nor is here.
pub fn check_spec(
    container: &ContainerDescription,
    engine: Option<&Engine>,
    named: &Named,
) -> Result<(), Failure> {
    let all = named.all();
    let around = Around {
        bundle: Path::new(&container.bundle),
        engine,
        named: &all,
    };
    let spec = Spec::parse(&container.config)?;
    spec.check(&around)?;
    named.check_here(&spec, &around)
}

/// Refuses a container of which the runtime has something already.
pub fn check_free(runtime: Runtime, id: &str) -> Result<(), Failure> {
    let folder = runtime.folder(id);
    if !folder.exists() {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::NameTaken,
        format!(
            "the target has a container {id} already, or what is left of one ({}): end it there \
             first, or have it moved under another name",
            folder.display()
        ),
    ))
}

/// How the runtime is started, but for its arguments, and where it makes what. That is noted in
/// `directory`. The cgroup is the one that the configuration says, unless an engine changes that.
pub fn made(
    (runtime, id): (Runtime, &str),
    (container, cgroup): (&ContainerDescription, Option<String>),
    hierarchies: &Hierarchies,
    directory: &Path,
) -> io::Result<Restore> {
    let spec = Spec::parse(&container.config).map_err(io::Error::other)?;
    let cgroup = cgroup.unwrap_or_else(|| spec.cgroup().to_owned());
    // Wherever the runtime makes one.
    let below = cgroup.trim_start_matches('/');
    let cgroups = hierarchies.iter().map(|all| all.point.join(below));
    let cgroups: Vec<PathBuf> = cgroups.collect();
    let mut leaves = leaves((runtime, id), Path::new(&container.bundle), &cgroups);
    leaves.volumes = Binds::look(&spec, Path::new(&container.bundle))?;
    note(directory, &leaves)?;
    let joined = match runtime.habits().enters {
        true => Vec::new(),
        false => cgroups,
    };
    let joined = joined.into_iter().map(|cgroup| cgroup.join("cgroup.procs"));
    Ok(Restore {
        program: runtime.program().into(),
        is_engine: false,
        arguments: Vec::new(),
        log: directory.join(OUTPUT),
        leaves,
        cgroup_procs: joined.collect(),
        cgroup: (!runtime.habits().enters).then_some(cgroup),
        undo: Vec::new(),
        then: Vec::new(),
    })
}

/// Notes in `directory` what a killed runtime may leave, and makes what it reads of images by
/// itself; where that is.
pub fn prepare(directory: &Path, leaves: &Leaves) -> io::Result<PathBuf> {
    note(directory, leaves)?;
    streams(directory)
}

/// The same of a container whose standard streams were these at its source.
pub fn prepare_with(directory: &Path, leaves: &Leaves, had: &[String]) -> io::Result<PathBuf> {
    let images = prepare(directory, leaves)?;
    fs::write(images.join(STREAMS.0), serde_json::to_vec(had)?)?;
    Ok(images)
}

fn note(directory: &Path, leaves: &Leaves) -> io::Result<()> {
    let note = Note {
        leaves: leaves.clone(),
        ..Note::default()
    };
    note.write(directory)
}

fn streams(directory: &Path) -> io::Result<PathBuf> {
    let images = directory.join("streams");
    fs::create_dir_all(&images)?;
    fs::write(images.join(STREAMS.0), STREAMS.1)?;
    Ok(images)
}

fn leaves((runtime, id): (Runtime, &str), bundle: &Path, cgroups: &[PathBuf]) -> Leaves {
    let (folder, habits) = (runtime.folder(id), runtime.habits());
    let files = habits.leaves.iter().map(|name| folder.join(name));
    let mut paths: Vec<PathBuf> = files.collect();
    if !paths.is_empty() {
        paths.push(folder);
    }
    for cgroup in cgroups.iter().filter(|_| !habits.leaves_below.is_empty()) {
        paths.extend(habits.leaves_below.iter().map(|name| cgroup.join(name)));
        paths.push(cgroup.clone());
    }
    Leaves {
        folder: runtime.folder(id),
        bound_in: bound_in((runtime, id), bundle),
        state: runtime.state(id),
        paths,
        volumes: Binds::default(),
    }
}

/// The cgroup that runtime `program` has made for a container: process `pid` is to become the CRIU
/// that restores it, and is in it alone. What else the runtime has made is noted in `directory`.
pub fn made_for(
    (program, pid): (&Path, i32),
    (freezers, hierarchies): (&FreezerRoot, &Hierarchies),
    directory: &Path,
) -> Result<Freezer, Failure> {
    let program = program.display();
    let unfit = |text: String| Failure::new(ErrorCode::NodeUnfit, text);
    let path = freezers.current_of(pid).ok_or_else(|| {
        unfit(format!(
            "the cgroup that {program} has made for the container cannot be seen"
        ))
    })?;
    let freezer = Freezer::open(&path).and_then(Freezer::known);
    let freezer = freezer.map_err(|error| unfit(error.to_string()))?;
    let inside = freezer
        .processes()
        .map_err(|error| unfit(error.to_string()))?;
    if inside != [pid] {
        return Err(unfit(format!(
            "{program} restores into the cgroup {}, where others are ({inside:?})",
            path.display()
        )));
    }
    let all = hierarchies
        .iter()
        .filter_map(|hierarchy| hierarchy.current(pid));
    // In hierarchies that the runtime does not use it is where its parent was.
    let cgroups = all
        .filter(|folder| folder.file_name() == path.file_name())
        .filter_map(|folder| FolderId::of(&folder).ok().map(|id| (folder, id)))
        .collect();
    let noted = Note::read(directory).and_then(|note| {
        let made = Some(FolderId::of(&note.leaves.folder)?);
        let note = Note {
            made,
            cgroups,
            ..note
        };
        note.write(directory)
    });
    noted.map_err(|error| unfit(format!("what {program} makes cannot be noted: {error}")))?;
    Ok(freezer)
}

/// Notes what a runtime has made anew that was started in the place of another.
pub fn note_again(directory: &Path) -> io::Result<()> {
    let note = Note::read(directory)?;
    let again = note.cgroups.into_iter();
    let again = again.filter_map(|(path, _)| FolderId::of(&path).ok().map(|id| (path, id)));
    let note = Note {
        made: Some(FolderId::of(&note.leaves.folder)?),
        cgroups: again.collect(),
        leaves: note.leaves,
    };
    note.write(directory)
}

/// Removes what a runtime has left that was killed while it restored: nothing, if it undid that by
/// itself. What somebody has made by the same names since is not touched.
pub fn sweep(directory: &Path) {
    let Ok(note) = Note::read(directory) else {
        return;
    };
    let leaves = &note.leaves;
    let is_ours = note.is_ours();
    if is_ours {
        release(leaves);
        bound::remove_unless(&leaves.state, &leaves.paths);
    }
    for (cgroup, _) in note.cgroups.iter().filter(|(path, id)| id.is_at(path)) {
        // With anybody in it, it is no leftover.
        bound::remove_empty(cgroup);
    }
}

/// Lets go of the root file system that a runtime has bound, of a container that may have run, and
/// that nobody is in any more. All else is its runtime's.
pub fn leave(directory: &Path) {
    if let Ok(note) = Note::read(directory)
        && note.is_ours()
    {
        release(&note.leaves);
    }
}

fn release(leaves: &Leaves) {
    if let Err(error) = bound::release(&leaves.bound_in, BOUND) {
        tracing::error!(%error, "{} has the root file system of a container bound in it, which is \
            deleted with it", leaves.bound_in.display());
    }
    leaves.volumes.release();
}

impl Note {
    fn is_ours(&self) -> bool {
        match self.made {
            Some(made) => made.is_at(&self.leaves.folder),
            // It has not come to its request. It is no container yet; that of somebody else is.
            None => !self.leaves.state.exists(),
        }
    }

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
        "root": {"path": "rootfs", "readonly": true},
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
            runtime: Runtime::Runc,
            id: "web".to_owned(),
            container: ContainerDescription {
                bundle: bundle.to_string_lossy().into_owned(),
                config: config.into(),
                runtime_version: String::new(),
                containerd: None,
                podman: None,
                pod: None,
                podman_pod: None,
            },
        }
    }

    #[test]
    fn the_bundle_must_be_here_and_say_the_same() {
        let bundle = tempfile::tempdir().unwrap();
        let check = |config| arriving(bundle.path(), config).check_bundle(&Named::default());
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
        // One that is written to comes, to no other.
        let writable = CONFIG.replace("true", "false");
        fs::write(bundle.path().join("config.json"), &writable).unwrap();
        assert_eq!(refused(&writable).code(), ErrorCode::PathTaken);
        fs::remove_file(bundle.path().join("config.json")).unwrap();
        check(&writable).unwrap();
        let elsewhere = writable.replace("rootfs", "/srv/rootfs");
        assert_eq!(refused(&elsewhere).code(), ErrorCode::UnsupportedWorkload);
        let place = arriving(bundle.path(), &writable).root_place().unwrap();
        let Some(RootPlace::Bundle(made)) = place else {
            panic!("nothing is made");
        };
        assert_eq!(made.root(), bundle.path().join("rootfs"));
        assert_eq!(arriving(bundle.path(), CONFIG).root_place().unwrap(), None);
    }

    #[test]
    fn what_a_killed_runtime_leaves_is_noted_before_it_is_started_and_swept() {
        let folder = tempfile::tempdir().unwrap();
        let mounts = "1 0 0:1 / /cg/freezer rw - cgroup cgroup rw,freezer\n";
        let hierarchies = Hierarchies::from_mountinfo(mounts);
        let come = |runtime| {
            let arriving = Arriving {
                runtime,
                ..arriving(Path::new("/b"), CONFIG)
            };
            arriving.restore(folder.path(), &hierarchies).unwrap()
        };
        let crun = come(Runtime::Crun);
        assert_eq!(crun.leaves.bound_in, Path::new("/b"));
        let left = [
            "/run/crun/web/config.json",
            "/run/crun/web",
            "/cg/freezer/web/.proxy-crun",
            "/cg/freezer/web",
        ];
        assert_eq!(crun.leaves.paths, left.map(PathBuf::from));
        let joined = [PathBuf::from("/cg/freezer/web/cgroup.procs")];
        assert_eq!(crun.cgroup_procs, joined);
        assert_eq!(crun.cgroup.as_deref(), Some("/web"));
        let runc = come(Runtime::Runc);
        assert_eq!(runc.leaves.bound_in, Path::new("/run/runc/web"));
        assert!(runc.leaves.paths.is_empty() && runc.cgroup_procs.is_empty());
        assert_eq!(runc.arguments.last().map(String::as_str), Some("web"));
        let streams = fs::read_to_string(folder.path().join("streams/descriptors.json")).unwrap();
        assert_eq!(streams.matches("/dev/null").count(), 3);
        // As if it had been killed, with its folder and an empty cgroup left.
        let (state, cgroup) = (folder.path().join("state"), folder.path().join("cgroup"));
        fs::create_dir_all(state.join(BOUND)).unwrap();
        fs::create_dir(&cgroup).unwrap();
        let leaves = Leaves {
            bound_in: state.clone(),
            folder: state.clone(),
            state: state.join("state.json"),
            ..Leaves::default()
        };
        let note = Note {
            leaves: leaves.clone(),
            made: FolderId::of(&state).ok(),
            cgroups: vec![(cgroup.clone(), FolderId::of(&cgroup).unwrap())],
        };
        assert!(Note::read(folder.path()).unwrap().cgroups.is_empty());
        note.write(folder.path()).unwrap();
        // Somebody else has both of them now.
        for path in [&state, &cgroup] {
            fs::rename(path, path.with_extension("ours")).unwrap();
            fs::create_dir_all(path.join(BOUND)).unwrap();
        }
        fs::remove_dir(cgroup.join(BOUND)).unwrap();
        sweep(folder.path());
        assert!(state.join(BOUND).exists() && cgroup.exists());
        for path in [&state, &cgroup] {
            fs::remove_dir_all(path).unwrap();
            fs::rename(path.with_extension("ours"), path).unwrap();
        }
        fs::create_dir(cgroup.join(".proxy-crun")).unwrap();
        sweep(folder.path());
        assert!(!state.exists() && !cgroup.exists());
        // One that had not asked yet.
        let note = Note {
            leaves: note.leaves,
            ..Note::default()
        };
        note.write(folder.path()).unwrap();
        fs::create_dir_all(state.join(BOUND)).unwrap();
        fs::write(state.join("state.json"), "").unwrap();
        sweep(folder.path());
        assert!(state.join(BOUND).exists());
        fs::remove_file(state.join("state.json")).unwrap();
        sweep(folder.path());
        assert!(!state.exists());
    }
}
