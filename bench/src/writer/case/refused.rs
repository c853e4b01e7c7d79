//! Cases that a move may refuse: memory that changes behind the page tables, or cannot be had.
//!
//! Each holds its thing and does nothing with it: to refuse, its presence must be enough.

use std::any::Any;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

use super::Case;
use crate::content::Content;
use crate::sys::memory::{Backing, Mapping, lose_pages, secret_file};
use crate::sys::process::{make_aio_context, make_io_uring};
use crate::writer::pages::Checked;

/// A thing that is held, for its presence.
struct Held {
    name: &'static str,
    _thing: Box<dyn Any>,
}

impl Case for Held {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        Ok(0)
    }

    fn progress(&self) -> String {
        self.name.to_owned()
    }
}

pub fn hugetlb() -> Result<Box<dyn Case>> {
    // Never touched: the machine may have no huge pages to give.
    let mapping = Mapping::new(Backing::HugeTlb, 2 << 20).context("mapping huge pages")?;
    hold("hugetlb", mapping)
}

pub fn direct_io() -> Result<Box<dyn Case>> {
    hold("direct-io", open_direct()?)
}

/// A file that is the same at every node.
fn open_direct() -> Result<std::fs::File> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open("/usr/local/bin/lab-writer");
    file.context("opening a file for direct I/O")
}

/// Opens its file when it is in the cgroup of a move, and not before.
struct Late {
    file: Option<std::fs::File>,
}

impl Case for Late {
    fn step(&mut self, tick: u64) -> Result<()> {
        if self.file.is_none() && tick.is_multiple_of(LOOK_EVERY) && is_being_moved()? {
            self.file = Some(open_direct()?);
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        Ok(0)
    }

    fn progress(&self) -> String {
        format!("direct-io-late: open: {}", self.file.is_some())
    }
}

/// In steps of a case, each of a millisecond.
const LOOK_EVERY: u64 = 5;

fn is_being_moved() -> Result<bool> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").context("reading own cgroups")?;
    Ok(cgroups.lines().any(|line| line.contains("pageferry/")))
}

pub fn direct_io_late() -> Result<Box<dyn Case>> {
    Ok(Box::new(Late { file: None }))
}

pub fn aio() -> Result<Box<dyn Case>> {
    make_aio_context().context("making an AIO context")?;
    hold("aio", ())
}

pub fn io_uring() -> Result<Box<dyn Case>> {
    let ring: OwnedFd = make_io_uring().context("making an io_uring")?;
    hold("io-uring", ring)
}

pub fn secretmem() -> Result<Box<dyn Case>> {
    let bytes = 64 << 10;
    let file = secret_file(bytes).context("making a secret memory file")?;
    let backing = Backing::File {
        file: &file,
        shared: true,
    };
    let mut region = Checked::new(backing, bytes, Content::Random)?;
    region.write_all();
    hold("secretmem", (file, region))
}

pub fn lost_pages() -> Result<Box<dyn Case>> {
    let mapping = Mapping::new(Backing::Private, 1 << 20).context("mapping memory")?;
    // More than what is given up as unmapped in a run of unreadable pages.
    lose_pages(&mapping, 128 << 10).context("losing pages")?;
    hold("lost-pages", mapping)
}

fn hold(name: &'static str, thing: impl Any) -> Result<Box<dyn Case>> {
    Ok(Box::new(Held {
        name,
        _thing: Box::new(thing),
    }))
}
