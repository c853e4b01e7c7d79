//! The flags of all mappings of a process, as the kernel holds them.
//!
//! `/proc/PID/smaps` is the only file that tells them, and to print it the kernel walks all page
//! tables: 11 ms per GiB. The iterator tells them as they are, as a number, in microseconds per
//! process. What a bit means is the kernel's own affair and changes with its version;
//! `criu_glue::view::flags` learns it from a true smaps of the same process.

use std::io;
use std::os::fd::OwnedFd;

use criu_glue::view::flags::Area;
use pageferry_sys::bpf::Whose;

use super::types::Types;
use super::{ELEMENT, R1, Records, load, load_word, odd, program, put, unknown};

/// Reads the mappings of processes.
#[derive(Debug)]
pub struct Areas {
    program: OwnedFd,
}

impl Areas {
    /// Loads the program. The error says why there is none on this node.
    pub fn load(types: &Types) -> io::Result<Self> {
        let instructions = instructions(types).ok_or_else(unknown)?;
        let probe = Self {
            program: load(types, ITERATOR, &instructions)?,
        };
        // A kernel that ignores whom it is asked about would tell of others.
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let here = ITERATOR.as_ptr() as u64;
        let areas = probe.of(own)?;
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
    pub fn of(&self, pid: i32) -> io::Result<Vec<Area>> {
        let mut records = Records::begin(&self.program, Whose::Thread(pid))?;
        let mut areas: Vec<Area> = Vec::new();
        while areas.len() < AREAS_MAX {
            let next = records.next::<WORDS>()?;
            if next.is_empty() {
                break;
            }
            for [start, end, flags] in next {
                // Read on after its end, an iterator over one thread begins anew.
                if areas.last().is_some_and(|last| start < last.end) {
                    return Ok(areas);
                }
                areas.push(Area { start, end, flags });
            }
        }
        if areas.is_empty() || AREAS_MAX <= areas.len() {
            return Err(odd());
        }
        Ok(areas)
    }
}

/// For every mapping: start, end and flags.
fn instructions(types: &Types) -> Option<Vec<u64>> {
    let copy = |index, name| {
        let place = types.member("vm_area_struct", name)?;
        put(WORDS, index, vec![load_word(R1, ELEMENT, place)])
    };
    let copies = [
        copy(0, "vm_start")?,
        copy(1, "vm_end")?,
        copy(2, "vm_flags")?,
    ];
    program(types, "bpf_iter__task_vma", "vma", &copies)
}

const ITERATOR: &str = "bpf_iter_task_vma";
const WORDS: usize = 3;
/// Sixteen times what a process may have (`vm.max_map_count`).
const AREAS_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::maps;
    use crate::track::probe::{KERNEL_TYPES, kernel_types};

    #[test]
    fn the_iterator_tells_of_the_mappings_that_maps_tells_of() {
        if !std::path::Path::new(KERNEL_TYPES).exists() {
            eprintln!("this kernel does not tell its types");
            return;
        }
        let probe = Areas::load(&kernel_types().unwrap()).unwrap();
        // Another process, since this one maps while its tests run.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let told = || {
            // None at all in the middle of exec.
            let areas = probe.of(pid).unwrap_or_default();
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
        assert!(probe.of(pid).is_err());
    }
}
