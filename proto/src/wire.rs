//! The bytes between two nodes.
//!
//! A migration is one or more QUIC connections (*lanes*) dialled by the source. The first
//! bidirectional stream of each starts with a [`control::Hello`]; lane 0 goes on as the control
//! stream, a sequence of frames ([`frame`]) that hold one message each ([`control`]). Pages,
//! sets and files travel on unidirectional streams of any lane ([`stream`], [`parcel`]).
//!
//! What a peer sent is parsed once, here, into types whose values are all legal; the error
//! names the field that broke a clause. Nothing here reads or writes a socket, and nothing here
//! compresses: a parcel's blocks are opaque bytes.

pub mod code;
pub mod container;
pub mod control;
pub mod copied;
pub mod cpu;
pub mod description;
pub mod frame;
pub mod needs;
pub mod parcel;
pub mod parked;
pub mod party;
pub mod podman_pod;
pub mod shared;
pub mod stream;
pub mod version;

/// The generated structs. They never leave this crate.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub(crate) mod schema {
    include!(concat!(env!("OUT_DIR"), "/pageferry.wire.rs"));
}
