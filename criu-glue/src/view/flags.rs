//! What the bits of a mapping's flags are called.
//!
//! The kernel holds the flags of a mapping as a number and prints them in smaps as words of two
//! letters. Which bit has which word differs between kernels and machines, so it is learned from a
//! process of which both are known: its smaps, and the numbers just before and just after.
//!
//! A number is believed to mean certain words only if there are as many words as bits. A flag that
//! came and went between the three readings changes words and no bits, and is found out by that;
//! so is a bit that has no word, for which smaps is to be read as before. What was not learned is
//! not guessed.

use std::collections::BTreeMap;

use super::smaps::{self, Malformed};

/// A mapping as the kernel holds it. Addresses in bytes, the end exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    pub start: u64,
    pub end: u64,
    /// `vm_flags`.
    pub flags: u64,
}

/// The words of numbers that were met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlagNames {
    /// Only the words that count, sorted.
    words: BTreeMap<u64, Vec<[u8; 2]>>,
}

impl FlagNames {
    /// What a smaps text and the areas of the same moment teach.
    ///
    /// # Errors
    /// [`Malformed`] with the first line of the text that is not understood.
    pub fn learn(smaps: &[u8], areas: &[Area]) -> Result<Self, Malformed> {
        let mut names = Self::default();
        let mut ambiguous = Vec::new();
        let told = smaps::mappings(smaps)?;
        for (mapping, area) in pairs(&told, areas) {
            if mapping.words != area.flags.count_ones() as usize {
                continue;
            }
            let known = names
                .words
                .entry(area.flags)
                .or_insert_with(|| mapping.flags.clone());
            if *known != mapping.flags {
                ambiguous.push(area.flags);
            }
        }
        for flags in ambiguous {
            names.words.remove(&flags);
        }
        Ok(names)
    }

    /// Whether a text, rendered or true, says of every mapping what the areas say, as far as CRIU
    /// looks. `false` means that it cannot be told: then the texts are to be compared.
    ///
    /// # Errors
    /// [`Malformed`] with the first line of the text that is not understood.
    pub fn confirm(&self, rendered: &[u8], areas: &[Area]) -> Result<bool, Malformed> {
        let told = smaps::mappings(rendered)?;
        let own = told.iter().filter(|mapping| !is_of_kernel(mapping.start));
        Ok(own.count() == areas.len()
            && pairs(&told, areas).count() == areas.len()
            && pairs(&told, areas)
                .all(|(mapping, area)| self.words.get(&area.flags) == Some(&mapping.flags)))
    }
}

/// Mappings and areas with equal addresses. Both are sorted.
fn pairs<'a>(
    mappings: &'a [smaps::Mapping],
    areas: &'a [Area],
) -> impl Iterator<Item = (&'a smaps::Mapping, &'a Area)> {
    areas.iter().filter_map(|area| {
        let place = mappings.partition_point(|mapping| mapping.start < area.start);
        let mapping = mappings.get(place)?;
        (mapping.start == area.start && mapping.end == area.end).then_some((mapping, area))
    })
}

/// `[vsyscall]` is printed for every process and belongs to none.
const fn is_of_kernel(address: u64) -> bool {
    address >> 63 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"\
1000-2000 rw-p 00000000 00:00 0 \n\
Size:                  4 kB\n\
VmFlags: rd wr mr mw me ac lo \n\
3000-5000 rw-p 00000000 00:00 0 \n\
VmFlags: rd wr mr mw me ac \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n\
VmFlags: ex \n";
    const LOCKED: u64 = 0b111_1111;
    const PLAIN: u64 = 0b11_1111;

    fn areas(first: u64, second: u64) -> [Area; 2] {
        let area = |start, end, flags| Area { start, end, flags };
        [area(0x1000, 0x2000, first), area(0x3000, 0x5000, second)]
    }

    #[test]
    fn what_was_learned_is_confirmed_and_a_change_is_not() {
        let names = FlagNames::learn(SMAPS, &areas(LOCKED, PLAIN)).unwrap();
        let confirm = |first, second| names.confirm(SMAPS, &areas(first, second)).unwrap();
        assert!(confirm(LOCKED, PLAIN));
        assert!(!confirm(PLAIN, PLAIN));
        assert!(!confirm(LOCKED, LOCKED));
        // A flag that nobody has met.
        assert!(!confirm(LOCKED, PLAIN | 1 << 20));
    }

    #[test]
    fn a_mapping_more_or_less_or_moved_is_not_confirmed() {
        let names = FlagNames::learn(SMAPS, &areas(LOCKED, PLAIN)).unwrap();
        let [first, second] = areas(LOCKED, PLAIN);
        let third = Area {
            start: 0x7000,
            end: 0x8000,
            flags: PLAIN,
        };
        let moved = Area {
            end: 0x6000,
            ..second
        };
        for wrong in [&[first][..], &[first, second, third], &[first, moved]] {
            assert!(!names.confirm(SMAPS, wrong).unwrap());
        }
    }

    #[test]
    fn a_flag_that_was_there_for_the_text_only_teaches_nothing() {
        let names = FlagNames::learn(SMAPS, &areas(PLAIN, PLAIN)).unwrap();
        assert!(!names.confirm(SMAPS, &areas(PLAIN, PLAIN)).unwrap());
        let names = FlagNames::learn(SMAPS, &areas(LOCKED, LOCKED)).unwrap();
        assert!(!names.confirm(SMAPS, &areas(LOCKED, LOCKED)).unwrap());
    }

    #[test]
    fn a_number_with_two_meanings_has_none() {
        let text = b"1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd dc \n\
                     3000-5000 rw-p 00000000 00:00 0 \nVmFlags: rd dd \n";
        let names = FlagNames::learn(text, &areas(0b11, 0b11)).unwrap();
        assert!(!names.confirm(text, &areas(0b11, 0b11)).unwrap());
    }
}
