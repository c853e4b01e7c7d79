//! Compares two folders entry by entry, by other means than the crate does.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What an entry is, in words; two folders are equal if all of theirs are.
pub fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut links = HashMap::new();
    let mut folders = vec![PathBuf::new()];
    let mut names = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).expect("a folder") {
            let entry = entry.expect("an entry");
            let name = folder.join(entry.file_name());
            if entry.file_type().expect("a kind").is_dir() {
                folders.push(name.clone());
            }
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        let path = match name.as_os_str().is_empty() {
            true => root.to_owned(),
            false => root.join(&name),
        };
        let metadata = fs::symlink_metadata(&path).expect("an entry");
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            "folder".to_owned()
        } else if kind.is_symlink() {
            format!(
                "link to {}",
                fs::read_link(&path).expect("a link").display()
            )
        } else if kind.is_file() {
            let bytes = fs::read(&path).expect("a file");
            format!("file {} {:?}", bytes.len(), sum(&bytes))
        } else if kind.is_fifo() || kind.is_socket() {
            format!("{kind:?}")
        } else {
            format!("device {}", metadata.rdev())
        };
        let first = links
            .entry((metadata.dev(), metadata.ino()))
            .or_insert_with(|| name.clone())
            .clone();
        let size = if kind.is_dir() { 0 } else { metadata.nlink() };
        let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
        let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
        let xattrs = xattrs(&path);
        all.insert(
            name,
            format!(
                "{content}, {mode:o} {uid}:{gid} {seconds}.{nanos:09}, {size} names, the first {}, \
                 {xattrs:?}",
                first.display()
            ),
        );
    }
    all
}

/// Not the hash that is tested.
fn sum(bytes: &[u8]) -> (u64, u64) {
    bytes
        .iter()
        .fold((14_695_981_039_346_656_037, 0), |(hash, sum), byte| {
            let hash = (hash ^ u64::from(*byte)).wrapping_mul(1_099_511_628_211);
            (hash, (sum + u64::from(*byte)) * 3 % 1_000_000_007)
        })
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let name = String::from_utf8(name.to_vec()).expect("a name");
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, OsStr::new(&name), &mut value[..]);
            value.truncate(length.expect("an attribute"));
            (name, value)
        })
        .collect()
}

/// Fails with the first entries that are not the same.
pub fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (describe(one), describe(other));
    if one == other {
        return;
    }
    let names: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let odd = names
        .into_iter()
        .filter(|name| one.get(*name) != other.get(*name));
    let odd: Vec<String> = odd
        .take(5)
        .map(|name| {
            let (one, other) = (one.get(name), other.get(name));
            format!("{}:\n  {one:?}\n  {other:?}", name.display())
        })
        .collect();
    panic!("the folders differ:\n{}", odd.join("\n"));
}
