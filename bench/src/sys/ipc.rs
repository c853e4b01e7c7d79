//! Objects of System V, and POSIX message queues.

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

/// A segment of shared memory; its id.
pub fn make_segment(key: i32, bytes: usize) -> io::Result<i32> {
    // SAFETY: numbers only.
    checked(unsafe { libc::shmget(key, bytes, NEW) })
}

/// The id of the segment with this key.
pub fn find_segment(key: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    checked(unsafe { libc::shmget(key, 0, 0) })
}

/// A mapping of a segment; unmapped on drop.
#[derive(Debug)]
pub struct Mapped {
    start: *const AtomicU64,
    words: usize,
}

impl Mapped {
    /// Maps the segment `id`, which has at least `words` words.
    pub fn new(id: i32, words: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the place.
        let start = unsafe { libc::shmat(id, ptr::null(), 0) };
        if start.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast_const().cast();
        Ok(Self { start, words })
    }

    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the segment is at least so long and mapped as long as `self` lives; others write
        // it, too, which is what atomics are for.
        unsafe { std::slice::from_raw_parts(self.start, self.words) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: it was mapped there, and what was lent of it is given back.
        unsafe { libc::shmdt(self.start.cast()) };
    }
}

/// Has a segment go with its last mapping.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no pointer.
    checked(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// Whether there is a segment with this id.
pub fn is_segment(id: i32) -> bool {
    // SAFETY: plain data for which all zeros is a valid value.
    let mut told: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `shmid_ds`, which lives across the call.
    unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut told) == 0 }
}

/// A set of semaphores, all 0; its id.
pub fn make_semaphores(key: i32, count: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    checked(unsafe { libc::semget(key, count, NEW) })
}

/// Sets the value of a semaphore.
pub fn set_semaphore(id: i32, number: i32, value: i32) -> io::Result<()> {
    // SAFETY: SETVAL takes a number.
    checked(unsafe { libc::semctl(id, number, SETVAL, value) }).map(drop)
}

/// The value of a semaphore.
pub fn semaphore(id: i32, number: i32) -> io::Result<i32> {
    // SAFETY: GETVAL takes no pointer.
    checked(unsafe { libc::semctl(id, number, GETVAL) })
}

/// Changes a semaphore, waiting for as long as it takes; with `undo` the kernel takes that back
/// when this process ends.
pub fn change_semaphore(id: i32, number: u16, by: i16, undo: bool) -> io::Result<()> {
    let mut change = libc::sembuf {
        sem_num: number,
        sem_op: by,
        sem_flg: if undo { SEM_UNDO } else { 0 },
    };
    // SAFETY: one `sembuf`, which lives across the call.
    checked(unsafe { libc::semop(id, &raw mut change, 1) }).map(drop)
}

/// A message queue; its id.
pub fn make_queue(key: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    checked(unsafe { libc::msgget(key, NEW) })
}

/// `struct msgbuf`.
#[repr(C)]
struct Message {
    kind: libc::c_long,
    text: [u8; MESSAGE_BYTES],
}

/// Sends a message of at most [`MESSAGE_BYTES`] bytes.
pub fn send(queue: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut message = Message {
        kind,
        text: [0; MESSAGE_BYTES],
    };
    message.text[..text.len()].copy_from_slice(text);
    // SAFETY: the kernel reads the kind and `text.len()` bytes after it, which are there.
    let sent = unsafe {
        libc::msgsnd(
            queue,
            (&raw const message).cast(),
            text.len(),
            libc::IPC_NOWAIT,
        )
    };
    checked(sent).map(drop)
}

/// Takes the next message, if there is one: its kind and its text.
pub fn receive(queue: i32) -> io::Result<(i64, Vec<u8>)> {
    let mut message = Message {
        kind: 0,
        text: [0; MESSAGE_BYTES],
    };
    let flags = libc::IPC_NOWAIT;
    // SAFETY: the kernel writes the kind and at most so many bytes after it, for which there is
    // room.
    let length = unsafe { libc::msgrcv(queue, (&raw mut message).cast(), MESSAGE_BYTES, 0, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok((message.kind, message.text[..length].to_vec()))
}

/// Makes a POSIX message queue with a message in it; open for as long as the descriptor.
pub fn make_posix_queue(name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(io::Error::other)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_CLOEXEC;
    let (mode, attributes): (libc::mode_t, *const libc::mq_attr) = (0o600, ptr::null());
    // SAFETY: a C string, numbers, and a null pointer for what is usual.
    let fd = checked(unsafe { libc::mq_open(name.as_ptr(), flags, mode, attributes) })?;
    // SAFETY: on Linux it is a descriptor, which the kernel has just made for us.
    let queue = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: three bytes are read from a static string.
    checked(unsafe { libc::mq_send(fd, c"one".as_ptr(), 3, 0) })?;
    Ok(queue)
}

/// Takes away the name of one.
pub fn unlink_posix_queue(name: &str) -> io::Result<()> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: a C string.
    checked(unsafe { libc::mq_unlink(name.as_ptr()) }).map(drop)
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Longest text of a message.
pub const MESSAGE_BYTES: usize = 64;

/// An object that is not there yet, for its owner alone. Key 0 is none (`IPC_PRIVATE`).
const NEW: libc::c_int = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;

// From linux/sem.h; libc lacks them for some targets.
const SEM_UNDO: libc::c_short = 0x1000;
const GETVAL: libc::c_int = 12;
const SETVAL: libc::c_int = 16;
