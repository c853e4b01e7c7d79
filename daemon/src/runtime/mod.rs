//! What kinds of workload there are, and how each is described, frozen, and made again.
//!
//! This step knows one kind, the bare process tree ([`process`]); its freezer cgroup is [`cgroup`],
//! the files it stands on are [`files`], those that both nodes share are [`shared`], and [`mounts`]
//! are those of a namespace of its own. [`cpu`] is the processor.
//! Nothing here knows the network or the pages.

pub mod build_id;
pub mod cgroup;
pub mod cpu;
pub mod files;
pub mod mounts;
pub mod process;
pub mod shared;
