//! Contents that check themselves: regenerated from a seed, compared as a whole.
//!
//! The same (seed, kind) always gives the same bytes, so nothing has to be remembered to check a
//! page or a value but its version.

use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// How compressible contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// Does not compress.
    Random,
    /// Words of a small vocabulary: LZ4 makes about a half of it.
    Text,
    /// The second half of each fill is zeros.
    HalfZero,
}

impl Content {
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Text => "text",
            Self::HalfZero => "halfzero",
        }
    }

    /// Fills `out` with what `seed` says.
    pub fn fill(self, seed: u64, out: &mut [u8]) {
        let mut state = Generator(seed);
        match self {
            Self::Random => state.fill(out),
            Self::Text => state.fill_words(out),
            Self::HalfZero => {
                let (first, second) = out.split_at_mut(out.len() / 2);
                state.fill(first);
                second.fill(0);
            }
        }
    }
}

impl FromStr for Content {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        for content in [Self::Random, Self::Text, Self::HalfZero] {
            if content.name() == text {
                return Ok(content);
            }
        }
        bail!("contents are random, text or halfzero, not {text:?}")
    }
}

/// One seed of two numbers.
pub fn seed_of(thing: u64, version: u64) -> u64 {
    xxh3_64_with_seed(&thing.to_le_bytes(), version)
}

/// SplitMix64: one multiplication chain per 8 bytes, so that checking costs little beside reading.
#[derive(Clone, Debug)]
pub struct Generator(pub u64);

impl Generator {
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // Multiply-shift: the bias is below 2^-32 for the limits used here.
        ((u128::from(self.next_number()) * u128::from(limit)) >> 64) as u64
    }

    fn fill(&mut self, out: &mut [u8]) {
        let (whole, rest) = out.as_chunks_mut::<8>();
        for chunk in whole {
            *chunk = self.next_number().to_le_bytes();
        }
        let last = self.next_number().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    fn fill_words(&mut self, out: &mut [u8]) {
        let mut at = 0;
        while at < out.len() {
            let mut choice = self.next_number();
            // Eight words per number: 6 bits choose one of 64.
            for _ in 0..8 {
                let word = WORDS[(choice & 63) as usize].as_bytes();
                choice >>= 6;
                let take = word.len().min(out.len() - at);
                out[at..at + take].copy_from_slice(&word[..take]);
                at += take;
            }
        }
    }
}

const WORDS: [&str; 64] = [
    "the ",
    "of ",
    "and ",
    "to ",
    "in ",
    "is ",
    "that ",
    "for ",
    "it ",
    "as ",
    "was ",
    "with ",
    "be ",
    "by ",
    "on ",
    "not ",
    "he ",
    "this ",
    "are ",
    "or ",
    "his ",
    "from ",
    "at ",
    "which ",
    "but ",
    "have ",
    "an ",
    "had ",
    "they ",
    "you ",
    "were ",
    "their ",
    "one ",
    "all ",
    "we ",
    "can ",
    "her ",
    "has ",
    "there ",
    "been ",
    "if ",
    "more ",
    "when ",
    "will ",
    "would ",
    "who ",
    "so ",
    "no ",
    "memory ",
    "process ",
    "kernel ",
    "network ",
    "address ",
    "migration ",
    "source ",
    "target ",
    "round ",
    "freeze ",
    "parcel ",
    "ledger ",
    "journal ",
    "harbour ",
    "ferry ",
    "\n",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_depend_on_the_seed_alone() {
        for content in [Content::Random, Content::Text, Content::HalfZero] {
            let [mut one, mut two, mut other] = [[0u8; 4099]; 3];
            content.fill(7, &mut one);
            content.fill(7, &mut two);
            content.fill(8, &mut other);
            assert_eq!(one, two, "{}", content.name());
            assert_ne!(one, other, "{}", content.name());
        }
    }
}
