//! What kinds of workload there are, and how each is described, held, dumped, and made again.
//!
//! Kinds are [`kind`]: the bare process tree ([`process`]) and a container of an OCI runtime
//! ([`oci`]), or of an engine over one ([`containerd`], [`podman`]), or a pod ([`pod`]); which
//! process a pid means is [`identity`]. Its cgroups are those of `pageferry-cgroup`, its processor
//! [`cpu`], its limits [`limits`], and what memory is left for it says [`memory`]. The files it
//! stands on are [`files`], what it has locked of them [`locks`], those that both nodes share
//! [`shared`], and [`mounts`] are those of a namespace of its own. States in which it cannot be
//! dumped for a moment are [`passing`], and connections that would be torn apart [`loopback`]. Root
//! file systems that travel are [`rootfs`], those of engines [`layer`]. Objects of the kernel that
//! its processes share are [`ipc`]. Datagrams that nobody has read are [`unread`]. What may hang is
//! done [`detached`]. Nothing here knows the links or the pages.

pub mod build_id;
pub mod containerd;
pub mod copied;
pub mod cpu;
pub mod detached;
pub mod files;
pub mod identity;
pub mod in_use;
pub mod ipc;
pub mod kind;
pub mod layer;
pub mod limits;
pub mod locks;
pub mod loopback;
pub mod memory;
pub mod mounts;
pub mod oci;
pub mod passing;
pub mod pod;
pub mod podman;
pub mod process;
pub mod rootfs;
pub mod shared;
pub mod unread;
