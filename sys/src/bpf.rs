//! `bpf(2)`, as far as an iterator over what one task has needs it.
//!
//! Iterators are in Linux since 5.8, those over what one task has since 6.1
//! (`union bpf_iter_link_info` in `include/uapi/linux/bpf.h`). Absent: what the program does, and
//! everything about maps; a program here has nothing but what it writes.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

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

/// # Safety
/// `attributes` must be what the kernel expects for `command`, and what it points to must be valid.
unsafe fn call<T>(command: libc::c_int, attributes: &mut T) -> io::Result<OwnedFd> {
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
    let fd = libc::c_int::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all three commands return a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
    name: [u8; 16],
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

const _: () = assert!(size_of::<ProgramAttributes>() == 112);
const _: () = assert!(std::mem::offset_of!(ProgramAttributes, expected_attach_type) == 68);
const _: () = assert!(size_of::<LinkAttributes>() == 32);
const _: () = assert!(size_of::<TaskInfo>() == 16);

const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const PROGRAM_TYPE_TRACING: u32 = 26;
const TRACE_ITERATOR: u32 = 28;
