//! Objects of System V and a POSIX message queue, made and used by the other process.

use std::io;
use std::ptr;

/// Makes and uses one, by its word; its id. All of the node's is to be removed by whoever asked.
/// `own` gives the thread that obeys a namespace of its own before; the answer is its id.
pub fn make(what: &str) -> io::Result<String> {
    // SAFETY: numbers, a static string, and one operation that lives across its call. The segment
    // is mapped where the kernel chooses, and written within its length.
    let result = unsafe {
        match what {
            "own" => match libc::unshare(libc::CLONE_NEWIPC) {
                0 => libc::gettid(),
                failed => failed,
            },
            "segment" => map_segment()?.0,
            "unmapped" => {
                let (id, start) = map_segment()?;
                libc::shmdt(start);
                id
            }
            "removed" => {
                let (id, _) = map_segment()?;
                libc::shmctl(id, libc::IPC_RMID, ptr::null_mut());
                id
            }
            "undo" => {
                let id = libc::semget(libc::IPC_PRIVATE, 1, 0o600);
                let mut raise = libc::sembuf {
                    sem_num: 0,
                    sem_op: 1,
                    sem_flg: SEM_UNDO,
                };
                match libc::semop(id, &raw mut raise, 1) {
                    0 => id,
                    failed => failed,
                }
            }
            "posix" => {
                let flags = libc::O_CREAT | libc::O_RDWR;
                let (mode, attributes): (libc::mode_t, *const libc::mq_attr) = (0o600, ptr::null());
                libc::mq_open(c"/trial".as_ptr(), flags, mode, attributes)
            }
            other => return Err(io::Error::other(format!("unknown object {other}"))),
        }
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        id => Ok(id.to_string()),
    }
}

/// A segment of two pages, of which one is in use, and where it is mapped.
fn map_segment() -> io::Result<(libc::c_int, *const libc::c_void)> {
    // SAFETY: the kernel chooses the place, of which the first byte is written.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, 8192, 0o600);
        let start = libc::shmat(id, ptr::null(), 0);
        if start.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        start.cast::<u8>().write(1);
        Ok((id, start))
    }
}

const SEM_UNDO: libc::c_short = 0x1000;
