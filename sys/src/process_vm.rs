//! Reading the memory of another process: `process_vm_readv`, and `/proc/PID/mem` for ranges that
//! the process itself may not read. Writing a few bytes of it: `process_vm_writev`.
//!
//! Nothing here is unsafe; it lives in `sys` because addresses of another process are as easy to
//! misuse as pointers. Both ways read what is there: a page that was never touched is made by the
//! read (the zero page), so callers ask only for pages that exist.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::sys::uio::{self, RemoteIoVec};
use nix::unistd::Pid;

/// Most runs in one call (`UIO_MAXIOV`).
pub const RUNS_MAX: usize = 1024;

/// Bytes of another process: address and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRun {
    /// Address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: usize,
}

/// Reads `runs`, at most [`RUNS_MAX`], one after another into `buffer`, which is as long as all of
/// them. Returns how many bytes were read: fewer where a page could not be read, and the error
/// when that was the first one. `EFAULT`: not mapped, or not readable by the process.
/// `ESRCH`: no such process.
pub fn read(pid: i32, runs: &[RemoteRun], buffer: &mut [u8]) -> io::Result<usize> {
    let remote = runs.iter().map(|run| RemoteIoVec {
        base: usize::try_from(run.address).expect("addresses fit a pointer on 64-bit targets"),
        len: run.len,
    });
    let remote: Vec<_> = remote.collect();
    let read = uio::process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(buffer)], &remote)?;
    Ok(read)
}

/// Writes `bytes` at an address of process `pid` that it may write itself. `EFAULT`: there is no
/// such memory for all of them.
pub fn write(pid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let remote = RemoteIoVec {
        base: usize::try_from(address).expect("addresses fit a pointer on 64-bit targets"),
        len: bytes.len(),
    };
    let local = [IoSlice::new(bytes)];
    if uio::process_vm_writev(Pid::from_raw(pid), &local, &[remote])? < bytes.len() {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    Ok(())
}

/// `/proc/PID/mem`, bound to the memory the process had when it was opened; after an exec or an
/// exit it reads nothing.
#[derive(Debug)]
pub struct ProcessMemory(File);

impl ProcessMemory {
    /// Opens that of `pid`. Needs `PTRACE_MODE_ATTACH` on it.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/mem")).map(Self)
    }

    /// Reads at `address`, whatever its protection; returns how many bytes were read.
    pub fn read_at(&self, buffer: &mut [u8], address: u64) -> io::Result<usize> {
        self.0.read_at(buffer, address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_read_one_after_another() {
        let memory: Vec<u8> = (0..=255).collect();
        let run = |offset: usize, len| RemoteRun {
            address: memory.as_ptr() as u64 + offset as u64,
            len,
        };
        let pid = std::process::id().cast_signed();
        let mut buffer = [0; 5];
        let read = read(pid, &[run(200, 2), run(7, 3)], &mut buffer).unwrap();
        assert_eq!((read, buffer), (5, [200, 201, 7, 8, 9]));
    }

    #[test]
    fn bytes_are_written_where_there_is_memory() {
        let pid = std::process::id().cast_signed();
        let memory = Box::new(std::cell::Cell::new([0u8; 4]));
        let address = memory.as_ptr() as u64;
        write(pid, address + 1, &[7, 8]).unwrap();
        assert_eq!(std::hint::black_box(&memory).get(), [0, 7, 8, 0]);
        let error = write(pid, 0, &[7]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn a_read_ends_where_memory_does() {
        let pid = std::process::id().cast_signed();
        let memory = [7u8; 2];
        let runs = [
            RemoteRun {
                address: memory.as_ptr() as u64,
                len: 2,
            },
            RemoteRun { address: 0, len: 2 },
        ];
        let mut buffer = [0; 4];
        assert_eq!(read(pid, &runs, &mut buffer).unwrap(), 2);
        let error = read(pid, &runs[1..], &mut buffer[..2]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
