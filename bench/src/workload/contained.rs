//! What containers of all runtimes have in common: whose they are, and a root file system with
//! Redis in it, made of the node image.

use anyhow::Result;

use crate::lab::node::Node;

/// A container, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub runtime: Runtime,
    pub id: String,
}

/// Who runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Crun,
    /// An engine, over crun.
    Podman,
    Runc,
}

impl Runtime {
    pub const ALL: [Self; 3] = [Self::Runc, Self::Crun, Self::Podman];

    /// Its program, and the kind of its containers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Podman => "podman",
            Self::Runc => "runc",
        }
    }

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|runtime| runtime.name() == name)
    }

    /// The program that asks CRIU.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Crun | Self::Podman => "crun",
            Self::Runc => "runc",
        }
    }

    /// The file that this has of each of its containers, in its folder of that.
    pub const fn state(self) -> &'static str {
        match self {
            Self::Crun | Self::Podman => "status",
            Self::Runc => "state.json",
        }
    }
}

impl Container {
    /// The name by which pageferry knows it.
    pub fn name(&self) -> String {
        format!("{}/{}", self.runtime.name(), self.id)
    }
}

/// Makes `rootfs` in a folder of a node, of the programs and what they are linked to.
pub fn make_rootfs(node: &Node, folder: &str) -> Result<()> {
    let script = format!("mkdir -p {folder}/rootfs && cd {folder} && {MAKE}");
    node.command("sh")?
        .args(["-ec", &script, "sh", SERVER, CLIENT])
        .run()
        .map(drop)
}

pub const SERVER: &str = "/usr/bin/redis-server";
pub const CLIENT: &str = "/usr/bin/redis-cli";
/// Programs are the arguments. Files are at the paths they have in the image.
const MAKE: &str = "\
mkdir -p rootfs/proc rootfs/sys rootfs/dev rootfs/etc rootfs/tmp
for program in \"$@\"; do
  real=$(readlink -f $program)
  mkdir -p rootfs$(dirname $program)
  cp $real rootfs$program
  for library in $(ldd $real | grep -o '/[^ ]*'); do
    mkdir -p rootfs$(dirname $library)
    cp -L $library rootfs$library
  done
done
";
