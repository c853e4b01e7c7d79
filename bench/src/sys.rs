//! The system calls of the lab that neither `std` nor `nix` offer safely.
//!
//! Everything unsafe of this crate is here or in the submodules. Nothing here knows about labs,
//! workloads or scenarios.
#![allow(unsafe_code)]

pub mod ipc;
pub mod memory;
pub mod process;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs `prepare` in the child between fork and exec.
///
/// `prepare` must only make system calls: other threads of the parent may have held locks (the
/// allocator's, say) when it forked.
pub fn before_exec(
    command: &mut Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: callers pass closures that only make system calls on descriptors and buffers
    // prepared before the fork, as the contract above asks.
    unsafe { command.pre_exec(prepare) };
}

/// Who continues after [`clone_with_pid`].
#[derive(Debug)]
pub enum Cloned {
    /// The calling process; the child's id as the calling process sees it.
    Parent(i32),
    /// The new process.
    Child,
}

/// `clone3` with `set_tid` (Linux 5.5): a child with a chosen process id.
///
/// `pids` holds the wanted ids, innermost pid namespace first; `flags` are `CLONE_NEW*`. The caller
/// must be single-threaded, as after any fork without exec.
///
/// # Errors
/// `EEXIST` when an id is taken, `EPERM` without `CAP_CHECKPOINT_RESTORE`.
pub fn clone_with_pid(pids: &[i32], flags: u64) -> io::Result<Cloned> {
    let mut args = CloneArgs {
        flags,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: pids.as_ptr() as u64,
        set_tid_size: pids.len() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: args is a valid clone_args of the size passed, set_tid points at `pids`, which
    // outlives the call, and without CLONE_VM the child runs on its own copy of this stack.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent(
            i32::try_from(pid).expect("the kernel's pids are ints"),
        )),
    }
}

/// `struct clone_args` of linux/sched.h, version 2 (88 bytes).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

/// Makes every descriptor of this process from `first` on close on exec (Linux 5.11).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range takes no pointers, and with this flag it closes nothing by itself.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Broadcasts one ARP request for `wanted`, in the name of `sender` (MAC, IPv4 address), from an
/// interface of the calling thread's network namespace. With `wanted` the sender's own address it
/// is an announcement (RFC 5227).
pub fn send_arp_request(
    interface: &str,
    sender: ([u8; 6], [u8; 4]),
    wanted: [u8; 4],
) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    // SAFETY: socket() takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: fd was just returned by socket() and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut packet = [0u8; 28];
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]); // Ethernet, IPv4, request
    packet[8..14].copy_from_slice(&sender.0);
    packet[14..18].copy_from_slice(&sender.1);
    packet[24..28].copy_from_slice(&wanted);
    // SAFETY: sockaddr_ll is plain data for which all zeros is a valid value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
    to.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    to.sll_halen = 6;
    to.sll_addr = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    // SAFETY: both pointers are valid for the lengths passed, for the duration of the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The result of a call that returns something negative and sets errno on failure.
fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
