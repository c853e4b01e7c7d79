//! What the processor says of itself: `CPUID` and `XCR0`.

#![allow(unsafe_code)]
// Asking is safe in newer standard libraries, and not yet in the oldest that builds this.
#![allow(unused_unsafe)]

use std::arch::x86_64::{__cpuid_count, __get_cpuid_max, _xgetbv, CpuidResult};

/// The answer to a leaf and subleaf; all zero if the processor does not know the leaf.
pub fn leaf(leaf: u32, subleaf: u32) -> CpuidResult {
    const NOTHING: CpuidResult = CpuidResult {
        eax: 0,
        ebx: 0,
        ecx: 0,
        edx: 0,
    };
    // The highest leaf of this range: an Intel answers to one beyond it as to the highest.
    // SAFETY: every x86-64 has CPUID.
    let (highest, _) = unsafe { __get_cpuid_max(leaf & 0x8000_0000) };
    if leaf > highest {
        return NOTHING;
    }
    // SAFETY: every x86-64 has CPUID.
    unsafe { __cpuid_count(leaf, subleaf) }
}

/// `XCR0`: which components of the register state the kernel has switched on. 0 without `XSAVE`.
pub fn xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if leaf(1, 0).ecx & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: the kernel has switched XSAVE on, which says that the instruction may be used.
    unsafe { read_xcr0() }
}

/// # Safety
///
/// `CPUID` must say that the kernel has switched `XSAVE` on.
#[target_feature(enable = "xsave")]
unsafe fn read_xcr0() -> u64 {
    // SAFETY: the caller's promise; register 0 exists wherever the instruction does.
    unsafe { _xgetbv(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_what_every_such_processor_has() {
        const SSE2: u32 = 1 << 26;
        assert_ne!(leaf(1, 0).edx & SSE2, 0);
        assert_eq!(leaf(0x7fff_ffff, 0).eax, 0);
        // x87 and SSE are switched on wherever anything is.
        assert!(xcr0() == 0 || xcr0() & 3 == 3);
    }
}
