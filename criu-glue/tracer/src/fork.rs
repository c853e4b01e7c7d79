//! The fork of the tracer, before CRIU's `main`, and what the two share from then on.

use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use crate::channel::Shared;
use crate::files::Inherited;
use crate::links::Links;
use crate::sockets::Marks;
use crate::{frozen, kernel, remote, serve};

/// What only the library knows that passes CRIU's calls on.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Whether what CRIU seizes or changes now belongs to a dump. Before that it tries things on
    /// processes and sockets of its own.
    pub dumps: fn() -> bool,
    /// Counts a call that CRIU has left to the tracer.
    pub asked: fn(),
}

static HOST: OnceLock<Host> = OnceLock::new();

/// Whether this process is a CRIU with a tracer, in a dump.
pub fn dumps() -> bool {
    remote::has_tracer() && HOST.get().is_some_and(|host| (host.dumps)())
}

/// Counts a call that is the tracer's.
pub fn count() {
    if let Some(host) = HOST.get() {
        (host.asked)();
    }
}

/// Forks the tracer, in a process that has one thread. `freezer` is the cgroup that holds the tree
/// which will be dumped, if one does. Where the fork fails CRIU traces by itself.
pub fn start(host: Host, freezer: Option<&Path>) {
    if let Some(cgroup) = freezer {
        frozen::attach(cgroup);
    }
    let Some(shared) = Shared::create() else {
        return;
    };
    let (Some(marks), Some(links)) = (Marks::create(), Links::create()) else {
        return;
    };
    // Set once: a constructor runs once.
    let _ = HOST.set(host);
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
pub fn shared_memory<T>() -> Option<NonNull<T>> {
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
