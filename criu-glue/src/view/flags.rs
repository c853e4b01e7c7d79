//! What the bits of a mapping's flags are called.
//!
//! The kernel holds the flags of a mapping as a number and prints them in smaps as words of two
//! letters. Which bit has which word differs between kernels and machines, so it is learned from a
//! process of which both are known: its smaps, and the numbers just before and just after.
//!
//! A process may change a flag and change it back between these readings. So a number is believed
//! to mean certain words only if there are as many words as bits, if it was met with them twice,
//! and if it was never met with others. A flag that comes and goes changes words and no bits; one
//! that takes another's place for a moment would have to do so whenever we look. For what was not
//! learned smaps is to be read as before: nothing is guessed.

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
    met: BTreeMap<u64, Met>,
}

/// A number, and the words it was met with.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Met {
    /// So often with these, of which only those that count are kept, sorted.
    With(Vec<[u8; 2]>, u32),
    /// With different ones.
    Contradicted,
}

/// How often a number must be met before it is believed.
const MET_MIN: u32 = 2;

impl FlagNames {
    /// What a smaps text and the areas of the same moment teach.
    ///
    /// # Errors
    /// [`Malformed`] with the first line of the text that is not understood; then nothing was
    /// learned.
    pub fn learn(&mut self, smaps: &[u8], areas: &[Area]) -> Result<(), Malformed> {
        let told = smaps::mappings(smaps)?;
        for (mapping, area) in pairs(&told, areas) {
            if mapping.words != area.flags.count_ones() as usize {
                continue;
            }
            let met = self
                .met
                .entry(area.flags)
                .or_insert_with(|| Met::With(mapping.flags.clone(), 0));
            match met {
                Met::With(words, times) if *words == mapping.flags => {
                    *times = times.saturating_add(1);
                }
                Met::With(..) => *met = Met::Contradicted,
                Met::Contradicted => {}
            }
        }
        Ok(())
    }

    fn words(&self, flags: u64) -> Option<&[[u8; 2]]> {
        match self.met.get(&flags)? {
            Met::With(words, times) if MET_MIN <= *times => Some(words),
            Met::With(..) | Met::Contradicted => None,
        }
    }

    /// Whether a text, rendered or true, says of every mapping what the areas say, as far as CRIU
    /// looks. `false` means that it cannot be told: then the texts are to be compared.
    ///
    /// # Errors
    /// [`Malformed`] with the first line of the text that is not understood.
    pub fn confirm(&self, rendered: &[u8], areas: &[Area]) -> Result<bool, Malformed> {
        let mut told = smaps::mappings(rendered)?;
        told.retain(|mapping| !is_of_kernel(mapping.start));
        let says = |(mapping, area): (&smaps::Mapping, &Area)| {
            (mapping.start, mapping.end) == (area.start, area.end)
                && self.words(area.flags) == Some(&mapping.flags)
        };
        Ok(told.len() == areas.len() && told.iter().zip(areas).all(says))
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

    fn learned(times: u32, text: &[u8], areas: &[Area]) -> FlagNames {
        let mut names = FlagNames::default();
        for _ in 0..times {
            names.learn(text, areas).unwrap();
        }
        names
    }

    #[test]
    fn what_was_learned_is_confirmed_and_a_change_is_not() {
        let names = learned(2, SMAPS, &areas(LOCKED, PLAIN));
        let confirm = |first, second| names.confirm(SMAPS, &areas(first, second)).unwrap();
        assert!(confirm(LOCKED, PLAIN));
        assert!(!confirm(PLAIN, PLAIN));
        assert!(!confirm(LOCKED, LOCKED));
        // A flag that nobody has met.
        assert!(!confirm(LOCKED, PLAIN | 1 << 20));
    }

    #[test]
    fn what_was_met_once_is_not_believed() {
        let names = learned(1, SMAPS, &areas(LOCKED, PLAIN));
        assert!(!names.confirm(SMAPS, &areas(LOCKED, PLAIN)).unwrap());
    }

    #[test]
    fn a_mapping_more_or_less_or_moved_is_not_confirmed() {
        let names = learned(2, SMAPS, &areas(LOCKED, PLAIN));
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
        let names = learned(2, SMAPS, &areas(PLAIN, PLAIN));
        assert!(!names.confirm(SMAPS, &areas(PLAIN, PLAIN)).unwrap());
        let names = learned(2, SMAPS, &areas(LOCKED, LOCKED));
        assert!(!names.confirm(SMAPS, &areas(LOCKED, LOCKED)).unwrap());
    }

    #[test]
    fn a_number_that_once_had_another_meaning_has_none() {
        let text = |word: &str| {
            let other = "3000-5000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n";
            format!("1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd {word} \n{other}").into_bytes()
        };
        let areas = areas(0b101, 0b11);
        let mut names = learned(2, &text("hg"), &areas);
        assert!(names.confirm(&text("hg"), &areas).unwrap());
        names.learn(&text("nh"), &areas).unwrap();
        names.learn(&text("hg"), &areas).unwrap();
        assert!(!names.confirm(&text("hg"), &areas).unwrap());
        assert!(!names.confirm(&text("nh"), &areas).unwrap());
    }
}
