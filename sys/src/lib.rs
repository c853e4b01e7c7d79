//! Every unsafe line of the daemon and the pager: system calls that no library covers, behind safe
//! functions.
//!
//! Invariants: descriptors are `OwnedFd`/`BorrowedFd`, addresses are plain integers of *another*
//! process (never dereferenced here), kernel structs have their size asserted at compile time.
//! Whoever is above forbids unsafe code altogether.
//!
//! Absent: policy, anything that decides, and every other crate of ours. What only tests need is in
//! `trial/`, a crate that nothing links which is shipped.

pub mod bound;
pub mod bpf;
pub mod clock;
pub mod cpu;
pub mod divert;
pub mod fdpass;
pub mod gate;
pub mod heap;
pub mod ipc;
pub mod namespace;
pub mod packet;
pub mod pagemap;
pub mod panic;
pub mod priority;
pub mod process_vm;
pub mod ptrace;
pub mod tap;
pub mod task;
pub mod track;
pub mod uffd;
pub mod unread;
