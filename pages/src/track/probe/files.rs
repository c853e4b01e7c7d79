//! The open files of a process, as the kernel holds them.
//!
//! `/proc` tells the flags of one descriptor for 3 us and its name for another. Here all of them
//! come in one go: 0.1 ms for a thousand.
//!
//! Absent: names. What kind of file it is shows in its mode, and files of one driver have the same
//! operations, so that a name need be read for one of them only.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use pageferry_sys::bpf::Whose;

use super::types::Types;
use super::{
    CONTEXT, ELEMENT, JUMP_IF_ZERO, MOVE_NUMBER, R1, R2, Records, instruction, load, load_half,
    load_quarter, load_word, odd, program, put, unknown,
};

/// Reads the descriptor tables of processes.
#[derive(Debug)]
pub struct Files {
    program: OwnedFd,
}

/// The open files of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Those of the table that the process's first thread has.
    pub files: Vec<OpenFile>,
    /// Some thread has a table of its own, with files in it that are not told here.
    pub own_tables: bool,
}

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// Its number.
    pub number: i32,
    /// The `O_` flags that the file has now.
    pub flags: i32,
    /// Kind and permissions of its inode, as in `st_mode`.
    pub mode: u32,
    /// Number of its inode.
    pub inode: u64,
    /// The kernel's code for it: files with the same value are of one driver.
    pub operations: u64,
    /// Files with the same value have the same name.
    pub entry: u64,
}

impl Files {
    /// Loads the program. The error says why there is none on this node.
    pub fn load(types: &Types) -> io::Result<Self> {
        let instructions = instructions(types).ok_or_else(unknown)?;
        let probe = Self {
            program: load(types, ITERATOR, &instructions)?,
        };
        // Fields that are not where they should be would not be these.
        let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let known = std::fs::File::open("/dev/null")?;
        let inode = std::os::unix::fs::MetadataExt::ino(&known.metadata()?);
        let is_known = |file: &OpenFile| {
            file.number == known.as_raw_fd()
                && file.flags & libc::O_ACCMODE == libc::O_RDONLY
                && file.mode & libc::S_IFMT == libc::S_IFCHR
                && file.inode == inode
        };
        if probe.of(own)?.files.iter().any(is_known) {
            Ok(probe)
        } else {
            Err(odd())
        }
    }

    /// Those of a process; none if it has ended. A process that opens and closes meanwhile may be
    /// told of as it was at no single moment.
    pub fn of(&self, pid: i32) -> io::Result<Open> {
        let records = Records::begin(&self.program, Whose::Process(pid))?;
        let mut open = Open::default();
        for record in records.all::<WORDS>(FILES_MAX)? {
            let [
                thread,
                process,
                number,
                flags,
                mode,
                inode,
                operations,
                entry,
            ] = record;
            if thread != process {
                open.own_tables = true;
                continue;
            }
            let small = |word: u64| u32::try_from(word).map_err(|_| odd());
            open.files.push(OpenFile {
                number: small(number)?.cast_signed(),
                flags: small(flags)?.cast_signed(),
                mode: small(mode)?,
                inode,
                operations,
                entry,
            });
        }
        Ok(open)
    }
}

/// For every descriptor: whose it is, its number, its flags, and what of its file.
fn instructions(types: &Types) -> Option<Vec<u64>> {
    let context = |name| types.member("bpf_iter__task_file", name);
    let task = |name| {
        Some(vec![
            instruction(MOVE_NUMBER, R1, 0, 0, 0),
            load_word(R2, CONTEXT, context("task")?),
            // As far as the kernel's own checks know there may be none.
            instruction(JUMP_IF_ZERO, R2, 0, 1, 0),
            load_half(R1, R2, types.member("task_struct", name)?),
        ])
    };
    let file = |name| types.member("file", name);
    let load_inode = load_word(R2, ELEMENT, file("f_inode")?);
    let inode = |name| types.member("inode", name);
    let entry = file("f_path")?.checked_add(types.member("path", "dentry")?)?;
    let loads = [
        task("pid")?,
        task("tgid")?,
        vec![load_half(R1, CONTEXT, context("fd")?)],
        vec![load_half(R1, ELEMENT, file("f_flags")?)],
        vec![load_inode, load_quarter(R1, R2, inode("i_mode")?)],
        vec![load_inode, load_word(R1, R2, inode("i_ino")?)],
        vec![load_word(R1, ELEMENT, file("f_op")?)],
        vec![load_word(R1, ELEMENT, entry)],
    ];
    let copies = loads.into_iter().enumerate();
    let copies: Option<Vec<_>> = copies
        .map(|(index, loads)| put(WORDS, index, loads))
        .collect();
    program(types, "bpf_iter__task_file", "file", &copies?)
}

const ITERATOR: &str = "bpf_iter_task_file";
const WORDS: usize = 8;
/// Four times what a process may have by default (`fs.nr_open`).
const FILES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::probe::{KERNEL_TYPES, kernel_types};
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::collections::BTreeMap;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    #[test]
    fn the_iterator_tells_of_the_files_that_proc_tells_of() {
        if !std::path::Path::new(KERNEL_TYPES).exists() {
            eprintln!("this kernel does not tell its types");
            return;
        }
        let probe = Files::load(&kernel_types().unwrap()).unwrap();
        // More than fit into one read of the iterator, of several kinds. Other tests open and close
        // in the same process, so only these are compared.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
        let mut options = std::fs::File::options();
        options.read(true);
        let mut files = Vec::new();
        for index in 0..3000 {
            options.custom_flags(if index % 3 == 0 { libc::O_DIRECT } else { 0 });
            files.push(options.open(std::env::current_exe().unwrap()).unwrap());
        }
        files.push(std::fs::File::open("/dev/urandom").unwrap());
        files.push(std::fs::File::open("/").unwrap());
        let told = probe.of(std::process::id().cast_signed()).unwrap();
        let told: BTreeMap<i32, OpenFile> =
            told.files.iter().map(|file| (file.number, *file)).collect();
        for file in &files {
            let number = file.as_raw_fd();
            let metadata = file.metadata().unwrap();
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap() & !libc::O_CLOEXEC;
            let told = told[&number];
            assert_eq!(told.flags & !libc::O_CLOEXEC, flags, "{info}");
            assert_eq!((told.mode, told.inode), (metadata.mode(), metadata.ino()));
        }
        let of = |place: usize| told[&files[place].as_raw_fd()];
        assert_eq!(
            (of(0).operations, of(0).entry),
            (of(1).operations, of(1).entry)
        );
        assert_ne!(of(0).operations, of(3000).operations);
        assert_ne!(of(0).entry, of(3000).entry);
    }
}
