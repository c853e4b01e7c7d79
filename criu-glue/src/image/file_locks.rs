//! `filelocks.img`: file locks that a restore is to take.
//!
//! CRIU takes each in the process that held it, while it restores, and waits until it has a record
//! lock. What cannot be had by then must not be in the image: [`take_out`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// The fields of use to us.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
struct Entry {
    /// The process, in the pid namespace of the tree.
    #[prost(int32, required, tag = "3")]
    pid: i32,
    #[prost(int32, required, tag = "4")]
    fd: i32,
}

/// Takes out of an images directory the locks that belong to a process and a descriptor as `which`
/// says; all others stay as they are. How many that were.
///
/// # Errors
/// [`ImageError`] with the file's path; the old file stays then.
pub fn take_out(images: &Path, which: impl Fn(i32, i32) -> bool) -> Result<usize, ImageError> {
    let path = images.join("filelocks.img");
    let bytes = match read_file(&path) {
        // Nobody held a lock.
        Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(0);
        }
        read => read?,
    };
    let (rest, left, taken) = split(&bytes, which).map_err(at(&path))?;
    let temporary = path.with_extension("img.new");
    let replaced = if left == 0 {
        fs::remove_file(&path)
    } else {
        File::create(&temporary)
            .and_then(|mut file| file.write_all(&rest))
            .and_then(|()| fs::rename(&temporary, &path))
    };
    replaced.map_err(|source| ImageError::Write { path, source })?;
    Ok(taken)
}

/// The image without some records, how many are left, and how many are not.
fn split(
    image: &[u8],
    which: impl Fn(i32, i32) -> bool,
) -> Result<(Vec<u8>, usize, usize), FormatError> {
    let magic = [MAGIC_COMMON, MAGIC];
    let mut rest: Vec<u8> = magic
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    let (mut left, mut taken) = (0, 0);
    for (index, record) in records(image, &magic)?.into_iter().enumerate() {
        let entry: Entry = decode(record, index)?;
        if which(entry.pid, entry.fd) {
            taken += 1;
            continue;
        }
        left += 1;
        let length = u32::try_from(record.len()).map_err(|_| FormatError::Value { index })?;
        rest.extend_from_slice(&length.to_le_bytes());
        rest.extend_from_slice(record);
    }
    Ok((rest, left, taken))
}

const MAGIC: u32 = 0x5432_3616;

#[cfg(test)]
mod tests {
    use super::*;

    /// flag 1, type 1, pid, fd, start 0, len 0, and a field that nobody knows.
    fn record(pid: u8, fd: u8) -> Vec<u8> {
        vec![8, 1, 16, 1, 24, pid, 32, fd, 40, 0, 48, 0, 56, 7]
    }

    fn image(all: &[(u8, u8)]) -> Vec<u8> {
        let mut image = [MAGIC_COMMON, MAGIC].map(u32::to_le_bytes).concat();
        for (pid, fd) in all {
            image.extend(14_u32.to_le_bytes());
            image.extend(record(*pid, *fd));
        }
        image
    }

    #[test]
    fn locks_are_taken_out_by_process_and_descriptor() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("filelocks.img");
        let taken = |which: &[(i32, i32)]| {
            let taken = take_out(folder.path(), |pid, fd| which.contains(&(pid, fd)));
            taken.expect("well formed")
        };
        assert_eq!(taken(&[(7, 3)]), 0, "there is no such image");
        fs::write(&path, image(&[(7, 3), (7, 4), (8, 3), (7, 3)])).expect("an image");
        assert_eq!(taken(&[(7, 3), (9, 9)]), 2);
        let left = fs::read(&path).expect("an image");
        assert_eq!(left, image(&[(7, 4), (8, 3)]));
        assert_eq!(taken(&[(7, 4), (8, 3)]), 2);
        assert!(
            !path.exists(),
            "CRIU takes a missing image for an empty one"
        );
    }

    #[test]
    fn an_image_that_is_cut_off_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("filelocks.img");
        let mut cut = image(&[(7, 3)]);
        cut.pop();
        fs::write(&path, &cut).expect("an image");
        assert!(take_out(folder.path(), |_, _| true).is_err());
        assert_eq!(fs::read(&path).expect("an image"), cut);
    }
}
