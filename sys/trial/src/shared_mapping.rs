//! A shared mapping of a file, for tests that need this process to have one.

#![allow(unsafe_code)]

use std::fs::File;

use memmap2::{MmapMut, MmapOptions, MmapRaw};

/// Maps the whole of `file`, writable.
pub fn writable(file: &File) -> MmapMut {
    // SAFETY: the file is the test's own, and nobody makes it shorter.
    unsafe { MmapOptions::new().map_mut(file) }.expect("a file that can be mapped")
}

/// Maps the whole of `file`, which is open for writing, and forbids to write there for now.
pub fn write_later(file: &File) -> MmapRaw {
    let mapping = writable(file).make_read_only().expect("mprotect");
    mapping.into()
}
