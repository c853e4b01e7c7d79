//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); which process a pid means is
//! [`identity`]. Its freezer cgroup is [`cgroup`], its processor [`cpu`],
//! the other cgroups of what comes in are [`hierarchies`], its limits [`limits`], and what memory
//! is left for it says [`memory`]. The files it stands on are [`files`], what it has locked of them
//! [`locks`], those that both nodes share [`shared`], and [`mounts`] are those of a namespace of
//! its own. States in which it cannot be dumped for a moment are [`passing`], and connections that
//! would be torn apart [`loopback`]. What may hang is done [`detached`]. Nothing here knows the
//! links or the pages.

pub mod build_id;
pub mod cgroup;
pub mod cpu;
pub mod detached;
pub mod files;
pub mod hierarchies;
pub mod identity;
pub mod limits;
pub mod locks;
pub mod loopback;
pub mod memory;
pub mod mounts;
pub mod passing;
pub mod process;
pub mod shared;
