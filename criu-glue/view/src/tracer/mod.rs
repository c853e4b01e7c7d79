//! CRIU's tracer: a process of its own, so that CRIU's end is not the end of the workload.
//!
//! Whoever traces a thread must not die while the thread runs code that is not its own: the kernel
//! lets tracees go on when their tracer ends, and the next thing they meet is a trap that nobody
//! waits for any more. In a dump that is true for a millisecond or two in every ten. So CRIU does
//! not trace: it asks a small child, forked before CRIU's `main`, which makes the calls in its
//! place, remembers what is changed in each thread ([`tracee`]), and when CRIU ends brings all of
//! them home before it ends as well.
//!
//! The two share one table of descriptors, so that CRIU's end closes none: the parasite in the
//! first thread of a process ends when its socket closes, and the thread would then run on with
//! its sockets still in repair mode. The tracer closes it when it holds the thread. Whoever talks
//! to CRIU hears of its end when the workload is whole again.
//!
//! Invariants: the tracer is the only one to trace what was seized under a published feed, and
//! never serves anybody but the process that forked it.
//!
//! Absent: help for a tracer that is itself killed in those moments, and other architectures than
//! x86-64, where CRIU traces by itself.

mod channel;
mod files;
pub mod frozen;
mod home;
mod kernel;
mod known;
mod links;
mod remote;
mod section;
mod serve;
mod sockets;
mod tracee;

use std::ptr::{self, NonNull};

use channel::Shared;
use files::Inherited;
use links::Links;
use sockets::Marks;

/// Forks the tracer, in a process that has one thread. Where that fails CRIU traces by itself.
pub fn start() {
    let Some(shared) = Shared::create() else {
        return;
    };
    let (Some(marks), Some(links)) = (Marks::create(), Links::create()) else {
        return;
    };
    // SAFETY: no arguments.
    let owner = unsafe { libc::getpid() };
    // In the child nothing may arrive before it listens; CRIU gets its own mask back.
    let before = kernel::block(!0);
    let inherited = Inherited::now();
    // No signal at its end: for `wait` without `__WALL`, CRIU has no such child.
    // SAFETY: a fork but for descriptors; the child has all of this process's one thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
    if child == 0 {
        serve::run(shared, owner, (inherited, marks, links));
    }
    kernel::unblock_to(before);
    if let Ok(child) = i32::try_from(child)
        && child > 0
    {
        remote::attach(shared, owner, child);
        marks.attach();
        links.attach();
    }
}

/// Memory for a `T`, zeros, shared with whoever is forked and never unmapped. Its pages come as
/// they are used.
fn shared_memory<T>() -> Option<NonNull<T>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<T>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return None;
    }
    NonNull::new(memory.cast())
}
