//! Finding a system call instruction in another process.
//!
//! The vdso has some on every kernel that has a vdso; a process without one has them in its C
//! library. Any two bytes `0f 05` will do, whatever instruction they are part of.

use std::io;

use pageferry_sys::process_vm::{self, RemoteRun};

use super::InjectError;
use crate::track::maps::{self, Mapping};

/// The address of a `syscall` instruction that process `pid` may execute.
pub(super) fn find(pid: i32) -> Result<u64, InjectError> {
    let maps = maps::read(pid).map_err(|source| InjectError::Inspect {
        tid: pid,
        what: "the mappings",
        source,
    })?;
    let executable = maps
        .iter()
        .filter(|mapping| mapping.executable && mapping.private);
    let (vdso, others): (Vec<_>, Vec<_>) = executable.partition(|mapping| mapping.name == "[vdso]");
    vdso.into_iter()
        .chain(others)
        .take(MAPPINGS_MAX)
        .find_map(|mapping| search(pid, mapping).ok().flatten())
        .ok_or(InjectError::NoInstruction { pid })
}

fn search(pid: i32, mapping: &Mapping) -> io::Result<Option<u64>> {
    let len = usize::try_from(mapping.range.end - mapping.range.start).unwrap_or(usize::MAX);
    let mut code = vec![0; len.min(SEARCH_BYTES_MAX)];
    let run = RemoteRun {
        address: mapping.range.start,
        len: code.len(),
    };
    let read = process_vm::read(pid, &[run], &mut code)?;
    let found = code[..read]
        .windows(SYSCALL.len())
        .position(|bytes| bytes == SYSCALL);
    Ok(found.map(|offset| mapping.range.start + offset as u64))
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
