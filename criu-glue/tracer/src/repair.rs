//! Taking TCP sockets out of repair mode.
//!
//! CRIU puts every established socket into repair mode while it dumps and takes it out again when
//! it lets the tasks go. A CRIU that was killed does not: the sockets of a workload that runs on
//! would then neither send nor answer, and what it reads from them fails.
//!
//! The tracer does it before the tasks go on; others may, for tasks that a cgroup holds.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `TCP_REPAIR` of `linux/tcp.h`.
pub(crate) const TCP_REPAIR: libc::c_int = 19;

/// `TCP_REPAIR_OFF`: a window probe follows, which makes the peer send again what was lost.
const TCP_REPAIR_OFF: libc::c_int = 0;

/// Takes the sockets of process `pid` out of repair mode, and says how many were in it. The process
/// must stand still. Their `SO_REUSEADDR`, which the kernel forgets, is off then.
///
/// # Errors
/// What the kernel says of its descriptors. Those before are out of it.
pub fn end(pid: i32) -> io::Result<usize> {
    // SAFETY: two integers; returns a new descriptor or -1.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let mut ended = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let number: Option<i32> = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (is_socket, number) {
            let process = process.as_raw_fd();
            // SAFETY: three integers; returns a new descriptor or -1.
            let socket = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
            ended += usize::from(end_one(owned(socket)?.as_fd())?);
        }
    }
    Ok(ended)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes `socket` out of repair mode; false if it was not in it, or is not TCP. Its `SO_REUSEADDR`
/// is off then.
pub(crate) fn end_one(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut mode: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to live local variables, and `length` is the size of the first.
    let asked = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw mut mode).cast(),
            &raw mut length,
        )
    };
    if asked < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Not a TCP socket.
            Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT | libc::ENOTSOCK) => Ok(false),
            _ => Err(error),
        };
    }
    if mode == 0 {
        return Ok(false);
    }
    let off = TCP_REPAIR_OFF;
    // SAFETY: the pointer is to a live local variable of the size that is told.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw const off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;

    fn repair(socket: &impl AsFd) -> bool {
        let on: libc::c_int = 1;
        // SAFETY: the pointer is to a live integer of the size that is told.
        let set = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_TCP,
                TCP_REPAIR,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        set == 0
    }

    #[test]
    fn a_socket_left_in_repair_mode_carries_data_again() {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut ours = TcpStream::connect(listener.local_addr().expect("address")).expect("dial");
        let (mut theirs, _) = listener.accept().expect("accept");
        assert!(!end_one(ours.as_fd()).expect("ask"));
        assert!(repair(&ours), "root may repair");
        let own = std::process::id().cast_signed();
        assert_eq!(end(own).expect("our own"), 1);
        ours.write_all(b"x").expect("write");
        let mut byte = [0];
        theirs.read_exact(&mut byte).expect("read");
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn other_sockets_are_left_alone() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        assert!(!end_one(socket.as_fd()).expect("ask"));
    }
}
