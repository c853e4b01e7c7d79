//! What of the node is bound into a container: at the source, whether it is what the container has;
//! at the target, whether it is there, or comes.
//!
//! The runtime at the target binds by the same configuration, so by the same paths. It looks at
//! them when it is started, and CRIU opens them when it restores: by then what travels is there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::CopiedForm;
use pageferry_proto::wire::description::WorkloadDescription;

use super::spec::{Around, Bind, Spec};
use crate::runtime::files::is_shared;
use crate::runtime::mounts::Mounts;

/// What the operator has named.
#[derive(Clone, Debug, Default)]
pub struct Named {
    /// Folders that travel along.
    copied: Vec<PathBuf>,
    /// Paths that both nodes share.
    shared: Vec<PathBuf>,
}

impl Named {
    /// What comes with an offer.
    pub fn of(description: &WorkloadDescription) -> Self {
        let folders = description.copied.iter();
        let folders = folders.filter(|copied| copied.form == CopiedForm::Folder);
        let copied = folders.map(|copied| &copied.path);
        let shared = description.shared.iter().map(|shared| &shared.path);
        Self {
            copied: copied.map(PathBuf::from).collect(),
            shared: shared.map(PathBuf::from).collect(),
        }
    }

    /// Paths of both sorts.
    pub fn all(&self) -> Vec<PathBuf> {
        self.copied.iter().chain(&self.shared).cloned().collect()
    }

    /// Checks at the target that all that is bound comes whole, or is here.
    pub fn check_here(&self, spec: &Spec, around: &Around<'_>) -> Result<(), Failure> {
        for bind in spec.binds(around) {
            let mut copied = self.copied.iter();
            match copied.find(|copied| bind.source.starts_with(copied)) {
                Some(copied) if *copied == bind.source => {}
                // The runtime looks for it before that has come.
                Some(_) => {
                    return Err(refused(format!(
                        "the container has {} mounted, which is {} of the node: name that with \
                         --copy, and not a folder above it",
                        bind.destination.display(),
                        bind.source.display()
                    )));
                }
                None => check_name(&bind)?,
            }
        }
        Ok(())
    }
}

/// Checks that what the container of process `root` has mounted, which sees `mounts`, is what its
/// configuration says.
pub fn check_seen(
    (root, mounts): (i32, &Mounts),
    spec: &Spec,
    around: &Around<'_>,
) -> Result<(), Failure> {
    for bind in spec.binds(around) {
        check_name(&bind)?;
        let (place, what) = (bind.destination.display(), bind.source.display());
        if !mounts.bound().any(|bound| bound == bind.destination) {
            return Err(refused(format!(
                "the container has nothing of the node mounted at {place}, where its config.json \
                 has {what}: it was unmounted, or that leads through a symbolic link"
            )));
        }
        let inside = bind.destination.strip_prefix("/");
        let inside = inside.unwrap_or(&bind.destination);
        let seen = identity(&Path::new(&format!("/proc/{root}/root")).join(inside));
        if seen.ok() != identity(&bind.source).ok() {
            return Err(refused(format!(
                "the container has something else mounted at {place} than what the node has now \
                 as {what}: that was replaced since the container was started"
            )));
        }
        let within =
            |bound: &&Path| bound.starts_with(&bind.destination) && *bound != bind.destination;
        if let Some(within) = mounts.bound().find(within) {
            return Err(refused(format!(
                "the container has {} mounted within {place}, which is {what} of the node: mounts \
                 within volumes are not moved yet",
                within.display()
            )));
        }
    }
    Ok(())
}

/// Of `files`, those that are bound into the container, and not of its root file system.
pub fn retain_bound(description: &mut WorkloadDescription, binds: &[Bind]) {
    let sources: Vec<PathBuf> = binds.iter().map(|bind| bind.source.clone()).collect();
    let files = &mut description.files;
    files.retain(|file| is_shared(Path::new(&file.path), &sources));
}

/// Refuses a path by which each node might have something else.
fn check_name(bind: &Bind) -> Result<(), Failure> {
    let (place, what) = (bind.destination.display(), bind.source.display());
    match fs::canonicalize(&bind.source) {
        Ok(path) if path == bind.source => Ok(()),
        Ok(path) => Err(refused(format!(
            "the container has {place} mounted, which is {what} of the node and leads through a \
             symbolic link to {}: have its config.json name that",
            path.display()
        ))),
        Err(error) => Err(refused(format!(
            "the container has {place} mounted, which is {what} of the node: {error}"
        ))),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn refused(text: String) -> Failure {
    Failure::new(ErrorCode::UnsupportedWorkload, text)
}
