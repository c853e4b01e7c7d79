//! The API server asks here before it evicts a pod.
//!
//! It asks over TLS, with certificates that are made here ([`certificates`]), and goes on without
//! an answer: who is asked for nothing, or is away, keeps nobody from evicting. Any of the
//! controllers answers, not only the one that leads: what two of them make of one eviction has one
//! name. Absent: what becomes of a pod (`evict.rs`).

pub mod certificates;
mod judge;
mod serve;

pub use serve::serve;
