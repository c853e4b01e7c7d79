//! Finding a system call instruction in another process.
//!
//! The vdso has some on every kernel that has a vdso; a process without one has them in its C
//! library. Any two bytes `0f 05` will do, whatever instruction they are part of.

use std::fs;
use std::io;
use std::ops::Range;

use pageferry_sys::process_vm::{self, RemoteRun};

use crate::InjectError;

/// The address of a `syscall` instruction that process `pid` may execute.
pub(crate) fn find(pid: i32) -> Result<u64, InjectError> {
    let maps = fs::read(format!("/proc/{pid}/maps")).map_err(|source| InjectError::Inspect {
        tid: pid,
        what: "the mappings",
        source,
    })?;
    let executable = maps.split(|byte| *byte == b'\n').filter_map(executable);
    let (vdso, others): (Vec<_>, Vec<_>) = executable.partition(|(_, is_vdso)| *is_vdso);
    vdso.into_iter()
        .chain(others)
        .take(MAPPINGS_MAX)
        .find_map(|(range, _)| search(pid, range).ok().flatten())
        .ok_or(InjectError::NoInstruction { pid })
}

/// The addresses of a line of `maps` that is of private executable memory, and whether it is the
/// vdso.
fn executable(line: &[u8]) -> Option<(Range<u64>, bool)> {
    let line = str::from_utf8(line).ok()?;
    let (start, rest) = line.split_once('-')?;
    let (end, rest) = rest.split_once(' ')?;
    let is_executable = rest.starts_with("r-xp") || rest.starts_with("rwxp");
    let address = |text| u64::from_str_radix(text, 16).ok();
    let range = address(start)?..address(end)?;
    is_executable.then(|| (range, line.ends_with(" [vdso]")))
}

fn search(pid: i32, range: Range<u64>) -> io::Result<Option<u64>> {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let mut code = vec![0; len.min(SEARCH_BYTES_MAX)];
    let run = RemoteRun {
        address: range.start,
        len: code.len(),
    };
    let read = process_vm::read(pid, &[run], &mut code)?;
    let found = code[..read]
        .windows(SYSCALL.len())
        .position(|bytes| bytes == SYSCALL);
    Ok(found.map(|offset| range.start + offset as u64))
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How many mappings are searched; a process whose first few have no system call is odd enough.
const MAPPINGS_MAX: usize = 16;

/// How much of each is searched, in bytes: the text of a C library is 1.5 MiB.
const SEARCH_BYTES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_has_a_system_call_instruction() {
        let pid = std::process::id().cast_signed();
        let address = find(pid).unwrap();
        let mut code = [0; 2];
        process_vm::read(pid, &[RemoteRun { address, len: 2 }], &mut code).unwrap();
        assert_eq!(code, SYSCALL);
    }
}
