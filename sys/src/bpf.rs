//! `bpf(2)`, as far as an iterator over what one task has needs it, and a program that decides
//! about each packet of a link.
//!
//! Iterators are in Linux since 5.8, those over what one task has since 6.1
//! (`union bpf_iter_link_info` in `include/uapi/linux/bpf.h`). Programs are attached to links by
//! TCX since 6.6, beside whatever others have there: for as long as somebody has a descriptor, or
//! for as long as the link is there ([`attach`]). Absent: what a program does; and maps, but for
//! one number.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Loads a program that is run for every element of an iterator (`BPF_TRACE_ITER`).
///
/// `iterator` is the id of the iterator's function among the types of the running kernel. The
/// kernel verifies the program; what it does not like it refuses.
pub fn load_iterator(instructions: &[u64], license: &CStr, iterator: u32) -> io::Result<OwnedFd> {
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let mut attributes = ProgramAttributes {
        program_type: PROGRAM_TYPE_TRACING,
        instruction_count: count,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: TRACE_ITERATOR,
        attach_type_id: iterator,
        ..ProgramAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below), and the slice and the string
    // it points to are borrowed for the whole call, with the lengths it says.
    unsafe { call(PROG_LOAD, &mut attributes) }
}

/// What an iterator goes over, by its number in this process's own pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// What one thread has.
    Thread(i32),
    /// What all threads of a process have.
    Process(i32),
}

/// Ties a loaded program to what a task has.
pub fn link_iterator(program: impl AsFd, whose: Whose) -> io::Result<OwnedFd> {
    let number = |number| u32::try_from(number).map_err(io::Error::other);
    let (thread, process) = match whose {
        Whose::Thread(thread) => (number(thread)?, 0),
        Whose::Process(process) => (0, number(process)?),
    };
    let which = TaskInfo {
        thread,
        process,
        ..TaskInfo::default()
    };
    let mut attributes = LinkAttributes {
        program: descriptor(&program)?,
        attach_type: TRACE_ITERATOR,
        info: &raw const which as u64,
        info_length: size_of::<TaskInfo>() as u32,
        ..LinkAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below) and points to `which`, which
    // lives until the end of this function, with its size.
    unsafe { call(LINK_CREATE, &mut attributes) }
}

/// A file that runs the program from the beginning as it is read.
pub fn open_iterator(link: impl AsFd) -> io::Result<File> {
    let mut attributes = IteratorAttributes {
        link: descriptor(&link)?,
        flags: 0,
    };
    // SAFETY: the structure has the kernel's layout and points to nothing.
    unsafe { call(ITER_CREATE, &mut attributes) }.map(File::from)
}

/// Loads a program that is run for every packet (`BPF_PROG_TYPE_SCHED_CLS`), to be attached to what
/// leaves by a link, or to what comes in by one. It has the name by which [`detach`] finds it:
/// none, or one of letters and `_`.
pub fn load_classifier(instructions: &[u64], license: &CStr, name: Name) -> io::Result<OwnedFd> {
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let mut attributes = ProgramAttributes {
        name,
        program_type: PROGRAM_TYPE_CLASSIFIER,
        instruction_count: count,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: TCX_EGRESS,
        ..ProgramAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below), and the slice and the string
    // it points to are borrowed for the whole call, with the lengths it says.
    unsafe { call(PROG_LOAD, &mut attributes) }
}

/// Attaches a loaded program to what leaves by the link `index` of the network namespace that the
/// calling thread is in, before the programs that others have there. It stays as long as the
/// descriptor. Blocks for some milliseconds, and so does closing the descriptor.
pub fn attach_egress(program: impl AsFd, index: u32) -> io::Result<OwnedFd> {
    let mut attributes = LinkAttributes {
        program: descriptor(&program)?,
        target: index,
        attach_type: TCX_EGRESS,
        flags: BEFORE,
        ..LinkAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below) and points to nothing: the
    // fields behind `flags` are those of TCX here, a relative and a revision, which are both none.
    unsafe { call(LINK_CREATE, &mut attributes) }
}

/// What a program is called, with the zeros that end it.
pub type Name = [u8; 16];

/// Which packets of a link a program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Those that come in by it.
    In,
    /// Those that leave by it.
    Out,
}

impl Way {
    const fn attach_type(self) -> u32 {
        match self {
            Self::In => TCX_INGRESS,
            Self::Out => TCX_EGRESS,
        }
    }
}

/// Attaches a loaded program to the link `index` of the network namespace that the calling thread
/// is in, before the programs that others have there. It stays as long as the link, whoever ends.
/// No packet is lost by that, as it would be where a queueing discipline has to be made for it.
/// Blocks for some milliseconds.
pub fn attach(program: impl AsFd, index: u32, way: Way) -> io::Result<()> {
    let mut attributes = AttachAttributes {
        target: index,
        program: descriptor(&program)?,
        attach_type: way.attach_type(),
        flags: BEFORE,
        ..AttachAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below) and points to nothing.
    unsafe { ask(PROG_ATTACH, &mut attributes) }.map(drop)
}

/// Takes programs of that name off a link, that [`attach`] has attached, whoever called it. Blocks
/// for some milliseconds if there are any.
pub fn detach(name: &Name, index: u32, way: Way) -> io::Result<()> {
    for id in attached(index, way)? {
        let Some(program) = open_program(id)? else {
            continue;
        };
        if name_of(&program)? != *name {
            continue;
        }
        let mut attributes = AttachAttributes {
            target: index,
            program: descriptor(&program)?,
            attach_type: way.attach_type(),
            ..AttachAttributes::default()
        };
        // SAFETY: the structure has the kernel's layout (asserted below) and points to nothing.
        match unsafe { ask(PROG_DETACH, &mut attributes) } {
            // Somebody else has done so meanwhile; or it is attached by a descriptor.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => {}
            detached => detached.map(drop)?,
        }
    }
    Ok(())
}

/// The ids of the programs that are attached to a link by TCX.
fn attached(index: u32, way: Way) -> io::Result<Vec<u32>> {
    let mut ids = [0; PROGRAMS_MAX];
    let mut attributes = QueryAttributes {
        target: index,
        attach_type: way.attach_type(),
        programs: ids.as_mut_ptr() as u64,
        count: PROGRAMS_MAX as u32,
        ..QueryAttributes::default()
    };
    // SAFETY: the structure has the kernel's layout (asserted below) and points to room for as many
    // ids as it says, which lives until the end of this function.
    unsafe { ask(PROG_QUERY, &mut attributes) }?;
    let count = usize::try_from(attributes.count).map_err(io::Error::other)?;
    Ok(ids.into_iter().take(count).collect())
}

/// The program of that id, if it is still there.
fn open_program(id: u32) -> io::Result<Option<OwnedFd>> {
    let mut attributes = IdAttributes {
        id,
        next: 0,
        flags: 0,
    };
    // SAFETY: the structure is the beginning of the kernel's and points to nothing.
    match unsafe { call(PROG_BY_ID, &mut attributes) } {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        opened => opened.map(Some),
    }
}

fn name_of(program: &OwnedFd) -> io::Result<Name> {
    let mut info = ProgramInfo::default();
    let mut attributes = InfoAttributes {
        object: descriptor(program)?,
        length: size_of::<ProgramInfo>() as u32,
        info: &raw mut info as u64,
    };
    // SAFETY: the structure has the kernel's layout (asserted below) and points to `info`, which
    // lives until the end of this function, with its size. It asks for no instructions and no maps:
    // what it says of room for them is 0.
    unsafe { ask(GET_INFO, &mut attributes) }?;
    Ok(info.name)
}

/// One number that a program can look up, by the key 0 (`BPF_MAP_TYPE_ARRAY`): 0 at the beginning.
#[derive(Debug)]
pub struct Number(OwnedFd);

impl Number {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        let mut attributes = MapAttributes {
            map_type: MAP_TYPE_ARRAY,
            key_size: size_of::<u32>() as u32,
            value_size: size_of::<u32>() as u32,
            entries: 1,
            flags: 0,
        };
        // SAFETY: the structure is the beginning of the kernel's and points to nothing.
        unsafe { call(MAP_CREATE, &mut attributes) }.map(Self)
    }

    /// Sets it: programs see it from then on.
    pub fn set(&self, value: u32) -> io::Result<()> {
        let key = 0_u32;
        let mut attributes = ElementAttributes {
            map: descriptor(&self.0)?,
            padding: 0,
            key: &raw const key as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        // SAFETY: the structure has the kernel's layout (asserted below) and points to two values
        // that live until the end of this function. The map is an array with keys and values of
        // their size: `new` has made it so, and `from_fd` takes no other.
        unsafe { ask(MAP_UPDATE_ELEMENT, &mut attributes) }.map(drop)
    }

    /// That of another process, which has handed it over. Anything but a map of such a form is an
    /// error.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut info = MapInfo::default();
        let mut attributes = InfoAttributes {
            object: descriptor(&fd)?,
            length: size_of::<MapInfo>() as u32,
            info: &raw mut info as u64,
        };
        // SAFETY: the structure has the kernel's layout (asserted below) and points to `info`,
        // which lives until the end of this function, with its size.
        unsafe { ask(GET_INFO, &mut attributes) }?;
        let size = size_of::<u32>() as u32;
        let form = [info.map_type, info.key_size, info.value_size, info.entries];
        if form != [MAP_TYPE_ARRAY, size, size, 1] {
            return Err(io::Error::other("it is no map of one number"));
        }
        Ok(Self(fd))
    }
}

impl AsFd for Number {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// # Safety
/// `attributes` must be what the kernel expects for `command`, and what it points to must be valid;
/// the command must be one that returns a new descriptor.
unsafe fn call<T>(command: libc::c_int, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise is the same.
    let fd = unsafe { ask(command, attributes) }?;
    // SAFETY: the command returns a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attributes` must be what the kernel expects for `command`, and what it points to must be valid.
unsafe fn ask<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes no more than the size says; the rest is the caller's
    // promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    let number = libc::c_int::try_from(result).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(number)
}

fn descriptor(fd: &impl AsFd) -> io::Result<u32> {
    u32::try_from(fd.as_fd().as_raw_fd()).map_err(io::Error::other)
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to the last field that is used.
#[repr(C)]
#[derive(Default)]
struct ProgramAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: Name,
    interface: u32,
    expected_attach_type: u32,
    types: u32,
    function_record_size: u32,
    functions: u64,
    function_count: u32,
    line_record_size: u32,
    lines: u64,
    line_count: u32,
    attach_type_id: u32,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_length: u32,
    reserved: u32,
}

/// `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
    relative: u32,
    revision: u64,
}

/// `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// `union bpf_attr` for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
struct IdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

/// `struct bpf_prog_info`, up to the last field that is used: the kernel fills as much as it is
/// given.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    program_type: u32,
    id: u32,
    tag: u64,
    compiled_length: u32,
    length: u32,
    compiled: u64,
    instructions: u64,
    loaded: u64,
    owner: u32,
    map_count: u32,
    maps: u64,
    name: Name,
}

/// `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct IteratorAttributes {
    link: u32,
    flags: u32,
}

/// `union bpf_iter_link_info` for tasks. The union is as long as its longest member.
#[repr(C)]
#[derive(Default)]
struct TaskInfo {
    thread: u32,
    process: u32,
    pidfd: u32,
    reserved: u32,
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, up to the last field that is used.
#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

/// `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct InfoAttributes {
    object: u32,
    length: u32,
    info: u64,
}

/// `struct bpf_map_info`, up to the last field that is used: the kernel fills as much as it is
/// given.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

const _: () = assert!(size_of::<ProgramAttributes>() == 112);
const _: () = assert!(size_of::<MapAttributes>() == 20);
const _: () = assert!(size_of::<ElementAttributes>() == 32);
const _: () = assert!(size_of::<InfoAttributes>() == 16);
const _: () = assert!(size_of::<MapInfo>() == 24);
const _: () = assert!(std::mem::offset_of!(ProgramAttributes, expected_attach_type) == 68);
const _: () = assert!(size_of::<LinkAttributes>() == 32);
const _: () = assert!(size_of::<TaskInfo>() == 16);
const _: () = assert!(size_of::<AttachAttributes>() == 32);
const _: () = assert!(size_of::<QueryAttributes>() == 64);
const _: () = assert!(std::mem::offset_of!(QueryAttributes, count) == 24);
const _: () = assert!(std::mem::offset_of!(ProgramInfo, name) == 64);

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEMENT: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_BY_ID: libc::c_int = 13;
const GET_INFO: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const MAP_TYPE_ARRAY: u32 = 2;
const PROGRAM_TYPE_CLASSIFIER: u32 = 3;
const PROGRAM_TYPE_TRACING: u32 = 26;
const TRACE_ITERATOR: u32 = 28;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// As many as the kernel has of one way of a link.
const PROGRAMS_MAX: usize = 64;
/// Without anything that it is relative to: before all.
const BEFORE: u32 = 1 << 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_handed_over_and_nothing_else_is_taken_for_one() {
        let number = Number::new().expect("CAP_BPF");
        number.set(7).expect("set");
        let other = number.0.try_clone().expect("a descriptor");
        let again = Number::from_fd(other).expect("it is one");
        again.set(0).expect("set");
        let file = File::open("/proc/self/exe").expect("a file");
        assert!(Number::from_fd(file.into()).is_err());
        let program = load_classifier(&[0xb7, 0x95], c"MIT", [0; 16]).expect("r0 = 0; exit");
        let refused = Number::from_fd(program).expect_err("a program");
        assert!(refused.to_string().contains("no map"), "{refused}");
    }

    #[test]
    fn what_a_link_does_not_know_is_refused() {
        // An unknown instruction, and a link that is none.
        assert!(load_classifier(&[0xff], c"MIT", [0; 16]).is_err());
        let program = load_classifier(&[0xb7, 0x95], c"MIT", [0; 16]).expect("r0 = 0; exit");
        assert!(attach_egress(&program, u32::MAX).is_err());
        assert!(attach(&program, u32::MAX, Way::In).is_err());
        assert!(detach(&[0; 16], u32::MAX, Way::Out).is_err());
    }
}
