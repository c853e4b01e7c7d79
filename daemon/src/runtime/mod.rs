//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); its freezer cgroup is [`cgroup`],
//! the files it stands on are [`files`], [`mounts`] are those of a namespace of its own, and states
//! in which it cannot be dumped for a moment are [`passing`].
//! Nothing here knows the links or the pages.

pub mod build_id;
pub mod cgroup;
pub mod files;
pub mod mounts;
pub mod passing;
pub mod process;
