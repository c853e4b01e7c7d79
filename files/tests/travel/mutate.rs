//! What programs do to folders.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, XattrFlags};

/// Something that happens, to entries by their number.
#[derive(Clone, Debug)]
pub struct Mutation {
    what: u8,
    one: usize,
    other: usize,
    place: u64,
    length: usize,
}

pub fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let place = prop_oneof![
        0_u64..5000,
        100_000_u64..300_000,
        (1_u64 << 23)..(1 << 23) + 9000
    ];
    let mutation = (0_u8..18, 0_usize..1000, 0_usize..1000, place, 1_usize..9000);
    let mutation = mutation.prop_map(|(what, one, other, place, length)| Mutation {
        what,
        one,
        other,
        place,
        length,
    });
    proptest::collection::vec(mutation, 1..40)
}

/// Everything in the folder, itself first.
fn all(root: &Path) -> (Vec<PathBuf>, Vec<PathBuf>, Vec<PathBuf>) {
    let (mut folders, mut files, mut others) = (vec![root.to_owned()], Vec::new(), Vec::new());
    let mut next = 0;
    while next < folders.len() {
        let mut names: Vec<_> = fs::read_dir(&folders[next])
            .expect("a folder")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        names.sort();
        for path in names {
            let kind = fs::symlink_metadata(&path).expect("an entry").file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                files.push(path);
            } else {
                others.push(path);
            }
        }
        next += 1;
    }
    (folders, files, others)
}

fn pick(all: &[PathBuf], number: usize) -> Option<&PathBuf> {
    (!all.is_empty()).then(|| &all[number % all.len()])
}

/// Does all of it, where it can be done; returns what stays mapped.
pub fn mutate(root: &Path, mutations: &[Mutation]) -> Vec<Box<dyn std::any::Any>> {
    let mut mapped: Vec<Box<dyn std::any::Any>> = Vec::new();
    for (number, mutation) in mutations.iter().enumerate() {
        let (folders, files, others) = all(root);
        let folder = pick(&folders, mutation.one).expect("the folder itself");
        let name = folder.join(format!("n{}-{number}", mutation.other % 7));
        let file = pick(&files, mutation.other);
        if let Some(mapping) = change_file(mutation, file) {
            mapped.push(mapping);
        }
        change_names(mutation, &name, (&folders, &files, &others));
    }
    mapped
}

fn bytes(mutation: &Mutation) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at / 700 + mutation.one) % 5).unwrap_or(0);
    (0..mutation.length).map(byte).collect()
}

fn change_file(mutation: &Mutation, file: Option<&PathBuf>) -> Option<Box<dyn std::any::Any>> {
    let path = file?;
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("a file")
    };
    let is_long = 1 << 30 < fs::metadata(path).expect("a file").len();
    match mutation.what {
        0 => open()
            .write_all_at(&bytes(mutation), mutation.place)
            .expect("a write"),
        1 => {
            let file = open();
            if !is_long && 0 < file.metadata().expect("a file").len() {
                let mut mapping = pageferry_trial::shared_mapping::writable(&file);
                let at = mutation.one * 37 % mapping.len();
                mapping[at] ^= 1;
                return Some(Box::new(mapping));
            }
        }
        2 => open().set_len(mutation.place).expect("a length"),
        3 => {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (place, length) = (mutation.place, mutation.length as u64 * 20);
            rustix::fs::fallocate(open(), how, place, length).expect("a hole");
        }
        4 => {
            let time = SystemTime::UNIX_EPOCH + Duration::new(mutation.place, 987_654_321);
            open().set_modified(time).expect("a time");
        }
        5 => {
            let mode = (u32::try_from(mutation.one).expect("a number") * 11) & 0o7777;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
        }
        6 => {
            let name = format!("user.test{}", mutation.one % 3);
            let value = vec![b'x'; mutation.length % 200];
            // A tmpfs may have none.
            let _ = rustix::fs::lsetxattr(path, name, &value, XattrFlags::empty());
        }
        7 => {
            let _ = rustix::fs::lremovexattr(path, format!("user.test{}", mutation.one % 3));
        }
        _ => {}
    }
    None
}

fn change_names(
    mutation: &Mutation,
    name: &Path,
    (folders, files, others): (&[PathBuf], &[PathBuf], &[PathBuf]),
) {
    match mutation.what {
        8 => drop(File::create_new(name).map(|file| file.write_all_at(&bytes(mutation), 0))),
        9 => drop(fs::create_dir(name)),
        10 => drop(symlink(format!("to/{}", mutation.length), name)),
        11 => {
            let kind = match mutation.one % 3 {
                0 => FileType::Fifo,
                1 => FileType::CharacterDevice,
                _ => FileType::Socket,
            };
            // A whiteout of an overlay is a character device of number 0.
            let _ = rustix::fs::mknodat(CWD, name, kind, Mode::RUSR, 0);
        }
        12 => {
            if let Some(file) = pick(files, mutation.other) {
                drop(fs::hard_link(file, name));
            }
        }
        13 => {
            // Over another, or of a folder into itself, which the kernel refuses.
            let from = pick(files, mutation.other).or(pick(folders, mutation.other));
            let to = pick(files, mutation.length).map_or(name, PathBuf::as_path);
            let from = from.map_or(name, PathBuf::as_path);
            drop(fs::rename(
                from,
                if mutation.length.is_multiple_of(2) {
                    to
                } else {
                    name
                },
            ));
        }
        14 => {
            if let Some(folder) = pick(folders, mutation.other).filter(|it| **it != folders[0]) {
                drop(fs::rename(folder, name));
            }
        }
        15 => {
            if let Some(gone) = pick(files, mutation.other).or(pick(others, mutation.other)) {
                drop(fs::remove_file(gone));
            }
        }
        16 => {
            if let Some(folder) = pick(folders, mutation.other).filter(|it| **it != folders[0]) {
                drop(fs::remove_dir_all(folder));
            }
        }
        17 => {
            let number = u32::try_from(mutation.length).expect("a number");
            for all in [folders, others] {
                if let Some(path) = pick(all, mutation.other) {
                    lchown(path, Some(number), Some(number + 1)).expect("an owner");
                }
            }
        }
        _ => {}
    }
}
