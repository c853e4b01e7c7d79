//! Pages that know what they must hold.

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::content::{Content, seed_of};
use crate::sys::memory::{Backing, Mapping, PAGE};

/// A mapping whose pages are written with their address, a version, a checksum and contents.
///
/// A page of version 0 was never written and must read as zeros.
#[derive(Debug)]
pub struct Checked {
    pub mapping: Mapping,
    versions: Vec<u32>,
    /// Where the region was made: what pages say of their address also after it was moved.
    home: usize,
    content: Content,
}

impl Checked {
    pub fn new(backing: Backing<'_>, bytes: usize, content: Content) -> Result<Self> {
        let mapping = Mapping::new(backing, bytes).context("mapping memory")?;
        let home = mapping.address();
        Ok(Self {
            mapping,
            versions: vec![0; bytes / PAGE],
            home,
            content,
        })
    }

    pub fn pages(&self) -> usize {
        self.versions.len()
    }

    pub fn write_all(&mut self) {
        for page in 0..self.pages() {
            self.write(page);
        }
    }

    /// Writes the next version of a page.
    pub fn write(&mut self, page: usize) {
        let version = self.versions[page].wrapping_add(1).max(1);
        self.versions[page] = version;
        let address = (self.home + page * PAGE) as u64;
        let bytes = &mut self.mapping.bytes_mut()[page * PAGE..][..PAGE];
        let (header, contents) = bytes.split_at_mut(HEADER);
        self.content
            .fill(seed_of(address, version.into()), contents);
        header[..8].copy_from_slice(&address.to_le_bytes());
        header[8..16].copy_from_slice(&u64::from(version).to_le_bytes());
        let checksum = checksum(address, version.into(), contents);
        header[16..24].copy_from_slice(&checksum.to_le_bytes());
    }

    /// # Errors
    /// Says what the page holds and what it should.
    pub fn check(&self, page: usize) -> Result<()> {
        let bytes = &self.mapping.bytes()[page * PAGE..][..PAGE];
        let version = u64::from(self.versions[page]);
        let address = (self.home + page * PAGE) as u64;
        if version == 0 {
            let zero = bytes.iter().all(|byte| *byte == 0);
            ensure!(zero, "page {address:#x} was never written and is not zero");
            return Ok(());
        }
        check_page(bytes, address, version)
    }

    pub fn check_all(&self) -> Result<usize> {
        for page in 0..self.pages() {
            self.check(page)?;
        }
        Ok(self.pages())
    }

    /// Says that a page was given back to the kernel and must read as zeros.
    pub fn forget(&mut self, page: usize) {
        self.versions[page] = 0;
    }

    /// Grows (with pages never written) or shrinks.
    pub fn resize(&mut self, pages: usize) -> Result<()> {
        self.mapping
            .resize(pages * PAGE)
            .context("remapping memory")?;
        self.versions.resize(pages, 0);
        Ok(())
    }

    /// Unmaps the pages from `from` on.
    pub fn truncate(&mut self, from: usize) -> Result<()> {
        self.mapping
            .truncate(from * PAGE)
            .context("unmapping memory")?;
        self.versions.truncate(from);
        Ok(())
    }
}

fn check_page(bytes: &[u8], address: u64, version: u64) -> Result<()> {
    let (header, contents) = bytes.split_at(HEADER);
    let word = |at: usize| {
        let bytes = header[at..at + 8]
            .try_into()
            .expect("eight bytes of a header of 24");
        u64::from_le_bytes(bytes)
    };
    let (held_address, held_version, held_checksum) = (word(0), word(8), word(16));
    ensure!(
        held_address == address && held_version == version,
        "page {address:#x} must hold version {version}, but holds page {held_address:#x} version \
         {held_version}"
    );
    ensure!(
        held_checksum == checksum(address, version, contents),
        "page {address:#x} version {version} has contents that do not fit its checksum"
    );
    Ok(())
}

fn checksum(address: u64, version: u64, contents: &[u8]) -> u64 {
    xxh3_64_with_seed(contents, seed_of(address, version))
}

/// Address, version, checksum.
const HEADER: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_torn_and_misplaced_pages_are_noticed() {
        let mut region = Checked::new(Backing::Private, 4 * PAGE, Content::Text).unwrap();
        region.check_all().unwrap();
        region.write_all();
        let old = region.mapping.bytes()[..PAGE].to_vec();
        region.write(0);
        region.check_all().unwrap();

        let new = region.mapping.bytes()[..PAGE].to_vec();
        region.mapping.bytes_mut()[..PAGE].copy_from_slice(&old);
        assert!(
            region
                .check(0)
                .unwrap_err()
                .to_string()
                .contains("must hold version 2")
        );
        region.mapping.bytes_mut()[..PAGE].copy_from_slice(&new);
        region.mapping.bytes_mut()[4000] ^= 1;
        assert!(
            region
                .check(0)
                .unwrap_err()
                .to_string()
                .contains("checksum")
        );
        region.mapping.bytes_mut()[..PAGE].copy_from_slice(&new);
        let (first, second) = region.mapping.bytes_mut().split_at_mut(PAGE);
        second[..PAGE].copy_from_slice(first);
        assert!(region.check(1).is_err());
    }

    #[test]
    fn pages_keep_their_contents_when_the_region_moves() {
        let mut region = Checked::new(Backing::Private, 8 * PAGE, Content::Random).unwrap();
        region.write_all();
        region.resize(4096).unwrap();
        region.check_all().unwrap();
        region.truncate(3).unwrap();
        assert_eq!(region.check_all().unwrap(), 3);
    }
}
