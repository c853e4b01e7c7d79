//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); its freezer cgroup is [`cgroup`],
//! which process a pid means is [`identity`], the files it stands on are [`files`], and [`mounts`] are those of a namespace of its own.
//! Nothing here knows the network or the pages.

pub mod build_id;
pub mod cgroup;
pub mod files;
pub mod identity;
pub mod mounts;
pub mod process;
