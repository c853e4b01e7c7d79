//! Every unsafe line of the daemon: system calls that no library covers, behind safe functions.
//!
//! Invariants: descriptors are `OwnedFd`/`BorrowedFd`, addresses are plain integers of *another*
//! process (never dereferenced here), kernel structs have their size asserted at compile time.
//! Absent: policy, logging, anything that decides.

pub mod bpf;
pub mod cpu;
pub mod fdpass;
pub mod heap;
pub mod namespace;
pub mod packet;
pub mod pagemap;
pub mod priority;
pub mod process_vm;
pub mod ptrace;
#[cfg(test)]
pub mod shared_mapping;
pub mod task;
pub mod track;
pub mod uffd;
