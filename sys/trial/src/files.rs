//! Descriptors that a trial process opens, and what it makes of them.

use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use pageferry_sys::track::USERFAULTFD_FLAGS;

use super::check;

/// Opens a file for reading, for ever; returns its number.
pub fn open(path: &str) -> io::Result<String> {
    Ok(std::fs::File::open(path)?.into_raw_fd().to_string())
}

/// Opens a file, for ever, and takes a lock of it: `posix` or `ofd`, or `flock` for all of it;
/// `read` or `write`; from a byte on, so many, 0 for all. With `wait` until it has it. Returns the
/// descriptor's number.
pub fn lock(words: &[&str]) -> io::Result<String> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).create(true).open(words[0])?;
    let number = file.into_raw_fd();
    let (writes, waits) = (words[2] == "write", words.get(5) == Some(&"wait"));
    if words[1] == "flock" {
        let how = if writes { libc::LOCK_EX } else { libc::LOCK_SH };
        let how = if waits { how } else { how | libc::LOCK_NB };
        // SAFETY: two numbers.
        check(unsafe { libc::flock(number, how) })?;
        return Ok(number.to_string());
    }
    let how = match (words[1], waits) {
        ("posix", false) => libc::F_SETLK,
        ("posix", true) => libc::F_SETLKW,
        (_, false) => libc::F_OFD_SETLK,
        (_, true) => libc::F_OFD_SETLKW,
    };
    let kind = if writes { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap(),
        l_whence: 0,
        l_start: words[3].parse().unwrap(),
        l_len: words[4].parse().unwrap(),
        l_pid: 0,
    };
    // SAFETY: a descriptor of ours, and a lock that lives across the call.
    check(unsafe { libc::fcntl(number, how, &raw const lock) })?;
    Ok(number.to_string())
}

/// Opens a pair of sockets, for ever; returns their inodes.
pub fn open_sockets() -> io::Result<String> {
    let (one, other) = std::os::unix::net::UnixStream::pair()?;
    let inode = |socket: std::os::unix::net::UnixStream| {
        let path = format!("/proc/self/fd/{}", socket.into_raw_fd());
        Ok::<_, io::Error>(std::fs::metadata(path)?.ino())
    };
    Ok(format!("{} {}", inode(one)?, inode(other)?))
}

pub fn open_direct(path: &str) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let _open_for_ever = file.into_raw_fd();
    Ok(())
}

/// The same in a thread with a descriptor table of its own; in that of all others it is not open.
pub fn open_direct_in_thread(path: &str) -> io::Result<()> {
    let path = path.to_owned();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let unshared = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES);
        let opened = unshared
            .map_err(io::Error::from)
            .and_then(|()| open_direct(&path));
        tell.send(opened).unwrap();
        loop {
            std::thread::park();
        }
    });
    told.recv().unwrap()
}

/// Turns direct I/O on for a file that is open.
pub fn make_direct(number: u64) -> io::Result<()> {
    let number = RawFd::try_from(number).unwrap();
    // SAFETY: opened before, for ever.
    let file = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_DIRECT))?;
    Ok(())
}

pub fn close(number: u64) -> io::Result<()> {
    // SAFETY: a number that nobody owns.
    check(unsafe { libc::close(RawFd::try_from(number).unwrap()) })
}

/// An asynchronous I/O context, which lives until the process ends.
pub fn make_aio_context() -> io::Result<()> {
    let mut context: libc::c_ulong = 0;
    // SAFETY: room for the number of the context.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 8, &raw mut context) };
    check(libc::c_int::try_from(result).unwrap())
}

pub fn open_userfaultfd() -> io::Result<()> {
    // SAFETY: one number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, USERFAULTFD_FLAGS) };
    check(libc::c_int::try_from(fd).unwrap())
}

/// An io_uring that no descriptor and no mapping of the kernel's leads to.
pub fn register_io_uring() -> io::Result<()> {
    // Without an array of indices, in memory of our own, registered only.
    const FLAGS: u32 = 1 << 14 | 1 << 15 | 1 << 16;
    let memory = |bytes| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: new memory, which stays until the process ends.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        memory.expose_provenance() as u64
    };
    let mut parameters = [0_u8; 256];
    parameters[8..12].copy_from_slice(&FLAGS.to_ne_bytes());
    // `sq_off.user_addr` and `cq_off.user_addr`: entries, and both rings.
    parameters[72..80].copy_from_slice(&memory(4096).to_ne_bytes());
    parameters[112..120].copy_from_slice(&memory(4096).to_ne_bytes());
    // SAFETY: room for struct io_uring_params, which is 120 bytes.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    check(libc::c_int::try_from(ring).unwrap())
}

pub fn open_io_uring() -> io::Result<()> {
    let mut parameters = [0u8; 256];
    // SAFETY: room for struct io_uring_params, which is 120 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    check(libc::c_int::try_from(fd).unwrap())
}
