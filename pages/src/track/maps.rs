//! `/proc/PID/maps`: what is mapped, in the words the tracker needs.
//!
//! `maps` is cheap (a tenth of a millisecond) where `smaps` walks the page tables (11 ms per GiB),
//! so it is what every round reads. It does not show the flags (`VmFlags`) of a mapping; what may
//! be tracked is therefore asked of the kernel by registering, and what may be hidden is decided
//! from `smaps` at the end.

use std::io;
use std::ops::Range;

use pageferry_proto::page::PageRun;

/// One mapping of a process: a line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its bytes, at page boundaries.
    pub range: Range<u64>,
    /// May be executed now.
    pub executable: bool,
    /// `MAP_PRIVATE`, as opposed to `MAP_SHARED`.
    pub private: bool,
    /// Major and minor number of the file's device; 0 without a file.
    pub device: (u32, u32),
    /// Inode of the file; 0 without a file.
    pub inode: u64,
    /// Path of the file, or a name in brackets, or nothing.
    pub name: String,
}

impl Mapping {
    /// Whether it is private memory of its own, without a file behind it: heap, stacks, arenas.
    /// Mappings the kernel makes for itself (vdso, vvar, uprobes) are not.
    pub fn is_private_anonymous(&self) -> bool {
        self.private && self.inode == 0 && self.has_anonymous_name()
    }

    fn has_anonymous_name(&self) -> bool {
        let name = self.name.as_str();
        name.is_empty()
            || name == "[heap]"
            || name == "[stack]"
            || (name.starts_with("[anon:") && name.ends_with(']'))
    }

    /// Whether it is a private mapping of a file, of which the process may have own copies of
    /// pages.
    pub fn is_private_file(&self) -> bool {
        self.private && self.inode != 0
    }

    /// Whether it is shared memory without a lasting file: CRIU dumps its contents.
    pub fn is_shared_memory(&self) -> bool {
        !self.private
            && (self.name.starts_with("/dev/zero (deleted)")
                || self.name.starts_with("/SYSV")
                || self.name.starts_with("/memfd:")
                || self.name.starts_with("[anon_shmem:"))
    }

    /// Whether it is one of those the kernel makes for every process.
    pub fn is_kernel_made(&self) -> bool {
        matches!(
            self.name.as_str(),
            "[vdso]" | "[vvar]" | "[vvar_vclock]" | "[vsyscall]" | "[uprobes]" | "[sigpage]"
        )
    }

    /// Whether CRIU may be shown it without pages, and a target may fill it later: private memory
    /// of its own that is neither executable nor locked nor of a special kind.
    ///
    /// CRIU serves more than this lazily, and less than this would be slower. Executable memory is
    /// left out because CRIU patches code while it dumps; locked memory because a restore locks it
    /// before it is there; huge pages, shadow stacks and droppable memory CRIU handles by itself.
    pub fn is_lazy(&self, flags: Flags) -> bool {
        self.is_private_anonymous() && !self.executable && !flags.any(Flags::NOT_LAZY)
    }

    /// Its pages; `None` for the mapping above the last user page (vsyscall).
    pub fn pages(&self) -> Option<PageRun> {
        PageRun::touching(&self.range).ok()
    }
}

/// The mappings of task `pid`, in order of address. Empty for a zombie.
pub fn read(pid: i32) -> io::Result<Vec<Mapping>> {
    parse(&read_text(pid)?).ok_or_else(unknown_form)
}

/// The text of `/proc/PID/maps`.
pub fn read_text(pid: i32) -> io::Result<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/maps"))
}

/// The text of `/proc/PID/smaps`: 11 ms per GiB of the process.
pub fn read_smaps_text(pid: i32) -> io::Result<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/smaps"))
}

/// The mappings of a running process with their flags. The kernel renders smaps in pieces, so a
/// process that maps and unmaps meanwhile may get a text that is none; then it is read again.
pub fn read_smaps(pid: i32) -> io::Result<Vec<(Mapping, Flags)>> {
    for _ in 1..SMAPS_ATTEMPTS {
        if let Some(mappings) = parse_smaps(&read_smaps_text(pid)?) {
            return Ok(mappings);
        }
    }
    parse_smaps(&read_smaps_text(pid)?).ok_or_else(unknown_form)
}

/// How often smaps is read before its form is called unknown.
const SMAPS_ATTEMPTS: usize = 10;

/// The error for a text that [`parse`] or [`parse_smaps`] does not know.
pub fn unknown_form() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unknown form of maps")
}

/// All mappings of a `maps` file; `None` when a line is not of the known form.
pub fn parse(text: &[u8]) -> Option<Vec<Mapping>> {
    lines(text).map(parse_line).collect()
}

/// All mappings of a `smaps` file with their flags; `None` when a line is not of the known form.
pub fn parse_smaps(text: &[u8]) -> Option<Vec<(Mapping, Flags)>> {
    let mut mappings: Vec<(Mapping, Flags)> = Vec::new();
    for line in lines(text) {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            mappings.last_mut()?.1 = Flags::parse(flags);
        } else if !line[0].is_ascii_uppercase() {
            mappings.push((parse_line(line)?, Flags::default()));
        }
    }
    Some(mappings)
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
}

/// Those `VmFlags` of a mapping that decide how its pages travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// `lo`: locked in memory.
    pub const LOCKED: Self = Self(1 << 0);
    /// `ht`: huge pages of hugetlbfs.
    pub const HUGETLB: Self = Self(1 << 1);
    /// `io`: memory of a device.
    pub const IO: Self = Self(1 << 2);
    /// `pf`: page frames without pages.
    pub const PFNMAP: Self = Self(1 << 3);
    /// `dp`: may be dropped by the kernel (`MAP_DROPPABLE`); worth nothing at the target.
    pub const DROPPABLE: Self = Self(1 << 4);
    /// `ss`: a shadow stack.
    pub const SHADOW_STACK: Self = Self(1 << 5);

    const NOT_LAZY: Self = Self(0b11_1111);

    const NAMES: [(&'static [u8], Self); 6] = [
        (b"lo", Self::LOCKED),
        (b"ht", Self::HUGETLB),
        (b"io", Self::IO),
        (b"pf", Self::PFNMAP),
        (b"dp", Self::DROPPABLE),
        (b"ss", Self::SHADOW_STACK),
    ];

    fn parse(words: &[u8]) -> Self {
        let known = |word| Self::NAMES.iter().find(|(name, _)| *name == word);
        let words = words.split(u8::is_ascii_whitespace);
        Self(
            words
                .filter_map(known)
                .fold(0, |flags, (_, flag)| flags | flag.0),
        )
    }

    /// Whether one of `others` is among them.
    pub const fn any(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// The flags of either.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// `start-end perms offset major:minor inode   name`; the name may hold anything but a newline.
fn parse_line(line: &[u8]) -> Option<Mapping> {
    let line = String::from_utf8_lossy(line);
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let _offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?;
    let name = fields.next().unwrap_or_default().trim_start();
    if permissions.len() != 4 {
        return None;
    }
    Some(Mapping {
        range: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        executable: permissions[2] == b'x',
        private: permissions[3] == b'p',
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode: inode.parse().ok()?,
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_kinds_are_read() {
        let text = b"\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 ---p 00000000 00:00 0 
7f0000021000-7f0000022000 rw-p 00002000 fe:01 1310                       /usr/lib/a b.so (deleted)
7f0000030000-7f0000031000 rw-s 00000000 00:01 7                          /dev/zero (deleted)
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
7ffe00030000-7ffe00032000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let maps = parse(text).unwrap();
        let anonymous: Vec<bool> = maps.iter().map(Mapping::is_private_anonymous).collect();
        assert_eq!(anonymous, [true, true, false, false, true, false, false]);
        assert_eq!(maps[2].name, "/usr/lib/a b.so (deleted)");
        assert_eq!((maps[2].device, maps[2].inode), ((0xfe, 1), 1310));
        assert!(maps[2].is_private_file() && maps[3].is_shared_memory());
        assert!(maps[5].is_kernel_made() && maps[5].executable);
    }

    #[test]
    fn flags_decide_what_is_lazy() {
        let text = b"\
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
Rss:                   4 kB
VmFlags: rd wr mr mw me ac 
7f0000030000-7f0000031000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me lo ac 
7f0000040000-7f0000041000 rwxp 00000000 00:00 0 
VmFlags: rd wr ex mr mw me ac 
";
        let maps = parse_smaps(text).unwrap();
        let lazy: Vec<bool> = maps
            .iter()
            .map(|(mapping, flags)| mapping.is_lazy(*flags))
            .collect();
        assert_eq!(lazy, [true, false, false]);
        assert!(maps[1].1.any(Flags::LOCKED));
    }

    #[test]
    fn a_line_of_another_form_is_not_guessed() {
        assert_eq!(parse(b"7f00-7f10 rw- 0 00:00 0\n"), None);
        assert_eq!(parse(b"nonsense\n"), None);
    }

    #[test]
    fn the_maps_of_this_process_have_a_stack() {
        let maps = read(std::process::id().cast_signed()).unwrap();
        assert!(maps.iter().any(|mapping| mapping.name == "[stack]"));
    }
}
