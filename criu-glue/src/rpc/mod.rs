//! CRIU's RPC: one protobuf message per packet on a `SOCK_SEQPACKET` socket.
//!
//! [`message`] is the wire format, [`swrk`] a worker process and the conversation with it,
//! [`event`] what it says.
//!
//! Absent on purpose: `criu service` (one daemon for many clients), which could neither be started
//! inside a workload's namespaces nor be given the view.

pub mod event;
pub mod message;
pub mod swrk;

pub use event::{Event, Features, NotifyScript, RequestFailed, Response, Version};
pub use swrk::{Swrk, SwrkConfig, SwrkError, ViewFds};
