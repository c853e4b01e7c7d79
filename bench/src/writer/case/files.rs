//! Files that travel: written, mapped, renamed, linked, stamped and removed all the time, and known
//! by heart. Memory moves with the writer, so a file that came as it was not is noticed.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::content::Content;
use crate::sys::memory::{Backing, Mapping, PAGE};

/// The folder that travels.
pub const FOLDER: &str = "/srv/disk/data";

/// A file, and what it must be.
#[derive(Debug)]
struct Known {
    names: BTreeSet<PathBuf>,
    length: usize,
    seed: u64,
    /// Bytes that were written over what the seed says: where, how many, and their own seed.
    patches: Vec<(usize, usize, u64)>,
    /// What `utimes` has set, if nothing was written since.
    modified: Option<SystemTime>,
}

/// The case.
#[derive(Debug)]
pub struct Files {
    all: Vec<Known>,
    /// Open for all its life, and only appended to.
    log: File,
    lines: u64,
    /// Of a file that is open, and written through this alone.
    mapping: Mapping,
    mapped: Vec<u8>,
    count: u64,
    /// What is open and has no name but one that only the kernel knows, and another that goes
    /// along.
    unlinked: File,
}

impl Files {
    /// Some dozens of small ones.
    pub fn start_few() -> Result<Box<dyn Case>> {
        Self::start(64, 40_000)
    }

    /// 1 GiB in ten thousand of them.
    pub fn start_many() -> Result<Box<dyn Case>> {
        Self::start(10_000, 107_374)
    }

    fn start(count: usize, length: usize) -> Result<Box<dyn Case>> {
        let root = Path::new(FOLDER);
        fs::create_dir_all(root).context("making the folder")?;
        let mut all = Vec::with_capacity(count);
        for number in 0..count {
            let folder = root.join(format!("d{}", number % FOLDERS));
            fs::create_dir_all(&folder)?;
            let known = Known {
                names: BTreeSet::from([folder.join(format!("f{number}"))]),
                length,
                seed: number as u64,
                patches: Vec::new(),
                modified: None,
            };
            known.write_all()?;
            all.push(known);
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(root.join("log"))?;
        let (mapping, mapped) = map(&root.join("mapped"))?;
        // CRIU gives it a name again while it dumps, since it has another.
        let unlinked = root.join("unlinked");
        let mut how = OpenOptions::new();
        how.create(true).read(true).write(true).truncate(true);
        let open = how.open(&unlinked)?;
        open.write_all_at(UNLINKED, 0)?;
        fs::hard_link(&unlinked, root.join("linked")).context("linking")?;
        fs::remove_file(&unlinked).context("unlinking")?;
        Ok(Box::new(Self {
            all,
            log,
            lines: 0,
            mapping,
            mapped,
            count: 0,
            unlinked: open,
        }))
    }

    fn change(&mut self, number: u64) -> Result<()> {
        let index = usize::try_from(mixed(number) % self.all.len() as u64)?;
        let root = Path::new(FOLDER);
        let known = &mut self.all[index];
        match number % 8 {
            0 | 1 => known.patch(number)?,
            2 => {
                let folder = root.join(format!("d{}", mixed(number) as usize % FOLDERS));
                known.rename(folder.join(format!("r{number}")))?;
            }
            3 => known.link(&root.join(format!("l{number}")))?,
            4 => known.stamp(number)?,
            5 => {
                let at = mixed(number) as usize % self.mapped.len();
                self.mapped[at] = self.mapped[at].wrapping_add(1);
                self.mapping.bytes_mut()[at] = self.mapped[at];
            }
            6 => known.replace(number)?,
            _ => {
                self.lines += 1;
                writeln!(self.log, "{:019}", self.lines)?;
            }
        }
        Ok(())
    }
}

/// A file of some pages, mapped shared, and what it holds.
fn map(path: &Path) -> Result<(Mapping, Vec<u8>)> {
    let mut bytes = vec![0; MAPPED];
    Content::Random.fill(1, &mut bytes);
    fs::write(path, &bytes)?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let backing = Backing::File {
        file: &OwnedFd::from(file),
        shared: true,
    };
    Ok((Mapping::new(backing, MAPPED)?, bytes))
}

impl Known {
    fn name(&self) -> Result<&PathBuf> {
        self.names.first().context("a file without a name")
    }

    /// What it must hold.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        Content::Random.fill(self.seed, &mut bytes);
        for (at, length, seed) in &self.patches {
            Content::Random.fill(*seed, &mut bytes[*at..at + length]);
        }
        bytes
    }

    fn write_all(&self) -> Result<()> {
        let name = self.name()?;
        fs::write(name, self.bytes()).with_context(|| format!("writing {}", name.display()))
    }

    fn patch(&mut self, number: u64) -> Result<()> {
        if self.patches.len() == PATCHES {
            self.patches.clear();
            self.seed = number;
            self.modified = None;
            return self.write_all();
        }
        let length = 1 + mixed(number + 1) as usize % 3000;
        let at = mixed(number + 2) as usize % (self.length - length);
        let mut bytes = vec![0; length];
        Content::Random.fill(number, &mut bytes);
        let file = OpenOptions::new().write(true).open(self.name()?)?;
        file.write_all_at(&bytes, at as u64)?;
        self.patches.push((at, length, number));
        self.modified = None;
        Ok(())
    }

    fn rename(&mut self, to: PathBuf) -> Result<()> {
        let from = self.name()?.clone();
        fs::rename(&from, &to).with_context(|| format!("renaming {}", from.display()))?;
        self.names.remove(&from);
        self.names.insert(to);
        Ok(())
    }

    /// Gives it one more name, or takes one away.
    fn link(&mut self, to: &Path) -> Result<()> {
        let name = self.name()?.clone();
        if 1 < self.names.len() {
            self.names.remove(&name);
            return fs::remove_file(&name).context("removing a name");
        }
        self.names.insert(to.to_owned());
        fs::hard_link(&name, to).context("linking")
    }

    fn stamp(&mut self, number: u64) -> Result<()> {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000 + number, 123_456_789);
        let file = OpenOptions::new().write(true).open(self.name()?)?;
        file.set_modified(time).context("setting a time")?;
        self.modified = Some(time);
        Ok(())
    }

    /// Another file takes its place, as editors do.
    fn replace(&mut self, number: u64) -> Result<()> {
        let name = self.name()?.clone();
        let new = name.with_extension("new");
        self.patches.clear();
        (self.seed, self.modified) = (number, None);
        fs::write(&new, self.bytes())?;
        fs::rename(&new, &name)?;
        // Its other names are of the old one.
        for other in std::mem::take(&mut self.names) {
            if other != name {
                fs::remove_file(&other)?;
            }
        }
        self.names.insert(name);
        Ok(())
    }

    fn verify(&self) -> Result<usize> {
        let name = self.name()?;
        let wrong = || format!("{} is not what it was", name.display());
        let bytes = fs::read(name).with_context(wrong)?;
        ensure!(bytes == self.bytes(), "{}: its contents", wrong());
        let metadata = fs::metadata(name).with_context(wrong)?;
        ensure!(
            metadata.nlink() == self.names.len() as u64,
            "{}: its names",
            wrong()
        );
        for other in &self.names {
            let inode = fs::metadata(other).with_context(wrong)?.ino();
            ensure!(
                inode == metadata.ino(),
                "{} is another file",
                other.display()
            );
        }
        if let Some(modified) = self.modified {
            let found = metadata.modified()?;
            ensure!(
                found == modified,
                "{}: {found:?}, not {modified:?}",
                wrong()
            );
        }
        Ok(bytes.len().div_ceil(PAGE))
    }
}

impl Case for Files {
    fn step(&mut self, _: u64) -> Result<()> {
        self.count += 1;
        self.change(self.count)
    }

    fn verify(&mut self) -> Result<usize> {
        let root = Path::new(FOLDER);
        let mut pages = 0;
        for known in &self.all {
            pages += known.verify()?;
        }
        let log = fs::read_to_string(root.join("log"))?;
        let expected = (1..=self.lines).map(|line| format!("{line:019}\n"));
        ensure!(log == expected.collect::<String>(), "the log lacks lines");
        ensure!(
            fs::read(root.join("mapped"))? == self.mapped,
            "the mapped file differs"
        );
        ensure!(self.mapping.bytes() == self.mapped, "the mapping differs");
        ensure!(
            fs::read(root.join("linked"))? == UNLINKED,
            "the linked file differs"
        );
        let (open, linked) = (
            self.unlinked.metadata()?,
            fs::metadata(root.join("linked"))?,
        );
        ensure!(open.ino() == linked.ino(), "the unlinked file is another");
        let expected = self
            .all
            .iter()
            .map(|known| known.names.len())
            .sum::<usize>()
            + 3;
        let found = count_files(root)?;
        ensure!(found == expected, "there are {found} files, not {expected}");
        Ok(pages)
    }

    fn progress(&self) -> String {
        format!("{} changes", self.count)
    }
}

fn count_files(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        count += match entry.file_type()?.is_dir() {
            true => count_files(&entry.path())?,
            false => 1,
        };
    }
    Ok(count)
}

/// A number that looks like any other.
fn mixed(number: u64) -> u64 {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)) >> 3
}

const UNLINKED: &[u8] = b"one of its names is gone";
const FOLDERS: usize = 20;
const MAPPED: usize = 256 << 10; // 256 KiB
/// After so many a file is written anew.
const PATCHES: usize = 8;
