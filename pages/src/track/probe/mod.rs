//! What the kernel holds of a process, told by iterators of the kernel instead of by `/proc`.
//!
//! `/proc` tells one thing for each file that is opened and read, and some things only after a walk
//! over all memory. An iterator (`iter/task_vma` and its like, Linux 6.1) hands out one element
//! after the other to a program of ours, which picks fields of it: [`areas`] those of mappings,
//! [`files`] those of open descriptors, [`threads`] and [`calls`] those of threads. Each takes some
//! microseconds to begin, and a tenth of one for each element.
//!
//! The program is the few instructions of [`program`], with the places of the kernel's fields taken
//! from its own types ([`types`]). Without them, or without the right to load a program, there is
//! no probe, and `/proc` is read as if there were none.

pub mod areas;
pub mod calls;
pub mod files;
pub mod threads;
pub mod types;

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use pageferry_sys::bpf::{self, Whose};

use types::Types;

/// The types of the running kernel; the error says why they are not known.
pub fn kernel_types() -> io::Result<Types> {
    Types::parse(std::fs::read(KERNEL_TYPES)?).ok_or_else(unknown)
}

/// Loads a program that hands out records, for the iterator of this name.
fn load(types: &Types, iterator: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
    let iterator = types.function(iterator).ok_or_else(unknown)?;
    bpf::load_iterator(instructions, LICENSE, iterator)
}

/// A reading of the records of one process or thread, from the beginning.
struct Records {
    iterator: File,
    buffer: Vec<u8>,
}

impl Records {
    fn begin(program: &OwnedFd, whose: Whose) -> io::Result<Self> {
        let link = bpf::link_iterator(program.as_fd(), whose)?;
        Ok(Self {
            iterator: bpf::open_iterator(link)?,
            buffer: vec![0; READ_BYTES],
        })
    }

    /// The next ones, of `WORDS` words each; none at the end.
    fn next<const WORDS: usize>(&mut self) -> io::Result<Vec<[u64; WORDS]>> {
        let length = self.iterator.read(&mut self.buffer)?;
        let (words, rest) = self.buffer[..length].as_chunks::<8>();
        let (records, more) = words.as_chunks::<WORDS>();
        if !rest.is_empty() || !more.is_empty() {
            return Err(odd());
        }
        let read = |record: &[[u8; 8]; WORDS]| record.map(u64::from_ne_bytes);
        Ok(records.iter().map(read).collect())
    }

    /// All of them, at most `max`.
    fn all<const WORDS: usize>(mut self, max: usize) -> io::Result<Vec<[u64; WORDS]>> {
        let mut all = Vec::new();
        loop {
            let next = self.next::<WORDS>()?;
            if next.is_empty() {
                return Ok(all);
            }
            all.extend(next);
            if max < all.len() {
                return Err(odd());
            }
        }
    }
}

fn odd() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "an iterator of the kernel told of nothing, or of too much",
    )
}

fn unknown() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "the kernel's types are not of the known form",
    )
}

/// For every element of the iterator whose context is the structure `context`: what `copies` put
/// into the record, into the file that is being read. They find the element in [`ELEMENT`], the
/// context in [`CONTEXT`], and put words by [`put`].
fn program(types: &Types, context: &str, element: &str, copies: &[Vec<u64>]) -> Option<Vec<u64>> {
    let member = |name| types.member(context, name);
    let seq = types.member("bpf_iter_meta", "seq")?;
    let copied: usize = copies.iter().map(Vec::len).sum();
    let bytes = i16::try_from(copies.len()).ok()? * 8;
    let mut program = vec![
        instruction(MOVE, CONTEXT, R1, 0, 0),
        load_word(ELEMENT, CONTEXT, member(element)?),
        // Once more after the last element, without one: over what follows but the last two.
        instruction(JUMP_IF_ZERO, ELEMENT, 0, i16::try_from(copied + 6).ok()?, 0),
    ];
    program.extend(copies.iter().flatten());
    program.extend([
        load_word(R1, CONTEXT, member("meta")?),
        load_word(R1, R1, seq),
        instruction(MOVE, R2, FRAME, 0, 0),
        instruction(ADD_NUMBER, R2, 0, 0, -i32::from(bytes)),
        instruction(MOVE_NUMBER, R3, 0, 0, bytes.into()),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(MOVE_NUMBER, R0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    Some(program)
}

/// Word number `index` of a record of `words`: what [`R1`] holds after `loads`.
fn put(words: usize, index: usize, mut loads: Vec<u64>) -> Option<Vec<u64>> {
    let from_end = i16::try_from(8 * words.checked_sub(index)?).ok()?;
    loads.push(instruction(STORE, FRAME, R1, -from_end, 0));
    Some(loads)
}

/// `to = *(u64 *)(base + offset)`.
fn load_word(to: u8, base: u8, offset: i16) -> u64 {
    instruction(LOAD_64, to, base, offset, 0)
}

/// `to = *(u32 *)(base + offset)`.
fn load_half(to: u8, base: u8, offset: i16) -> u64 {
    instruction(LOAD_32, to, base, offset, 0)
}

/// `to = *(u16 *)(base + offset)`.
fn load_quarter(to: u8, base: u8, offset: i16) -> u64 {
    instruction(LOAD_16, to, base, offset, 0)
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
/// The kernel lets only a program under a licence compatible with its own see its structures. The
/// instructions above are offered under either of these two, beside the licence of the whole.
const LICENSE: &CStr = c"Dual MIT/GPL";
/// Twice what the kernel hands out at once (`bpf_seq_read`, eight pages).
const READ_BYTES: usize = 64 << 10;

// Operations (`Documentation/bpf/standardization/instruction-set.rst`).
const LOAD_64: u8 = 0x79;
const LOAD_32: u8 = 0x61;
const LOAD_16: u8 = 0x69;
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
const CONTEXT: u8 = 6;
const ELEMENT: u8 = 7;
/// The end of the stack of the program.
const FRAME: u8 = 10;
