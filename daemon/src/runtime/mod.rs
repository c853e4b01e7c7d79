//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); its freezer cgroup is [`cgroup`],
//! the files it stands on are [`files`], and [`mounts`] are those of a namespace of its own.
//! [`loopback`] finds connections that would be torn apart. Nothing here knows links or pages.

pub mod build_id;
pub mod cgroup;
pub mod files;
pub mod loopback;
pub mod mounts;
pub mod process;
