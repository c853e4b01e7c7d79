//! Which process has which socket, by the links of `/proc/PID/fd`.

use std::collections::{HashMap, HashSet};
use std::fs;

/// A descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::runtime) struct Descriptor {
    pub(in crate::runtime) pid: i32,
    pub(in crate::runtime) number: i32,
}

impl Descriptor {
    /// How many descriptors wait to be received in this unix socket.
    pub(super) fn in_flight(self) -> u32 {
        let path = format!("/proc/{}/fdinfo/{}", self.pid, self.number);
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut lines = text.lines();
        lines
            .find_map(|line| line.strip_prefix("scm_fds:")?.trim().parse().ok())
            .unwrap_or(0)
    }
}

/// Those of `sockets` (inode numbers) that the processes have, each with its first descriptor.
pub(in crate::runtime) fn owners(pids: &[i32], sockets: &HashSet<u32>) -> HashMap<u32, Descriptor> {
    let mut found = HashMap::new();
    if sockets.is_empty() {
        return found;
    }
    for &pid in pids {
        // One that has ended since has nothing.
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let socket = target.to_str().and_then(|target| {
                let number = target.strip_prefix("socket:[")?.strip_suffix(']')?;
                number.parse().ok()
            });
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(socket), Some(number)) = (socket, number)
                && sockets.contains(&socket)
            {
                found.entry(socket).or_insert(Descriptor { pid, number });
                if found.len() == sockets.len() {
                    return found;
                }
            }
        }
    }
    found
}
