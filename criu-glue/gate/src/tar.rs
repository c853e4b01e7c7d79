//! What CRIU finds as `tar`: it has that write and read what is in each tmpfs of a container, and
//! has it start `gzip` by a shell, all while the container stands still. Most of those have no
//! files, only folders, links and devices. These are written and read here; for all else, and
//! whatever goes wrong before anything is done, the real `tar` is started in our place.
//!
//! Invariants: what is written is what `tar` reads, in a gzip whose blocks are stored; nothing is
//! written before all of it is known to be of these kinds, and nothing is read but such; nothing is
//! made but in folders of the archive's own, whatever its links lead to; what fails behind its
//! first change fails, and is not done once more by another.

use std::collections::{BTreeMap, HashSet};
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, major, makedev, minor, mknod, utimensat};
use nix::sys::time::TimeSpec;
use tar::{Archive, Builder, EntryType, Header};

/// How CRIU asks for an archive of a folder, whose name comes between these.
const WRITE: [&str; 9] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
];
const READ: [&str; 4] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards"];
const FOLDER: &str = "--directory";
const ALL: &str = ".";

/// Most entries of what is done here, and bytes of an archive.
const ENTRIES_MAX: usize = 1024;
const BYTES_MAX: u64 = 2 << 20; // 2 MiB

/// A gzip's head without a name and a time, and the most that one stored block has.
const HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
const BLOCK_MAX: usize = 0xffff;

/// Why it is not done here.
#[derive(Debug)]
enum Undone {
    /// It is as it was, and the real one may do it.
    Whole(io::Error),
    /// Some of it is done, or nobody else can do it any more.
    Begun(io::Error),
}

impl From<io::Error> for Undone {
    fn from(error: io::Error) -> Self {
        Self::Whole(error)
    }
}

/// Does what CRIU asks for; comes back only if it fails, or nothing can be started.
pub fn run(arguments: &[OsString]) -> io::Error {
    let done = match asked(arguments) {
        Some(Asked::Write(folder)) => write(&folder),
        Some(Asked::Read(folder)) => read(&folder),
        None => Err(io::Error::from(io::ErrorKind::Unsupported).into()),
    };
    match done {
        Ok(()) => std::process::exit(0),
        Err(Undone::Whole(why)) => real(arguments, why),
        Err(Undone::Begun(error)) => error,
    }
}

enum Asked {
    Write(PathBuf),
    Read(PathBuf),
}

fn asked(arguments: &[OsString]) -> Option<Asked> {
    let begins = |words: &[&str]| {
        let (known, rest) = arguments.split_at_checked(words.len())?;
        (known.iter().zip(words).all(|(has, word)| has == word)).then_some(rest)
    };
    if let Some([name, folder, all]) = begins(&WRITE) {
        return (name == FOLDER && all == ALL).then(|| Asked::Write(folder.into()));
    }
    match begins(&READ)? {
        [name, folder] if name == FOLDER => Some(Asked::Read(folder.into())),
        _ => None,
    }
}

/// Becomes the next `tar` there is; fails with `why` if there is none.
fn real(arguments: &[OsString], why: io::Error) -> io::Error {
    // One that does not know itself would start itself, for ever.
    let own = match fs::metadata("/proc/self/exe") {
        Ok(own) => (own.dev(), own.ino()),
        Err(error) => return error,
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let mut all = env::split_paths(&path).map(|folder| folder.join("tar"));
    let real = all.find(|program| {
        let is = fs::metadata(program);
        is.is_ok_and(|is| is.is_file() && (is.dev(), is.ino()) != own)
    });
    match real {
        Some(real) => Command::new(real).arg0("tar").args(arguments).exec(),
        None => why,
    }
}

fn write(folder: &Path) -> Result<(), Undone> {
    let bytes = archived(folder)?;
    let mut out = io::stdout().lock();
    let written = out.write_all(&bytes).and_then(|()| out.flush());
    written.map_err(Undone::Begun)
}

/// A gzip of an archive of the folder.
fn archived(folder: &Path) -> io::Result<Vec<u8>> {
    // It is a descriptor's name: the folder itself, whatever is mounted over it.
    env::set_current_dir(folder)?;
    let top = fs::symlink_metadata(ALL)?;
    let mut entries = BTreeMap::from([(PathBuf::from("./"), top)]);
    let mut folders = vec![PathBuf::from(ALL)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = folder.join(entry?.file_name());
            let has = fs::symlink_metadata(&path)?;
            let same = has.dev() == entries.values().next().map_or(0, MetadataExt::dev);
            if !same || entries.len() == ENTRIES_MAX || kind(&has).is_none() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            if has.is_dir() {
                folders.push(path.clone());
            }
            entries.insert(path, has);
        }
    }
    let mut archive = Builder::new(Vec::new());
    for (path, has) in &entries {
        append(&mut archive, path, has)?;
    }
    Ok(stored(&archive.into_inner()?))
}

/// What it is, if that is done here. With another name it would be a link to a file.
fn kind(has: &Metadata) -> Option<EntryType> {
    let kind = has.file_type();
    match () {
        () if kind.is_dir() => Some(EntryType::Directory),
        () if has.nlink() != 1 => None,
        () if kind.is_symlink() => Some(EntryType::Symlink),
        () if kind.is_char_device() => Some(EntryType::Char),
        () if kind.is_block_device() => Some(EntryType::Block),
        () => None,
    }
}

fn append(archive: &mut Builder<Vec<u8>>, path: &Path, has: &Metadata) -> io::Result<()> {
    let kind = kind(has).ok_or(io::ErrorKind::Unsupported)?;
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(has.mode() & 0o7777);
    header.set_uid(has.uid().into());
    header.set_gid(has.gid().into());
    header.set_mtime(u64::try_from(has.mtime()).map_err(io::Error::other)?);
    header.set_size(0);
    let number = |part: u64| u32::try_from(part).map_err(io::Error::other);
    let (high, low) = match kind {
        EntryType::Char | EntryType::Block => {
            (number(major(has.rdev()))?, number(minor(has.rdev()))?)
        }
        _ => (0, 0),
    };
    header.set_device_major(high)?;
    header.set_device_minor(low)?;
    let name = path.as_os_str().as_bytes();
    let name = if kind == EntryType::Directory && !name.ends_with(b"/") {
        [name, b"/"].concat()
    } else {
        name.to_vec()
    };
    let gnu = header.as_gnu_mut().ok_or(io::ErrorKind::Unsupported)?;
    // A longer one would need more than one entry.
    let place = gnu
        .name
        .get_mut(..name.len())
        .ok_or(io::ErrorKind::Unsupported)?;
    place.copy_from_slice(&name);
    if kind == EntryType::Symlink {
        let to = fs::read_link(path)?;
        let to = to.as_os_str().as_bytes();
        let place = gnu
            .linkname
            .get_mut(..to.len())
            .ok_or(io::ErrorKind::Unsupported)?;
        place.copy_from_slice(to);
    }
    header.set_cksum();
    archive.append(&header, io::empty())
}

/// A gzip of it that costs nothing.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut written = HEAD.to_vec();
    let blocks = bytes.len().div_ceil(BLOCK_MAX);
    for (number, block) in bytes.chunks(BLOCK_MAX).enumerate() {
        let length = block.len() as u16;
        written.push(u8::from(number + 1 == blocks));
        written.extend(length.to_le_bytes());
        written.extend((!length).to_le_bytes());
        written.extend(block);
    }
    written.extend(crc32fast::hash(bytes).to_le_bytes());
    written.extend((bytes.len() as u32).to_le_bytes());
    written
}

/// What is in such a gzip; nothing of another.
fn unstored(written: &[u8]) -> Option<Vec<u8>> {
    let mut rest = written.strip_prefix(&HEAD)?;
    let mut bytes = Vec::new();
    loop {
        let (&[last, a, b, c, d], behind) = rest.split_first_chunk()?;
        let length = u16::from_le_bytes([a, b]);
        if last > 1 || u16::from_le_bytes([c, d]) != !length {
            return None;
        }
        let (block, behind) = behind.split_at_checked(length.into())?;
        bytes.extend(block);
        rest = behind;
        if last == 1 {
            let whole = [crc32fast::hash(&bytes), bytes.len() as u32].map(u32::to_le_bytes);
            return (rest == whole.concat()).then_some(bytes);
        }
    }
}

fn read(folder: &Path) -> Result<(), Undone> {
    let mut written = Vec::new();
    let taken = io::stdin().lock().take(BYTES_MAX).read_to_end(&mut written);
    let known = taken.and_then(|_| {
        let bytes = unstored(&written).ok_or(io::ErrorKind::Unsupported)?;
        let entries = entries(&bytes)?;
        env::set_current_dir(folder)?;
        Ok(entries)
    });
    match known {
        Ok(entries) => extract(&entries).map_err(Undone::Begun),
        Err(error) => {
            // The real one is to read all of it.
            let input = io::stdin().as_fd().try_clone_to_owned();
            let rewound = input.and_then(|input| File::from(input).rewind());
            rewound.map_err(Undone::Begun)?;
            Err(Undone::Whole(error))
        }
    }
}

/// What is in an archive.
#[derive(Debug)]
struct Entry {
    path: PathBuf,
    header: Header,
    link: Option<PathBuf>,
}

/// All of an archive, if it is of the kinds that are made here, and each in a folder that it has
/// said before: a link of its own leads nothing anywhere.
fn entries(bytes: &[u8]) -> io::Result<Vec<Entry>> {
    let unsupported = || Err(io::ErrorKind::Unsupported.into());
    let mut archive = Archive::new(bytes);
    let mut entries = Vec::new();
    let mut said = HashSet::new();
    let mut folders = HashSet::from([PathBuf::new()]);
    for entry in archive.entries()? {
        let entry = entry?;
        let path = entry.path()?.into_owned();
        let mut plain = PathBuf::new();
        for part in path.components() {
            match part {
                Component::CurDir => {}
                Component::Normal(name) => plain.push(name),
                _ => return unsupported(),
            }
        }
        let is_in_folder = plain.parent().is_none_or(|parent| folders.contains(parent));
        if !is_in_folder || !said.insert(plain.clone()) {
            return unsupported();
        }
        match entry.header().entry_type() {
            EntryType::Directory => {
                folders.insert(plain);
            }
            // It is the folder itself.
            _ if plain.as_os_str().is_empty() => return unsupported(),
            EntryType::Symlink | EntryType::Char | EntryType::Block => {}
            _ => return unsupported(),
        }
        entries.push(Entry {
            path,
            header: entry.header().clone(),
            link: entry.link_name()?.map(|link| link.into_owned()),
        });
    }
    Ok(entries)
}

/// Makes all of it in the folder that this is in.
fn extract(entries: &[Entry]) -> io::Result<()> {
    for Entry { path, header, link } in entries {
        make(path, header, link.as_deref())?;
    }
    // What was made in a folder has changed its time.
    for Entry { path, header, .. } in entries.iter().rev() {
        let time = TimeSpec::new(i64::try_from(header.mtime()?).map_err(io::Error::other)?, 0);
        utimensat(
            AT_FDCWD,
            path,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )?;
    }
    Ok(())
}

fn make(path: &Path, header: &Header, link: Option<&Path>) -> io::Result<()> {
    let owner = |id: u64| u32::try_from(id).map_err(io::Error::other);
    let (uid, gid) = (Some(owner(header.uid()?)?), Some(owner(header.gid()?)?));
    let device = |kind: SFlag| -> io::Result<()> {
        let number = |part: io::Result<Option<u32>>| Ok::<_, io::Error>(part?.unwrap_or(0).into());
        let (high, low) = (
            number(header.device_major())?,
            number(header.device_minor())?,
        );
        Ok(mknod(path, kind, Mode::S_IRUSR, makedev(high, low))?)
    };
    match header.entry_type() {
        EntryType::Symlink => {
            symlink(link.ok_or(io::ErrorKind::InvalidData)?, path)?;
            return lchown(path, uid, gid);
        }
        EntryType::Char => device(SFlag::S_IFCHR)?,
        EntryType::Block => device(SFlag::S_IFBLK)?,
        // Not a link to one.
        _ if fs::symlink_metadata(path).is_ok_and(|has| has.is_dir()) => {}
        _ => fs::create_dir(path)?,
    }
    chown(path, uid, gid)?;
    fs::set_permissions(path, Permissions::from_mode(header.mode()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_criu_asks_for_is_known_word_by_word() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let write = words(&[&WRITE[..], &[FOLDER, "/proc/self/fd/7", ALL]].concat());
        assert!(matches!(asked(&write), Some(Asked::Write(folder)) if folder.ends_with("7")));
        let read = words(&[&READ[..], &[FOLDER, "/m"]].concat());
        assert!(matches!(asked(&read), Some(Asked::Read(folder)) if folder == Path::new("/m")));
        let more = words(&[&READ[..], &["--xattrs", FOLDER, "/m"]].concat());
        assert!(asked(&more).is_none() && asked(&write[1..]).is_none() && asked(&[]).is_none());
    }

    fn archive(of: &[(&str, EntryType)]) -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        for (path, kind) in of {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            if *kind == EntryType::Symlink {
                header.set_link_name("/").unwrap();
            }
            header.set_size(0);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_mode(0o755);
            header.set_cksum();
            archive.append(&header, io::empty()).unwrap();
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn an_entry_is_in_a_folder_that_was_said_before() {
        use EntryType::{Char, Directory, Regular, Symlink};
        let known = [
            ("./", Directory),
            ("./a/", Directory),
            ("./a/null", Char),
            ("./a/b/", Directory),
            ("./a/b/to", Symlink),
        ];
        assert_eq!(entries(&archive(&known)).unwrap().len(), known.len());
        assert!(entries(&archive(&[])).unwrap().is_empty());
        for refused in [
            &[("./", Directory), ("./a", Symlink), ("./a/null", Char)][..],
            &[("./a/null", Char)],
            &[("./a", Symlink), ("./a/", Directory), ("./a/null", Char)],
            &[("./a/", Directory), ("a", Symlink)],
            &[("../null", Char)],
            &[("/null", Char)],
            &[("./", Symlink)],
            &[("./file", Regular)],
        ] {
            let error = entries(&archive(refused)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{refused:?}");
        }
    }

    #[test]
    fn a_link_that_is_there_is_no_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (other, link) = (folder.path().join("other"), folder.path().join("link"));
        fs::create_dir(&other).unwrap();
        symlink(&other, &link).unwrap();
        let known = entries(&archive(&[("./", EntryType::Directory)])).unwrap();
        let made = make(&link, &known[0].header, None).unwrap_err();
        assert_eq!(made.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn what_is_stored_is_read_and_nothing_else() {
        let bytes: Vec<u8> = (0..=255_u8).cycle().take(BLOCK_MAX + 700).collect();
        let mut written = stored(&bytes);
        assert_eq!(unstored(&written), Some(bytes));
        assert_eq!(unstored(&written[..written.len() - 1]), None);
        let middle = written.len() / 2;
        written[middle] ^= 1;
        assert_eq!(unstored(&written), None);
        assert_eq!(unstored(&[]), None);
    }
}
