//! Cgroups, as far as a workload's life depends on them: what freezes it, and what it may not share
//! with its pager.
//!
//! [`freezer`] is the cgroup that decides whether a workload runs, [`aside`] the place where one of
//! its threads stands that must be thawed alone, [`within`] one where all stay frozen whoever thaws
//! theirs, and [`identity`] what tells a cgroup from a later one of its name; [`hierarchies`] finds
//! what is mounted, and makes cgroups of one name wherever processes are killed together. The
//! daemon makes and removes them; the pager and its watcher freeze and kill with them when no
//! daemon is there.
//!
//! Invariants: a cgroup made here holds tasks of one workload only, and is removed when it is
//! empty; `Frozen` is what the kernel has said, never what was asked for. Both versions of cgroups
//! are known. Absent: limits of memory, processors and processes, which are the daemon's to carry.

#![forbid(unsafe_code)]

pub mod aside;
pub mod freezer;
pub mod hierarchies;
pub mod identity;
pub mod within;
