//! Objects of the calling thread's IPC namespace: what `/proc/sysvipc` does not tell of them, and
//! what there is of POSIX message queues.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// How many bytes a message queue of System V may hold (`msg_qbytes`).
pub fn queue_limit(id: i32) -> io::Result<u64> {
    // SAFETY: `msqid_ds` is plain data for which all zeros is a valid value.
    let mut told: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `msqid_ds`, which lives across the call.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut told) })?;
    Ok(told.msg_qbytes)
}

/// The process that was the last to change semaphore `number` of a set, in the caller's pid
/// namespace; 0 if there was none, or it is not seen there.
pub fn semaphore_pid(id: i32, number: i32) -> io::Result<i32> {
    // SAFETY: numbers only; GETPID takes no fourth argument.
    let pid = unsafe { libc::semctl(id, number, GETPID) };
    check(pid)?;
    Ok(pid)
}

/// The root of the file system in which POSIX message queues are the files, without mounting it
/// anywhere (Linux 5.2).
pub fn posix_queues() -> io::Result<File> {
    let name = c"mqueue".as_ptr();
    // SAFETY: a C string and numbers; the call returns a new descriptor or -1.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name, FSOPEN_CLOEXEC) })?;
    let (number, create) = (context.as_raw_fd(), FSCONFIG_CMD_CREATE);
    let nothing: *const libc::c_char = ptr::null();
    // SAFETY: this command takes neither key nor value.
    let made = unsafe { libc::syscall(libc::SYS_fsconfig, number, create, nothing, nothing, 0) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers only; the call returns a new descriptor or -1.
    let mount = owned(unsafe { libc::syscall(libc::SYS_fsmount, number, FSMOUNT_CLOEXEC, 0) })?;
    Ok(mount.into())
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).unwrap_or(-1);
    check(fd)?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

// From linux/sem.h and linux/mount.h; libc lacks them for some targets.
const GETPID: libc::c_int = 11;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
