//! What containers of all runtimes have in common: whose they are, what runs in them, and a root
//! file system made of the node image.

use anyhow::{Context, Result};
use serde_json::Value;

use super::{redis, writer};
use crate::lab::node::Node;
use crate::writer::options::Options;

/// A container, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub runtime: Runtime,
    pub id: String,
}

/// What runs in a container.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of containers, before their number.
    pub name: &'static str,
    pub arguments: Vec<String>,
    /// Files and folders that its root file system has, besides what they are linked to.
    pub programs: Vec<String>,
    /// One that says so if it can be started in the container.
    pub greets: &'static [&'static str],
    pub greeting: &'static str,
    /// It may write to its root file system.
    pub writes: bool,
    /// What is mounted besides.
    pub mounts: Vec<Value>,
    /// Values of its configuration, by their places.
    pub changes: Vec<(&'static str, Value)>,
}

impl Plan {
    pub fn redis() -> Self {
        Self {
            name: "redis",
            arguments: redis::plan().arguments,
            programs: [SERVER, CLIENT].map(str::to_owned).to_vec(),
            greets: &[CLIENT, "ping"],
            greeting: "PONG",
            writes: false,
            mounts: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// A writer, which also writes files.
    pub fn writer(options: &Options) -> Self {
        Self {
            name: "writer",
            arguments: writer::plan(options).arguments,
            programs: [
                writer::PROGRAM,
                "/bin/sh",
                "/bin/chmod",
                "/bin/ln",
                "/bin/mkdir",
                "/bin/mv",
                "/bin/rm",
                "/bin/touch",
            ]
            .map(str::to_owned)
            .to_vec(),
            greets: &["/bin/sh", "-c", "echo PONG"],
            greeting: "PONG",
            writes: true,
            mounts: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        let mut changes = self.changes.iter();
        changes.any(|(place, _)| *place == "/process/terminal")
    }

    /// Makes it of a configuration of a container.
    pub fn apply(&self, spec: &mut Value) -> Result<()> {
        let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
        mounts.extend(self.mounts.iter().cloned());
        for (place, value) in &self.changes {
            let (above, name) = place.rsplit_once('/').context("a place")?;
            let above = spec.pointer_mut(above);
            above.with_context(|| format!("no {place}"))?[name] = value.clone();
        }
        Ok(())
    }
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
pub fn make_rootfs(node: &Node, folder: &str, programs: &[String]) -> Result<()> {
    let script = format!("mkdir -p {folder}/rootfs && cd {folder} && {MAKE}");
    node.command("sh")?
        .args(["-ec", &script, "sh"])
        .args(programs)
        .run()
        .map(drop)
}

pub const SERVER: &str = "/usr/bin/redis-server";
pub const CLIENT: &str = "/usr/bin/redis-cli";
/// Programs and folders are the arguments. All are at the paths they have in the image.
const MAKE: &str = "\
mkdir -p rootfs/proc rootfs/sys rootfs/dev rootfs/etc rootfs/tmp rootfs/opt/dir/inner
for file in etc/deleted etc/kept etc/moved opt/dir/one opt/dir/inner/two; do
  echo $file >rootfs/$file
done
for program in \"$@\"; do
  mkdir -p rootfs$(dirname $program)
  cp -RL $program rootfs$(dirname $program)/
  for file in $(find -L $program -type f -perm /111); do
    for library in $(ldd $file 2>/dev/null | grep -o '/[^ ]*'); do
      if [ -e rootfs$library ]; then continue; fi
      mkdir -p rootfs$(dirname $library)
      cp -L $library rootfs$library
    done
  done
done
";
