//! Cases of one process: mappings that come, go, move and change.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::content::{Content, Generator, seed_of};
use crate::sys::memory::{Backing, Mapping, PAGE, memory_file, read_at, trim_heap};
use crate::writer::pages::Checked;

/// Mappings are made, grown, moved, shrunk and unmapped all the time.
#[derive(Debug)]
pub struct Remap {
    regions: Vec<Checked>,
    generator: Generator,
    operations: u64,
}

impl Remap {
    pub fn start() -> Result<Box<dyn Case>> {
        Ok(Box::new(Self {
            regions: Vec::new(),
            generator: Generator(2),
            operations: 0,
        }))
    }

    fn operate(&mut self) -> Result<()> {
        self.operations += 1;
        let pages = 1 + self.generator.below(REGION_PAGES_MAX) as usize;
        if self.regions.len() < 4
            || self.regions.len() < REGIONS_MAX && self.generator.below(3) == 0
        {
            let mut region = Checked::new(Backing::Private, pages * PAGE, Content::Random)?;
            region.write_all();
            self.regions.push(region);
            return Ok(());
        }
        let at = self.generator.below(self.regions.len() as u64) as usize;
        match self.generator.below(4) {
            0 => {
                self.regions.swap_remove(at).check_all()?;
            }
            1 => self.regions[at].resize(pages)?,
            2 if self.regions[at].pages() > 1 => {
                let keep = self.regions[at].pages() / 2;
                self.regions[at].truncate(keep)?;
            }
            _ => self.regions[at].write_all(),
        }
        Ok(())
    }
}

impl Case for Remap {
    fn step(&mut self, tick: u64) -> Result<()> {
        if tick.is_multiple_of(3) {
            self.operate()
        } else {
            Ok(())
        }
    }

    fn verify(&mut self) -> Result<usize> {
        self.regions.iter().map(Checked::check_all).sum()
    }

    fn progress(&self) -> String {
        format!("remap:{}", self.operations)
    }
}

/// The heap of libc: many small blocks, so that it grows and shrinks by `brk`.
#[derive(Debug)]
pub struct Heap {
    blocks: Vec<(u64, Vec<u8>)>,
    generator: Generator,
    next: u64,
    /// Blocks aimed at; follows `phases`.
    wanted: usize,
    phases: [usize; 2],
    trims: u64,
}

impl Heap {
    pub fn start_churning() -> Result<Box<dyn Case>> {
        Self::start([256, 1024])
    }

    pub fn start_shrinking() -> Result<Box<dyn Case>> {
        Self::start([8192, 0])
    }

    fn start(phases: [usize; 2]) -> Result<Box<dyn Case>> {
        let wanted = phases[0];
        let generator = Generator(3);
        Ok(Box::new(Self {
            blocks: Vec::new(),
            generator,
            next: 0,
            wanted,
            phases,
            trims: 0,
        }))
    }

    fn add_block(&mut self) {
        self.next += 1;
        let length = 1024 + self.generator.below(BLOCK_BYTES_MAX) as usize;
        let mut block = vec![0; length];
        Content::Random.fill(seed_of(self.next, 0), &mut block);
        self.blocks.push((self.next, block));
    }

    /// The last block goes first: only free memory at the end of the heap shrinks it.
    fn drop_block(&mut self) -> Result<()> {
        match self.blocks.pop() {
            Some((number, block)) => check_block(number, &block),
            None => Ok(()),
        }
    }
}

fn check_block(number: u64, block: &[u8]) -> Result<()> {
    let mut expected = vec![0; block.len()];
    Content::Random.fill(seed_of(number, 0), &mut expected);
    ensure!(
        block == expected,
        "heap block {number} at {:p} has other contents",
        block.as_ptr()
    );
    Ok(())
}

impl Case for Heap {
    fn step(&mut self, _: u64) -> Result<()> {
        for _ in 0..BLOCKS_PER_STEP {
            match self.blocks.len().cmp(&self.wanted) {
                std::cmp::Ordering::Less => self.add_block(),
                std::cmp::Ordering::Greater => self.drop_block()?,
                std::cmp::Ordering::Equal => {
                    self.wanted = self.phases[usize::from(self.wanted == self.phases[0])];
                    trim_heap();
                    self.trims += 1;
                    break;
                }
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        for (number, block) in &self.blocks {
            check_block(*number, block)?;
        }
        Ok(self
            .blocks
            .iter()
            .map(|(_, block)| block.len())
            .sum::<usize>()
            / PAGE)
    }

    fn progress(&self) -> String {
        format!("heap:{}", self.trims)
    }
}

/// Pages given back to the kernel must read as zeros from then on: never an old content again.
#[derive(Debug)]
pub struct DontNeed {
    region: Checked,
    generator: Generator,
    given_back: u64,
}

impl DontNeed {
    pub fn start() -> Result<Box<dyn Case>> {
        let mut region = Checked::new(Backing::Private, 32 << 20, Content::Text)?;
        region.write_all();
        Ok(Box::new(Self {
            region,
            generator: Generator(4),
            given_back: 0,
        }))
    }
}

impl Case for DontNeed {
    fn step(&mut self, tick: u64) -> Result<()> {
        if !tick.is_multiple_of(2) {
            return Ok(());
        }
        let count = 1 + self.generator.below(64) as usize;
        let first = self.generator.below((self.region.pages() - count) as u64) as usize;
        if self.generator.below(2) == 0 {
            self.region
                .mapping
                .advise(first * PAGE, count * PAGE, libc::MADV_DONTNEED)?;
            for page in first..first + count {
                self.region.forget(page);
            }
            self.given_back += count as u64;
        } else {
            for page in first..first + count {
                self.region.check(page)?;
                self.region.write(page);
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        self.region.check_all()
    }

    fn progress(&self) -> String {
        format!("dontneed:{}", self.given_back)
    }
}

/// A memory file, mapped shared, and also read through its descriptor.
#[derive(Debug)]
pub struct MemoryFile {
    file: OwnedFd,
    region: Checked,
    generator: Generator,
    writes: u64,
}

impl MemoryFile {
    pub fn start() -> Result<Box<dyn Case>> {
        let bytes = 8 << 20;
        let file = memory_file(bytes).context("making a memory file")?;
        let backing = Backing::File {
            file: &file,
            shared: true,
        };
        let mut region = Checked::new(backing, bytes, Content::Random)?;
        region.write_all();
        Ok(Box::new(Self {
            file,
            region,
            generator: Generator(5),
            writes: 0,
        }))
    }
}

impl Case for MemoryFile {
    fn step(&mut self, _: u64) -> Result<()> {
        let page = self.generator.below(self.region.pages() as u64) as usize;
        self.region.write(page);
        self.writes += 1;
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        let pages = self.region.check_all()?;
        let mut bytes = vec![0; self.region.mapping.len()];
        let read = read_at(&self.file, 0, &mut bytes).context("reading the memory file")?;
        ensure!(read == bytes.len(), "the memory file has {read} bytes");
        ensure!(
            bytes == self.region.mapping.bytes(),
            "the memory file and its mapping differ"
        );
        Ok(pages)
    }

    fn progress(&self) -> String {
        format!("memfd:{}", self.writes)
    }
}

/// A private mapping of a file: some pages are copies with contents of their own, the others must
/// be the file's.
#[derive(Debug)]
pub struct PrivateFile {
    file: OwnedFd,
    mapping: Mapping,
    written: Vec<bool>,
    generator: Generator,
    writes: u64,
}

impl PrivateFile {
    pub fn start() -> Result<Box<dyn Case>> {
        // A file that is the same at every node.
        let file: OwnedFd = File::open("/proc/self/exe")
            .context("opening the program")?
            .into();
        let mapping = Mapping::new(
            Backing::File {
                file: &file,
                shared: false,
            },
            64 * PAGE,
        )?;
        let written = vec![false; mapping.len() / PAGE];
        Ok(Box::new(Self {
            file,
            mapping,
            written,
            generator: Generator(6),
            writes: 0,
        }))
    }
}

impl Case for PrivateFile {
    fn step(&mut self, tick: u64) -> Result<()> {
        // Every other page at most, so that both kinds stay.
        if tick.is_multiple_of(5) {
            let page = 2 * self.generator.below(self.written.len() as u64 / 2) as usize;
            let bytes = &mut self.mapping.bytes_mut()[page * PAGE..][..PAGE];
            Content::Random.fill(seed_of(page as u64, 0), bytes);
            self.written[page] = true;
            self.writes += 1;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        let mut expected = vec![0; PAGE];
        for (page, written) in self.written.iter().enumerate() {
            if *written {
                Content::Random.fill(seed_of(page as u64, 0), &mut expected);
            } else {
                let read = read_at(&self.file, page * PAGE, &mut expected);
                ensure!(
                    read.context("reading the file")? == PAGE,
                    "the file became shorter"
                );
            }
            let held = &self.mapping.bytes()[page * PAGE..][..PAGE];
            ensure!(
                held == expected,
                "page {page} of the file's private mapping differs"
            );
        }
        Ok(self.written.len())
    }

    fn progress(&self) -> String {
        format!("file-private:{}", self.writes)
    }
}

/// 256 KiB: many of them come and go while a round is sent.
const REGION_PAGES_MAX: u64 = 64;
const REGIONS_MAX: usize = 64;
/// Below the 128 KiB from which libc maps instead.
const BLOCK_BYTES_MAX: u64 = 15 << 10; // 15 KiB
const BLOCKS_PER_STEP: usize = 8;
