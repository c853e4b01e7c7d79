//! In what the runtimes differ. All else that is done with a container is the same for each.

use std::path::{Path, PathBuf};

use pageferry_proto::wire::code::Failure;
use serde::{Deserialize, Serialize};

use super::state::State;
use super::{crun, runc};

/// A runtime that starts bundles as the specification of OCI says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    Crun,
    Runc,
}

/// What is its own way.
#[derive(Debug)]
pub struct Habits {
    /// Looked up in `PATH`.
    pub program: &'static str,
    /// What it says of how it was built if it can be asked for what moves need.
    pub features: &'static [&'static str],
    /// Where it keeps its containers, unless its caller has another place.
    pub root: &'static str,
    /// The file in a container's folder there that says that there is one.
    pub state: &'static str,
    /// Reads that, of the container that is called so.
    pub read: fn(&[u8], &str) -> Result<State, Failure>,
    /// Where it binds the root file system of a container while it restores.
    pub bound_in: BoundIn,
    /// Whether what is to become CRIU is in the cgroups of the container when it asks for a
    /// restore; they are there in any case.
    pub enters: bool,
    /// The file in the container's folder that is a copy of its `config.json`, as that was when the
    /// container was started.
    pub copy: Option<&'static str>,
    /// Files of the container's folder that a restore leaves which failed.
    pub leaves: &'static [&'static str],
    /// Cgroups below that of the container that it leaves then.
    pub leaves_below: &'static [&'static str],
}

/// A folder of a container.
#[derive(Clone, Copy, Debug)]
pub enum BoundIn {
    /// That of its runtime.
    Folder,
    /// Its bundle.
    Bundle,
}

impl Runtime {
    /// Those there are.
    pub const ALL: [Self; 2] = [Self::Crun, Self::Runc];

    /// In what it differs.
    pub const fn habits(self) -> &'static Habits {
        match self {
            Self::Crun => &crun::HABITS,
            Self::Runc => &runc::HABITS,
        }
    }

    /// Its name, which is that of the program and of the kind.
    pub const fn program(self) -> &'static str {
        self.habits().program
    }

    /// Where it keeps its containers.
    pub const fn root(self) -> &'static str {
        self.habits().root
    }

    /// The folder that it has for a container.
    pub fn folder(self, id: &str) -> PathBuf {
        Path::new(self.root()).join(id)
    }

    /// What says that it has a container.
    pub fn state(self, id: &str) -> PathBuf {
        self.folder(id).join(self.habits().state)
    }
}
