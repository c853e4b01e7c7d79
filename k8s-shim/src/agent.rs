//! The agent of a node: it has the local daemon do what Migrations say, and says in them what the
//! daemon says.
//!
//! It decides nothing: [`orders::next`] says what to ask the daemon for, from what the controller
//! has written down, and every call may be repeated. It believes nothing of the peer, and reads
//! nothing of a checkpoint. Absent: whether anything may move, and pods.

pub mod orders;
