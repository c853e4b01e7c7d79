//! CRIU's tracer: a process of its own, so that CRIU's end is not the end of the workload.
//!
//! Whoever traces a thread must not die while the thread runs code that is not its own: the kernel
//! lets tracees go on when their tracer ends, and the next thing they meet is a trap that nobody
//! waits for any more. In a dump that is true for a millisecond or two in every ten. So CRIU does
//! not trace: it asks a small child, forked before CRIU's `main`, which makes the calls in its
//! place, remembers what is changed in each thread (`tracee`), and when CRIU ends brings all of
//! them home before it ends as well.
//!
//! The two share one table of descriptors, so that CRIU's end closes none: the parasite in the
//! first thread of a process ends when its socket closes, and the thread would then run on with
//! its sockets still in repair mode. The tracer closes it when it holds the thread. Whoever talks
//! to CRIU hears of its end when the workload is whole again.
//!
//! Nobody's symbols are taken over here: a preload library that takes over CRIU's passes the calls
//! on to the functions below that have their names, and knows when there is a dump ([`Host`]).
//!
//! Invariants: the tracer is the only one to trace what was seized in a dump, and never serves
//! anybody but the process that forked it.
//!
//! Absent: help for a tracer that is itself killed in those moments, and other architectures than
//! x86-64, where CRIU traces by itself.

// Tracing is made of system calls, and of memory that two processes share.
#![allow(unsafe_code)]

pub mod repair;

#[cfg(target_arch = "x86_64")]
mod ahead;
#[cfg(target_arch = "x86_64")]
mod channel;
#[cfg(target_arch = "x86_64")]
mod files;
#[cfg(target_arch = "x86_64")]
mod fork;
#[cfg(target_arch = "x86_64")]
mod frozen;
#[cfg(target_arch = "x86_64")]
mod home;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(target_arch = "x86_64")]
mod known;
#[cfg(target_arch = "x86_64")]
mod links;
#[cfg(target_arch = "x86_64")]
mod remote;
#[cfg(target_arch = "x86_64")]
mod request;
#[cfg(target_arch = "x86_64")]
mod section;
#[cfg(target_arch = "x86_64")]
mod serve;
#[cfg(target_arch = "x86_64")]
mod sockets;
#[cfg(target_arch = "x86_64")]
mod told;
#[cfg(target_arch = "x86_64")]
mod tracee;

#[cfg(target_arch = "x86_64")]
pub use fork::{Host, start};
#[cfg(target_arch = "x86_64")]
pub use links::{linkat, unlinkat};
#[cfg(target_arch = "x86_64")]
pub use remote::{ptrace, wait4};
#[cfg(target_arch = "x86_64")]
pub use sockets::setsockopt;
