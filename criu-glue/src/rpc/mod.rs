//! CRIU's RPC: one protobuf message per packet on a `SOCK_SEQPACKET` socket.
//!
//! [`conversation`] is who speaks with CRIU, and when; [`client`] somebody else who asks it for
//! something, and [`gate`] where it is met; [`swrk`] how a worker of ours is started; [`event`]
//! what CRIU says; [`message`] the wire format. `talk` is a conversation without its IO, `packet`
//! the sockets, `wire` what is left alone in another's request.
//!
//! Absent on purpose: `criu service` (one daemon for many clients), which could neither be started
//! inside a workload's namespaces nor be given the view.

pub mod client;
pub mod conversation;
pub mod event;
pub mod gate;
pub mod message;
pub mod runtime;
pub mod swrk;

mod packet;
mod talk;
mod wire;

pub use client::{Client, ClientRequest, Patch, PatchError};
pub use conversation::{Conversation, Ending, TalkError};
pub use event::{Event, Features, NotifyScript, RequestFailed, Response, Version};
pub use gate::{Asked, Gate, GateError, Summoned};
pub use packet::Peer;
pub use runtime::{Runtime, RuntimeError};
pub use swrk::{StartError, SwrkConfig, ViewFds};
pub use wire::WireError;
