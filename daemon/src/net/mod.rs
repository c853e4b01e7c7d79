//! How two nodes talk: QUIC with certificates on both sides, in lanes.
//!
//! ```text
//!   tls ──► endpoint ──► lanes ──► control   framed messages, lane 0
//!              ▲           └─────► stream    pages and files, any lane
//!        socket, tuning
//! ```
//!
//! This module knows streams, not pages: it carries kinds and bytes, and leaves their meaning to
//! `pages` and their order to the machines of `pageferry-proto`.

pub mod control;
pub mod endpoint;
pub mod lanes;
mod socket;
pub mod stream;
pub mod tls;
pub mod tuning;

#[cfg(test)]
pub(crate) mod tests;
