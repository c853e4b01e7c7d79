//! The flags of all mappings of a process, as the kernel holds them.
//!
//! `/proc/PID/smaps` is the only file that tells them, and to print it the kernel walks all page
//! tables: 11 ms per GiB. An iterator of the kernel over the mappings of a task (`task_vma`, Linux
//! 6.1) tells them as they are, as a number, in microseconds per process. What a bit means is the
//! kernel's own affair and changes with its version; `criu_glue::view::flags` learns it from a true
//! smaps of the same process.
//!
//! The program that the iterator runs is the few instructions of [`program`], with the places of
//! the kernel's fields taken from its own types. Without them, or without the right to load a
//! program, there is no [`Probe`], and smaps is read as if there were none.

mod types;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use criu_glue::view::flags::Area;

use crate::sys::bpf;
use types::Types;

/// Reads the mappings of processes.
#[derive(Debug)]
pub struct Probe {
    program: OwnedFd,
}

impl Probe {
    /// Loads the program. The error says why there is none on this node.
    pub fn load() -> io::Result<Self> {
        let types = Types::parse(std::fs::read(KERNEL_TYPES)?).ok_or_else(unknown)?;
        let iterator = types.function(ITERATOR).ok_or_else(unknown)?;
        let program = program(&types).ok_or_else(unknown)?;
        let probe = Self {
            program: bpf::load_iterator(&program, LICENSE, iterator)?,
        };
        // A kernel that ignores whom it is asked about would tell of others.
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let here = ITERATOR.as_ptr() as u64;
        let areas = probe.areas(own)?;
        if !areas
            .iter()
            .any(|area| area.start <= here && here < area.end)
        {
            return Err(odd());
        }
        Ok(probe)
    }

    /// All mappings of a process but the kernel's own (`[vsyscall]`), by address. A process that
    /// maps meanwhile may be told of as it was at no single moment.
    pub fn areas(&self, pid: i32) -> io::Result<Vec<Area>> {
        let link = bpf::link_iterator(self.program.as_fd(), pid)?;
        let mut iterator = bpf::open_iterator(link)?;
        let mut areas: Vec<Area> = Vec::new();
        let mut buffer = vec![0; READ_BYTES];
        while areas.len() < AREAS_MAX {
            let length = iterator.read(&mut buffer)?;
            let (read, rest) = buffer[..length].as_chunks::<AREA_BYTES>();
            if !rest.is_empty() {
                return Err(odd());
            }
            for area in read.iter().map(area) {
                // Read on after its end, an iterator over one thread begins anew.
                if areas.last().is_some_and(|last| area.start < last.end) {
                    return Ok(areas);
                }
                areas.push(area);
            }
            if read.is_empty() {
                break;
            }
        }
        if areas.is_empty() || AREAS_MAX <= areas.len() {
            return Err(odd());
        }
        Ok(areas)
    }
}

fn area(bytes: &[u8; AREA_BYTES]) -> Area {
    let (words, _) = bytes.as_chunks::<8>();
    let word = |index: usize| u64::from_ne_bytes(words[index]);
    Area {
        start: word(0),
        end: word(1),
        flags: word(2),
    }
}

fn odd() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's iterator over mappings told of none, or of too many",
    )
}

fn unknown() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "the kernel's types are not of the known form",
    )
}

/// For every mapping: start, end and flags into the file that is being read.
fn program(types: &Types) -> Option<Vec<u64>> {
    let field = |name| types.member("vm_area_struct", name);
    let seq = types.member("bpf_iter_meta", "seq")?;
    let member = |name| types.member("bpf_iter__task_vma", name);
    let (meta, vma) = (member("meta")?, member("vma")?);
    let copy = |name, to| Some([load(R1, R7, field(name)?), store(FRAME, to, R1)]);
    let mut program = vec![
        instruction(MOVE, R6, R1, 0, 0),
        load(R7, R6, vma),
        // Once more after the last mapping, without one: over what follows but the last two.
        instruction(JUMP_IF_ZERO, R7, 0, 12, 0),
    ];
    program.extend(copy("vm_start", -24)?);
    program.extend(copy("vm_end", -16)?);
    program.extend(copy("vm_flags", -8)?);
    program.extend([
        load(R1, R6, meta),
        load(R1, R1, seq),
        instruction(MOVE, R2, FRAME, 0, 0),
        instruction(ADD_NUMBER, R2, 0, 0, -24),
        instruction(MOVE_NUMBER, R3, 0, 0, AREA_BYTES_NUMBER),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(MOVE_NUMBER, R0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    Some(program)
}

/// `to = *(u64 *)(base + offset)`.
fn load(to: u8, base: u8, offset: i16) -> u64 {
    instruction(LOAD, to, base, offset, 0)
}

/// `*(u64 *)(base + offset) = from`.
fn store(base: u8, offset: i16, from: u8) -> u64 {
    instruction(STORE, base, from, offset, 0)
}

/// `struct bpf_insn`: operation, two registers of four bits, offset, number.
fn instruction(operation: u8, target: u8, source: u8, offset: i16, number: i32) -> u64 {
    let registers = if cfg!(target_endian = "little") {
        source << 4 | target
    } else {
        target << 4 | source
    };
    let [offset_0, offset_1] = offset.to_ne_bytes();
    let [number_0, number_1, number_2, number_3] = number.to_ne_bytes();
    u64::from_ne_bytes([
        operation, registers, offset_0, offset_1, number_0, number_1, number_2, number_3,
    ])
}

const KERNEL_TYPES: &str = "/sys/kernel/btf/vmlinux";
const ITERATOR: &str = "bpf_iter_task_vma";
/// The kernel lets only a program under a licence compatible with its own see its structures. The
/// instructions above are offered under either of these two, beside the licence of the whole.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";
/// Start, end, flags: 8 bytes each.
const AREA_BYTES: usize = 24;
const AREA_BYTES_NUMBER: i32 = 24;
/// Sixteen times what a process may have (`vm.max_map_count`).
const AREAS_MAX: usize = 1 << 20;
/// Twice what the kernel hands out at once (`bpf_seq_read`, eight pages).
const READ_BYTES: usize = 64 << 10;

// Operations (`Documentation/bpf/standardization/instruction-set.rst`).
const LOAD: u8 = 0x79;
const STORE: u8 = 0x7b;
const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const ADD_NUMBER: u8 = 0x07;
const JUMP_IF_ZERO: u8 = 0x15;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// `bpf_seq_write`.
const SEQ_WRITE: i32 = 127;
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R6: u8 = 6;
const R7: u8 = 7;
/// The end of the stack of the program.
const FRAME: u8 = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::track::maps;

    #[test]
    fn the_iterator_tells_of_the_mappings_that_maps_tells_of() {
        if !std::path::Path::new(KERNEL_TYPES).exists() {
            eprintln!("this kernel does not tell its types");
            return;
        }
        let probe = Probe::load().unwrap();
        // Another process, since this one maps while its tests run.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let told = || {
            // None at all in the middle of exec.
            let areas = probe.areas(pid).unwrap_or_default();
            let areas: Vec<_> = areas.iter().map(|area| area.start..area.end).collect();
            let maps = maps::read(pid).unwrap();
            let own = |range: &std::ops::Range<u64>| range.start >> 63 == 0;
            let maps = maps.into_iter().map(|mapping| mapping.range).filter(own);
            (areas, maps.collect::<Vec<_>>())
        };
        // It may still be starting.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut both = told();
        while (both.0.is_empty() || both.0 != both.1) && std::time::Instant::now() < deadline {
            both = told();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(both.0, both.1);
        assert!(!both.0.is_empty());
        assert!(probe.areas(pid).is_err());
    }
}
