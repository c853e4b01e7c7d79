//! Cases of one process: protections and flags that change what a mapping's pages are.

use anyhow::{Context, Result, bail};

use super::Case;
use crate::content::{Content, Generator};
use crate::sys::memory::{Backing, MADV_GUARD_INSTALL, Mapping, PAGE};
use crate::writer::pages::Checked;

/// Memory with contents and no access, made accessible for moments only.
#[derive(Debug)]
pub struct Hidden {
    region: Checked,
    generator: Generator,
    changes: u64,
}

impl Hidden {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 16 << 20, Content::Random)?;
        region.write_all();
        region.mapping.hide()?;
        Ok(Box::new(Self {
            region,
            generator: Generator(7),
            changes: 0,
        }))
    }
}

impl Case for Hidden {
    fn step(&mut self, tick: u64) -> Result<()> {
        if tick.is_multiple_of(20) {
            self.region.mapping.show()?;
            let page = self.generator.below(self.region.pages() as u64) as usize;
            self.region.check(page)?;
            self.region.write(page);
            self.region.mapping.hide()?;
            self.changes += 1;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.region.mapping.show()?;
        let pages = self.region.check_all()?;
        self.region.mapping.hide()?;
        Ok(pages)
    }

    fn progress(&self) -> String {
        format!("prot-none:{}", self.changes)
    }
}

/// Guard pages inside a mapping: contents around them, faults at them.
#[derive(Debug)]
pub struct Guards {
    region: Checked,
    guards: usize,
}

impl Guards {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 4 << 20, Content::Random)?;
        let mut guards = 0;
        for page in 0..region.pages() {
            if page.is_multiple_of(GUARD_EVERY) {
                let result = region.mapping.advise(page * PAGE, PAGE, MADV_GUARD_INSTALL);
                result.context("installing guard pages (Linux 6.13)")?;
                guards += 1;
            } else {
                region.write(page);
            }
        }
        Ok(Box::new(Self { region, guards }))
    }
}

impl Case for Guards {
    fn step(&mut self, tick: u64) -> Result<()> {
        let page = tick as usize % self.region.pages();
        if !page.is_multiple_of(GUARD_EVERY) {
            self.region.check(page)?;
            self.region.write(page);
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        for page in 0..self.region.pages() {
            if !page.is_multiple_of(GUARD_EVERY) {
                self.region.check(page)?;
            } else if self.region.mapping.is_readable(page * PAGE) {
                bail!("guard page {page} is gone");
            }
        }
        Ok(self.region.pages() - self.guards)
    }

    fn progress(&self) -> String {
        format!("guards:{}", self.guards)
    }
}

/// Transparent huge pages.
#[derive(Debug)]
pub struct HugePages {
    region: Checked,
    generator: Generator,
    writes: u64,
}

impl HugePages {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 64 << 20, Content::Random)?;
        let bytes = region.mapping.len();
        region
            .mapping
            .advise(0, bytes, libc::MADV_HUGEPAGE)
            .context("asking for huge pages")?;
        region.write_all();
        Ok(Box::new(Self {
            region,
            generator: Generator(8),
            writes: 0,
        }))
    }
}

impl Case for HugePages {
    fn step(&mut self, _: u64) -> Result<()> {
        let page = self.generator.below(self.region.pages() as u64) as usize;
        self.region.check(page)?;
        self.region.write(page);
        self.writes += 1;
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.region.check_all()
    }

    fn progress(&self) -> String {
        format!("thp:{}", self.writes)
    }
}

/// A flag of a mapping changes back and forth while its line in `maps` stays the same.
#[derive(Debug)]
pub struct Toggle {
    region: Checked,
    set: fn(&mut Mapping) -> std::io::Result<()>,
    unset: fn(&mut Mapping) -> std::io::Result<()>,
    is_set: bool,
    toggles: u64,
}

impl Toggle {
    pub fn start_lock() -> Result<Box<dyn Case>> {
        Self::start(Mapping::lock, Mapping::unlock)
    }

    pub fn start_dontfork() -> Result<Box<dyn Case>> {
        Self::start(
            |mapping| mapping.advise(0, mapping.len(), libc::MADV_DONTFORK),
            |mapping| mapping.advise(0, mapping.len(), libc::MADV_DOFORK),
        )
    }

    fn start(
        set: fn(&mut Mapping) -> std::io::Result<()>,
        unset: fn(&mut Mapping) -> std::io::Result<()>,
    ) -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 4 << 20, Content::Random)?;
        region.write_all();
        Ok(Box::new(Self {
            region,
            set,
            unset,
            is_set: false,
            toggles: 0,
        }))
    }
}

impl Case for Toggle {
    fn step(&mut self, tick: u64) -> Result<()> {
        if tick.is_multiple_of(TOGGLE_EVERY) {
            let change = if self.is_set { self.unset } else { self.set };
            change(&mut self.region.mapping).context("changing a flag of a mapping")?;
            self.is_set = !self.is_set;
            self.toggles += 1;
        }
        let page = tick as usize % self.region.pages();
        self.region.check(page)?;
        self.region.write(page);
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.region.check_all()
    }

    fn progress(&self) -> String {
        format!("toggle:{}", self.toggles)
    }
}

/// Pages pushed out to swap, where there is swap; without it this is memory that stays cold.
#[derive(Debug)]
pub struct SwappedOut {
    region: Checked,
}

impl SwappedOut {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 32 << 20, Content::Random)?;
        region.write_all();
        let bytes = region.mapping.len();
        region
            .mapping
            .advise(0, bytes, libc::MADV_PAGEOUT)
            .context("paging memory out")?;
        Ok(Box::new(Self { region }))
    }
}

impl Case for SwappedOut {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        let pages = self.region.check_all()?;
        let bytes = self.region.mapping.len();
        self.region
            .mapping
            .advise(0, bytes, libc::MADV_PAGEOUT)
            .context("paging memory out")?;
        Ok(pages)
    }

    fn progress(&self) -> String {
        "swapped:1".to_owned()
    }
}

const GUARD_EVERY: usize = 16;
/// Milliseconds: some toggles fall between the last round and the freeze.
const TOGGLE_EVERY: u64 = 25;
