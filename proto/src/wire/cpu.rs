//! What a processor lets a process do, and whether another one lets it do the same.
//!
//! A process asks the processor once, with `CPUID`, and goes by the answer until it ends. So the
//! target must have every feature of the source that such an answer shows and that a process can
//! use by itself. More than that does no harm: nobody asks again.
//!
//! Not compared: what only a kernel can use (virtualisation, paging, power), what tells of faults
//! of the processor, and hints that a processor without them executes as nothing (`CLDEMOTE`,
//! `PREFETCHI`, `ENDBR64`) or without a gain (fast `REP MOVSB`). Nor the frequency of the time
//! stamp counter: whoever reads it without the kernel's help must expect a jump anyway.
//!
//! The registers that `XSAVE` stores are compared by place, too: a signal that is being handled has
//! them on the stack in the form the source's processor gives them, and CRIU has them in its images
//! in that form.

use crate::wire::code::{ErrorCode, Failure};
use crate::wire::control::{ControlError, short};
use crate::wire::schema;

/// Longest name of a maker, in bytes: what `CPUID` leaf 0 has room for.
pub const VENDOR_BYTES_MAX: usize = 12;

/// Most words of features: those of [`WORDS`], and room for those of later builds.
pub const FEATURE_WORDS_MAX: usize = 64;

/// The first component that has a place of its own in the area; those below are the x87 and SSE
/// registers, whose places are the same everywhere.
pub const COMPONENT_FIRST: u32 = 2;

/// The last possible component: bit 63 of `XCR0` is reserved.
pub const COMPONENT_LAST: u32 = 62;

/// Names in one refusal.
const NAMES_MAX: usize = 12;

/// A processor, as far as a process sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuDescription {
    /// Its maker, as `CPUID` says it: `GenuineIntel`.
    pub vendor: String,
    /// Features that a process can use: one word for each of [`WORDS`], in that order.
    pub features: Vec<u32>,
    /// Version of AVX10; 0 without it.
    pub avx10: u32,
    /// `XCR0`: the components of the register state that the kernel has switched on.
    pub xcr0: u64,
    /// Where `XSAVE` puts each of them from number 2 on, in order of number.
    pub components: Vec<XsaveComponent>,
}

/// A component of the register state in the area of `XSAVE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveComponent {
    /// Its number, which is its bit in `XCR0`: 2 to 62.
    pub number: u32,
    /// Its size, in bytes.
    pub size: u32,
    /// Where it is in the standard form, in bytes from the start of the area.
    pub offset: u32,
    /// Whether the compacted form puts it at a multiple of 64 bytes.
    pub aligned: bool,
}

/// A register of a leaf of `CPUID`, and those of its bits that are compared.
#[derive(Clone, Copy, Debug)]
pub struct FeatureWord {
    /// What is in EAX when `CPUID` is asked.
    pub leaf: u32,
    /// What is in ECX.
    pub subleaf: u32,
    /// Which register of the answer it is.
    pub register: Register,
    /// Number and name of each bit that is compared, as `/proc/cpuinfo` has it where it has one.
    pub bits: &'static [(u32, &'static str)],
}

/// A register of the answer of `CPUID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl FeatureWord {
    /// The bits that are compared.
    pub fn mask(&self) -> u32 {
        self.bits.iter().fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

impl CpuDescription {
    /// Fails with `cpu-differs` unless a process of `source` can go on on this processor.
    pub fn check(&self, source: &Self) -> Result<(), Failure> {
        let refused = |text: String| {
            let advice = "take another target, or --force-cpu if the workload does not mind";
            Err(Failure::new(
                ErrorCode::CpuDiffers,
                format!("{text}: {advice}"),
            ))
        };
        if self.vendor != source.vendor {
            return refused(format!(
                "the target's processor is of {}, the source's of {}, and they compute \
                 approximations (rcpps, rsqrtps) differently",
                self.vendor, source.vendor
            ));
        }
        let lacking = self.lacking(source);
        if !lacking.is_empty() {
            let more = lacking.len().saturating_sub(NAMES_MAX);
            let mut names = lacking[..lacking.len() - more].join(", ");
            if more > 0 {
                names += &format!(" and {more} more");
            }
            return refused(format!(
                "the target's processor lacks what the source's has: {names}"
            ));
        }
        for component in &source.components {
            let same = |other: &&XsaveComponent| other.number == component.number;
            // Every component of the source is in this one's XCR0, or it would be lacking.
            match self.components.iter().find(same) {
                Some(here) if here == component => {}
                here => {
                    return refused(format!(
                        "xsave has the {} at the target {}, at the source {}",
                        component_name(component.number),
                        here.map_or_else(|| "nowhere".to_owned(), XsaveComponent::place),
                        component.place()
                    ));
                }
            }
        }
        Ok(())
    }

    /// The names of everything that `source` has and this one has not.
    fn lacking(&self, source: &Self) -> Vec<String> {
        let mut lacking = Vec::new();
        for (number, theirs) in source.features.iter().enumerate() {
            let missing = theirs & !self.features.get(number).copied().unwrap_or(0);
            let bits = (0..u32::BITS).filter(|bit| missing & 1 << bit != 0);
            lacking.extend(bits.map(|bit| feature_name(number, bit)));
        }
        if self.avx10 < source.avx10 {
            lacking.push(format!("avx10.{}", source.avx10));
        }
        let missing = source.xcr0 & !self.xcr0;
        let components = (0..u64::BITS).filter(|bit| missing & 1 << bit != 0);
        lacking.extend(components.map(|bit| format!("the {} in xcr0", component_name(bit))));
        lacking
    }
}

impl XsaveComponent {
    fn place(&self) -> String {
        let aligned = if self.aligned { ", aligned" } else { "" };
        format!("at {} with {} bytes{aligned}", self.offset, self.size)
    }
}

/// A bit that this build does not know comes from a newer source; it is lacking all the same.
fn feature_name(word: usize, bit: u32) -> String {
    let known = WORDS
        .get(word)
        .and_then(|word| word.bits.iter().find(|(number, _)| *number == bit));
    known.map_or_else(
        || format!("feature {bit} of word {word}, which this build does not know"),
        |(_, name)| (*name).to_owned(),
    )
}

fn component_name(number: u32) -> String {
    let known = COMPONENTS.iter().find(|(known, _)| *known == number);
    known.map_or_else(
        || format!("registers of component {number}"),
        |(_, name)| format!("{name} registers"),
    )
}

impl From<&CpuDescription> for schema::Cpu {
    fn from(cpu: &CpuDescription) -> Self {
        let component = |component: &XsaveComponent| schema::XsaveComponent {
            number: component.number,
            size: component.size,
            offset: component.offset,
            aligned: component.aligned,
        };
        Self {
            vendor: cpu.vendor.clone(),
            features: cpu.features.clone(),
            avx10: cpu.avx10,
            xcr0: cpu.xcr0,
            components: cpu.components.iter().map(component).collect(),
        }
    }
}

impl TryFrom<schema::Cpu> for CpuDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Cpu) -> Result<Self, ControlError> {
        short("cpu.vendor", wire.vendor.len(), VENDOR_BYTES_MAX)?;
        short("cpu.features", wire.features.len(), FEATURE_WORDS_MAX)?;
        let component = |wire: &schema::XsaveComponent| XsaveComponent {
            number: wire.number,
            size: wire.size,
            offset: wire.offset,
            aligned: wire.aligned,
        };
        let components: Vec<_> = wire.components.iter().map(component).collect();
        let numbers: Vec<u32> = components
            .iter()
            .map(|component| component.number)
            .collect();
        let switched_on =
            (COMPONENT_FIRST..=COMPONENT_LAST).filter(|bit| wire.xcr0 & 1 << bit != 0);
        if !switched_on.eq(numbers.iter().copied()) {
            let count = i64::try_from(numbers.len()).unwrap_or(i64::MAX);
            return Err(ControlError::Invalid {
                field: "cpu.components",
                value: count,
            });
        }
        Ok(Self {
            vendor: wire.vendor,
            features: wire.features,
            avx10: wire.avx10,
            xcr0: wire.xcr0,
            components,
        })
    }
}

const fn word(
    leaf: u32,
    subleaf: u32,
    register: Register,
    bits: &'static [(u32, &'static str)],
) -> FeatureWord {
    FeatureWord {
        leaf,
        subleaf,
        register,
        bits,
    }
}

/// The components that have names, by number.
const COMPONENTS: &[(u32, &str)] = &[
    (0, "x87"),
    (1, "sse"),
    (2, "avx"),
    (3, "mpx bound"),
    (4, "mpx state"),
    (5, "avx512 mask"),
    (6, "avx512 upper"),
    (7, "avx512 high"),
    (9, "pkru"),
    (17, "amx tile configuration"),
    (18, "amx tile"),
    (19, "apx"),
];

/// Which registers of `CPUID` are compared, in the order of the wire. New ones go to the end.
pub const WORDS: &[FeatureWord] = &[
    word(
        1,
        0,
        Register::Ecx,
        &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (27, "osxsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    word(
        1,
        0,
        Register::Edx,
        &[
            (0, "fpu"),
            (4, "tsc"),
            (8, "cx8"),
            (11, "sep"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    word(
        7,
        0,
        Register::Ebx,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            // Its prefixes are hints, but XTEST is an instruction of it.
            (4, "hle"),
            (5, "avx2"),
            (8, "bmi2"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    word(
        7,
        0,
        Register::Ecx,
        &[
            (1, "avx512vbmi"),
            (3, "pku"),
            (4, "ospke"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (7, "shstk"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
            (27, "movdiri"),
            (28, "movdir64b"),
        ],
    ),
    word(
        7,
        0,
        Register::Edx,
        &[
            (2, "avx512_4vnniw"),
            (3, "avx512_4fmaps"),
            (8, "avx512_vp2intersect"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
        ],
    ),
    word(
        7,
        1,
        Register::Eax,
        &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (3, "raoint"),
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (7, "cmpccxadd"),
            (21, "amx_fp16"),
            (23, "avx_ifma"),
            (26, "lam"),
            (31, "movrs"),
        ],
    ),
    word(
        7,
        1,
        Register::Edx,
        &[
            (4, "avx_vnni_int8"),
            (5, "avx_ne_convert"),
            (8, "amx_complex"),
            (10, "avx_vnni_int16"),
            (19, "avx10"),
            (21, "apx"),
        ],
    ),
    word(
        0xd,
        1,
        Register::Eax,
        &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")],
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
            (29, "mwaitx"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        &[
            (11, "syscall"),
            (22, "mmxext"),
            (27, "rdtscp"),
            (29, "lm"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    ),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        &[(0, "clzero"), (4, "rdpru")],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> CpuDescription {
        let component = |number, offset, size| XsaveComponent {
            number,
            size,
            offset,
            aligned: false,
        };
        CpuDescription {
            vendor: "GenuineIntel".to_owned(),
            features: WORDS.iter().map(|word| word.mask() & 0x5555_5555).collect(),
            avx10: 1,
            xcr0: 0b111 | 1 << 5 | 1 << 9,
            components: vec![
                component(2, 576, 256),
                component(5, 1088, 64),
                component(9, 2688, 8),
            ],
        }
    }

    /// A target that is the source but for `change` refuses, and the text has `words`.
    #[track_caller]
    fn refuses(change: impl FnOnce(&mut CpuDescription), words: &[&str]) {
        let mut target = cpu();
        change(&mut target);
        let failure = target.check(&cpu()).expect_err("it differs");
        assert_eq!(failure.code(), ErrorCode::CpuDiffers);
        for word in words.iter().chain(&["--force-cpu"]) {
            assert!(failure.text().contains(word), "{word}: {failure}");
        }
    }

    // clause: C-8
    #[test]
    fn a_target_that_lacks_something_refuses_by_its_name() {
        refuses(|target| target.features[0] &= !(1 << 12), &["lacks", "fma"]);
        refuses(|target| target.features[2] = 0, &["avx512f", "fsgsbase"]);
        refuses(|target| target.features.truncate(3), &["ospke", "more"]);
        refuses(|target| target.avx10 = 0, &["avx10.1"]);
        refuses(
            |target| {
                target.xcr0 &= !(1 << 9);
                target.components.pop();
            },
            &["pkru registers in xcr0"],
        );
        refuses(
            |target| target.vendor = "AuthenticAMD".to_owned(),
            &["AuthenticAMD", "GenuineIntel"],
        );
    }

    #[test]
    fn registers_at_another_place_are_refused() {
        let words = ["pkru", "at 2696 with 8 bytes", "at 2688 with 8 bytes"];
        refuses(|target| target.components[2].offset = 2696, &words);
        refuses(|target| target.components[1].size = 72, &["avx512 mask"]);
        refuses(|target| target.components[0].aligned = true, &["aligned"]);
    }

    #[test]
    fn a_target_that_can_do_more_is_good_enough() {
        let mut target = cpu();
        target.features = WORDS.iter().map(FeatureWord::mask).collect();
        target.features.push(7);
        target.avx10 = 2;
        target.xcr0 |= 1 << 17;
        target.components.push(XsaveComponent {
            number: 17,
            size: 64,
            offset: 2752,
            aligned: true,
        });
        assert_eq!(target.check(&cpu()), Ok(()));
        assert_eq!(cpu().check(&cpu()), Ok(()));
    }

    #[test]
    fn what_only_a_newer_source_knows_is_lacking() {
        let mut source = cpu();
        source.features.push(1 << 3);
        let failure = cpu().check(&source).expect_err("an unknown word");
        let expected = "feature 3 of word 11, which this build does not know";
        assert!(failure.text().contains(expected), "{failure}");
    }

    #[test]
    fn each_bit_is_named_once() {
        let mut names: Vec<&str> = WORDS
            .iter()
            .flat_map(|word| word.bits.iter().map(|(_, name)| *name))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        for word in WORDS {
            assert_eq!(word.mask().count_ones() as usize, word.bits.len());
        }
    }

    #[test]
    fn components_that_do_not_fit_xcr0_are_malformed() {
        let mut wire = schema::Cpu::from(&cpu());
        assert_eq!(CpuDescription::try_from(wire.clone()), Ok(cpu()));
        wire.xcr0 |= 1 << 6;
        let error = CpuDescription::try_from(wire).expect_err("a component is missing");
        assert!(error.to_string().contains("cpu.components"), "{error}");
    }
}
