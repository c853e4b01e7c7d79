//! The build id of an ELF file: what tells two builds of a library with the same size apart.
//!
//! Reads only the program headers and the note segments, with every length bounded. Absent: 32-bit
//! and big-endian files, which have no build id here and are compared by size alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Program headers looked at; linkers write about a dozen.
const HEADERS_MAX: u16 = 128;

/// Bytes of one note segment read; a build id needs 36.
const NOTES_MAX: u64 = 64 << 10; // 64 KiB

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The build id of `file`, empty if it has none or is not a 64-bit little-endian ELF file.
pub fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER_LEN];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
        result => result?,
    }
    // Magic, 64-bit class, little-endian data.
    if header[..6] != [0x7f, b'E', b'L', b'F', 2, 1] {
        return Ok(Vec::new());
    }
    let table = u64_at(&header, 32);
    let entry_len = u16_at(&header, 54);
    let entries = u16_at(&header, 56).min(HEADERS_MAX);
    if usize::from(entry_len) < PROGRAM_HEADER_LEN {
        return Ok(Vec::new());
    }
    for number in 0..entries {
        let mut entry = [0; PROGRAM_HEADER_LEN];
        let Some(offset) = table.checked_add(u64::from(number) * u64::from(entry_len)) else {
            return Ok(Vec::new());
        };
        if file.read_exact_at(&mut entry, offset).is_err() {
            return Ok(Vec::new());
        }
        if u32_at(&entry, 0) != PT_NOTE {
            continue;
        }
        let mut notes = vec![0; u64_at(&entry, 32).min(NOTES_MAX) as usize];
        if file.read_exact_at(&mut notes, u64_at(&entry, 8)).is_err() {
            continue;
        }
        if let Some(id) = find(&notes) {
            return Ok(id.to_vec());
        }
    }
    Ok(Vec::new())
}

/// Walks notes: name length, description length, type, name and description padded to four.
fn find(mut notes: &[u8]) -> Option<&[u8]> {
    while notes.len() >= 12 {
        let name_len = u32_at(notes, 0) as usize;
        let description_len = u32_at(notes, 4) as usize;
        let kind = u32_at(notes, 8);
        let rest = &notes[12..];
        let name = rest.get(..name_len)?;
        let rest = rest.get(name_len.next_multiple_of(4)..)?;
        let description = rest.get(..description_len)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            return Some(description);
        }
        notes = rest.get(description_len.next_multiple_of(4)..)?;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_has_a_build_id_of_twenty_bytes() {
        let shell = File::open("/bin/sh").expect("a shell");
        assert_eq!(read(&shell).expect("readable").len(), 20);
    }

    #[test]
    fn a_text_file_has_none() {
        let text = File::open("/etc/passwd").expect("a text file");
        assert_eq!(read(&text).expect("readable"), Vec::<u8>::new());
    }

    #[test]
    fn notes_cut_anywhere_are_no_build_id_and_no_panic() {
        let mut notes = Vec::new();
        for word in [4u32, 4, 3] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"GNU\0");
        notes.extend([1, 2, 3, 4]);
        assert_eq!(find(&notes), Some(&[1, 2, 3, 4][..]));
        for cut in 0..notes.len() {
            assert_eq!(find(&notes[..cut]), None);
        }
    }
}
