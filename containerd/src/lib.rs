//! Everything about containerd, and nothing about processes: its API as far as it is used
//! ([`Client`]), a container that comes to it ([`Arrival`]), and one that goes ([`leave`]).
//!
//! containerd keeps a container (what is to run, with which labels), a snapshot (its root file
//! system) and, while it runs, a task, whose shim starts the runtime. A container that comes is
//! made of the same three, and the runtime of its task is `pageferry-oci`, which restores.
//!
//! Invariants: nothing is removed here that somebody else has made: what comes has the migration in
//! a label until it runs; containerd's restart monitor looks at no container that is between two
//! nodes ([`labels`]).

#![forbid(unsafe_code)]

mod api;
mod arrival;
mod blocking;
mod client;
pub mod labels;
pub mod leave;
mod pod;

pub use arrival::{Arrival, ArrivalError, Held};
pub use blocking::{block_on, with};
pub use client::{Client, ClientError, Container, Snapshot, Task};
pub use pod::{PodArrival, PodError, PodOrder, PodRuntime};

/// Where containerd listens unless it is told otherwise.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// The shim whose containers are those of an OCI runtime by command line.
pub const RUNTIME: &str = "io.containerd.runc.v2";

/// Where the program says what goes wrong, in a migration's folder.
pub const LOG: &str = "runtime.log";
