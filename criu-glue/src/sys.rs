//! The only unsafe code of this crate: what a worker does between `fork` and `exec`, sockets given
//! to the runtime, and descriptors taken from a socket.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockFlag, UnixCredentials, accept4, recvmsg,
};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

/// What the child does to itself before it becomes `criu`, in this order.
#[derive(Debug)]
pub(crate) struct ChildSetup {
    /// Files a `0` is written to: the kernel reads it as "the writing task".
    pub cgroup_procs: Vec<CString>,
    pub namespaces: Vec<OwnedFd>,
    /// Descriptors that stay open across `exec`, at the number they have in the parent.
    pub inherited: Vec<OwnedFd>,
    /// Whether memory may come in huge pages; inherited by everything the child starts.
    pub huge_pages: bool,
    /// Whether it goes before others, if that is permitted.
    pub urgent: bool,
}

/// The step of [`ChildSetup`] that failed; the number is the index in its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailedStep {
    Cgroup(usize),
    Namespace(usize),
    Inherit(usize),
    HugePages,
    /// `fork` or `exec` itself.
    Exec,
}

/// The least nice value.
const URGENT: i32 = -20;

const STEP_CGROUP: u8 = 1;
const STEP_NAMESPACE: u8 = 2;
const STEP_INHERIT: u8 = 3;
const STEP_HUGE_PAGES: u8 = 4;

/// Lets the runtime watch a descriptor.
pub(crate) fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its number open and unchanged while the `AsyncFd` owns it.
    let registered = unsafe { AsyncFd::register(socket) };
    registered.map_err(io::Error::from)
}

/// Accepts a connection.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let number = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Has a process go before others, if that is permitted.
pub(crate) fn make_urgent(pid: i32) {
    // SAFETY: numbers only. A kernel that refuses leaves the process as it is, only slower.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, pid.cast_unsigned(), URGENT) };
}

/// What came with the bytes of a message.
#[derive(Debug)]
pub(crate) struct Received {
    pub length: usize,
    pub descriptors: Vec<OwnedFd>,
    /// Who sent it, if the socket has `SO_PASSCRED`.
    pub sender: Option<i32>,
}

/// Receives at most `buffer.len()` bytes, and all descriptors that came with them.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<Received> {
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX], UnixCredentials);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut received = Received {
        length: message.bytes,
        descriptors: Vec::new(),
        sender: None,
    };
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmRights(numbers) => {
                // SAFETY: the kernel has just made these descriptors for us, and nobody else has
                // seen their numbers.
                let owned = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
                received.descriptors.extend(numbers.into_iter().map(owned));
            }
            ControlMessageOwned::ScmCredentials(sender) => received.sender = Some(sender.pid()),
            _ => {}
        }
    }
    Ok(received)
}

/// A pidfd of the process that connected `socket`, or made it as one of a pair.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut number: RawFd = -1;
    let mut length = socklen_of(&number);
    // SAFETY: the kernel writes at most `length` bytes to `number`, and the length; both are alive.
    let told = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    check(told.into())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A duplicate of descriptor `number` of the process behind `pidfd`, close-on-exec.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    check(fd)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind `pidfd`.
pub(crate) fn kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let info: *const libc::siginfo_t = std::ptr::null();
    let (pidfd, signal) = (pidfd.as_raw_fd(), libc::SIGKILL);
    // SAFETY: numbers, and a null pointer for "as kill() would".
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, info, 0) };
    Errno::result(sent).map(drop)
}

fn socklen_of<T>(_: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("a small type")
}

/// Starts `command` with `setup` done in the child.
///
/// There is no `PR_SET_PDEATHSIG`: the thread that spawns is a runtime's worker and may end while
/// the process lives on, and a worker that dies at the wrong moment lets go of what it holds.
pub(crate) fn spawn(
    mut command: Command,
    setup: ChildSetup,
) -> Result<Child, (FailedStep, io::Error)> {
    use std::os::unix::process::CommandExt;

    let (read, write) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| (FailedStep::Exec, e.into()))?;
    let report = write.as_raw_fd();
    let prepare = move || prepare_child(&setup, report);
    // SAFETY: the closure runs in the forked child. It makes system calls only: no allocation, no
    // locks, nothing that another thread of the parent could have left half done.
    unsafe { command.pre_exec(prepare) };
    let spawned = tokio::process::Command::from(command).spawn();
    drop(write);
    spawned.map_err(|source| (failed_step(File::from(read)), source))
}

fn failed_step(mut report: File) -> FailedStep {
    let mut bytes = [0; 2];
    let step = match report.read(&mut bytes) {
        Ok(2) => bytes[0],
        Ok(_) | Err(_) => 0,
    };
    let index = usize::from(bytes[1]);
    match step {
        STEP_CGROUP => FailedStep::Cgroup(index),
        STEP_NAMESPACE => FailedStep::Namespace(index),
        STEP_INHERIT => FailedStep::Inherit(index),
        STEP_HUGE_PAGES => FailedStep::HugePages,
        _ => FailedStep::Exec,
    }
}

fn prepare_child(setup: &ChildSetup, report: RawFd) -> io::Result<()> {
    for (index, path) in setup.cgroup_procs.iter().enumerate() {
        join_cgroup(path).or_else(|error| fail(report, STEP_CGROUP, index, error))?;
    }
    for (index, namespace) in setup.namespaces.iter().enumerate() {
        // SAFETY: setns takes a descriptor, open as long as `setup` lives, and a number.
        let result = unsafe { libc::setns(namespace.as_raw_fd(), 0) };
        check(result.into()).or_else(|error| fail(report, STEP_NAMESPACE, index, error))?;
    }
    for (index, fd) in setup.inherited.iter().enumerate() {
        // SAFETY: fcntl(F_SETFD) takes a descriptor, open as long as `setup` lives, and flags.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
        check(result.into()).or_else(|error| fail(report, STEP_INHERIT, index, error))?;
    }
    if setup.urgent {
        // SAFETY: numbers only. A kernel that refuses leaves the child as it is, only slower.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, URGENT) };
    }
    if !setup.huge_pages {
        let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
        // SAFETY: numbers only, each as wide as the kernel reads it.
        let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, on, unused, unused, unused) };
        check(result.into()).or_else(|error| fail(report, STEP_HUGE_PAGES, 0, error))?;
    }
    Ok(())
}

fn join_cgroup(path: &CString) -> io::Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd.into())?;
    // SAFETY: one byte is read from a static string; `fd` was opened above.
    let written = unsafe { libc::write(fd, c"0".as_ptr().cast(), 1) };
    let result = check(written as i64);
    // SAFETY: `fd` was opened above and is closed once.
    unsafe { libc::close(fd) };
    result
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn fail(report: RawFd, step: u8, index: usize, error: io::Error) -> io::Result<()> {
    let bytes = [step, u8::try_from(index).unwrap_or(u8::MAX)];
    // SAFETY: two bytes are read from a local array; `report` is the inherited pipe.
    unsafe { libc::write(report, bytes.as_ptr().cast(), bytes.len()) };
    Err(error)
}

/// Descriptors in one message: the kernel's own limit (`SCM_MAX_FD`), so that none is lost.
const DESCRIPTORS_MAX: usize = 253;

/// Linux 6.5; the same number on all architectures with the generic `asm/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;
