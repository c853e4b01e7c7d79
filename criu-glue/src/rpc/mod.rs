//! CRIU's RPC: one protobuf message per packet on a `SOCK_SEQPACKET` socket.
//!
//! [`message`] is the wire format, [`swrk`] a worker process and the conversation with it.
//!
//! Absent on purpose: `criu service` (one daemon for many clients), which could neither be started
//! inside a workload's namespaces nor be given the view.

pub mod message;
pub mod swrk;

pub use swrk::{
    Event, Features, NotifyScript, RequestFailed, Response, Swrk, SwrkConfig, SwrkError, Version,
    ViewFds,
};
