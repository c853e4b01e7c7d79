//! Cases that a move may refuse: memory that changes behind the page tables, or cannot be had.
//!
//! Each holds its thing and does nothing with it: to refuse, its presence must be enough.

use std::any::Any;
use std::os::fd::OwnedFd;

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
