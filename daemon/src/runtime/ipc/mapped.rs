//! Which segments of System V a tree maps, and its other shared memory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use pageferry_sys::task;

/// Shared memory of a tree. CRIU knows all of it by one number: the id of a segment, and the inode
/// of everything else.
#[derive(Debug, Default)]
pub struct Mapped {
    /// Mappings, by the id of the segment.
    segments: BTreeMap<i32, u64>,
    /// Names, by the lower half of the inode, which is what CRIU keeps of some.
    others: BTreeMap<i32, String>,
}

impl Mapped {
    /// What these processes have. One that has ended has none.
    pub fn by(pids: &[i32]) -> io::Result<Self> {
        let mut mapped = Self::default();
        for pid in pids {
            match fs::read_to_string(format!("/proc/{pid}/maps")) {
                Ok(maps) => maps.lines().for_each(|line| mapped.add(line)),
                Err(_) if task::has_ended(*pid) => continue,
                Err(error) => return Err(error),
            }
            mapped.add_files(*pid);
        }
        Ok(mapped)
    }

    /// How many mappings there are of a segment.
    pub fn count(&self, id: i32) -> u64 {
        self.segments.get(&id).copied().unwrap_or_default()
    }

    /// Other memory that has the number of a segment.
    pub fn namesake(&self, id: i32) -> Option<&str> {
        self.others.get(&id).map(String::as_str)
    }

    /// Adds what a line of `maps` tells.
    fn add(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace().skip(4);
        let inode: Option<u64> = words.next().and_then(|word| word.parse().ok());
        let (Some(inode), Some(name)) = (inode, words.next()) else {
            return;
        };
        if name.starts_with(SEGMENT) {
            *self.segments.entry(number(inode)).or_default() += 1;
        } else if OTHERS.iter().any(|other| name.starts_with(other)) {
            self.others.insert(number(inode), name.to_owned());
        }
    }

    /// A memfd has contents also where nobody maps it.
    fn add_files(&mut self, pid: i32) {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for path in descriptors.flatten().map(|descriptor| descriptor.path()) {
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            // Nothing else is asked for more: its storage may not answer.
            let name = target.to_string_lossy();
            if name.starts_with(MEMFD)
                && let Ok(metadata) = fs::metadata(&path)
            {
                self.others
                    .insert(number(metadata.ino()), name.into_owned());
            }
        }
    }
}

/// The lower half of it.
const fn number(inode: u64) -> i32 {
    (inode as u32).cast_signed()
}

/// How names of mapped segments begin.
const SEGMENT: &str = "/SYSV";
const MEMFD: &str = "/memfd:";
const OTHERS: [&str; 3] = ["/dev/zero", MEMFD, "[anon_shmem:"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_segments_are_counted_and_namesakes_found() {
        let mut mapped = Mapped::default();
        for line in [
            "7f0000000000-7f0000001000 rw-s 00000000 00:01 5       /SYSV00000000 (deleted)",
            "7f0000001000-7f0000002000 r--s 00001000 00:01 5       /SYSV00000000 (deleted)",
            "7f0000002000-7f0000003000 rw-s 00000000 00:01 32769   /SYSV7066aaaa (deleted)",
            "7f0000003000-7f0000004000 rw-s 00000000 00:01 4294967303 /dev/zero (deleted)",
            "7f0000004000-7f0000005000 rw-p 00000000 00:00 0 ",
            "7f0000005000-7f0000006000 r-xp 00000000 08:01 6       /usr/bin/program",
        ] {
            mapped.add(line);
        }
        assert_eq!([5, 32769, 7].map(|id| mapped.count(id)), [2, 1, 0]);
        assert_eq!(mapped.namesake(7), Some("/dev/zero"));
        assert_eq!([5, 6].map(|id| mapped.namesake(id)), [None, None]);
    }
}
