//! The processor of this node, as a process sees it.
//!
//! What must be equal, and what may be more, says the protocol ([`CpuDescription::check`]).
//! All processors of a node are taken for equal: a kernel offers what they have in common.

use pageferry_proto::wire::cpu::{
    COMPONENT_FIRST, COMPONENT_LAST, CpuDescription, Register, WORDS, XsaveComponent,
};
use pageferry_sys::cpu;

/// The leaf that tells where `XSAVE` puts what.
const XSAVE_LEAF: u32 = 0xd;

/// In ECX of a component's subleaf.
const ALIGNED: u32 = 1 << 1;

/// The leaf of AVX10, and its version in EBX.
const AVX10_LEAF: u32 = 0x24;
const AVX10_VERSION: u32 = 0xff;

/// Reads it.
pub fn read() -> CpuDescription {
    let vendor = cpu::leaf(0, 0);
    let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let ascii = |byte: &u8| {
        char::from(*byte)
            .is_ascii_graphic()
            .then(|| char::from(*byte))
    };
    let vendor = vendor.as_flattened().iter().filter_map(ascii).collect();
    let features = WORDS.iter().map(|word| {
        let answer = cpu::leaf(word.leaf, word.subleaf);
        let register = match word.register {
            Register::Eax => answer.eax,
            Register::Ebx => answer.ebx,
            Register::Ecx => answer.ecx,
            Register::Edx => answer.edx,
        };
        register & word.mask()
    });
    let xcr0 = cpu::xcr0();
    let component = |number| {
        let place = cpu::leaf(XSAVE_LEAF, number);
        XsaveComponent {
            number,
            size: place.eax,
            offset: place.ebx,
            aligned: place.ecx & ALIGNED != 0,
        }
    };
    let numbers = (COMPONENT_FIRST..=COMPONENT_LAST).filter(|number| xcr0 & 1 << number != 0);
    CpuDescription {
        vendor,
        features: features.collect(),
        avx10: cpu::leaf(AVX10_LEAF, 0).ebx & AVX10_VERSION,
        xcr0,
        components: numbers.map(component).collect(),
    }
}

#[cfg(test)]
mod tests {
    use pageferry_proto::wire::code::ErrorCode;
    use pageferry_proto::wire::description::{Namespaces, WorkloadDescription};

    use super::*;
    use crate::runtime::kind::Arriving;
    use pageferry_proto::id::WorkloadName;
    use pageferry_proto::wire::code::Failure;

    #[test]
    fn a_processor_is_good_enough_for_itself() {
        let here = read();
        assert_eq!(here.check(&here), Ok(()));
        assert!(here.vendor.len() >= 8, "{here:?}");
        // What the kernel says of the same processor.
        let text = std::fs::read_to_string("/proc/cpuinfo").expect("procfs");
        let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
        let flags: Vec<&str> = flags.expect("flags").split_whitespace().collect();
        for (number, word) in WORDS.iter().enumerate() {
            for (bit, name) in word.bits.iter().filter(|(_, name)| flags.contains(name)) {
                assert_ne!(here.features[number] & 1 << bit, 0, "{name}");
            }
        }
    }

    /// A workload that has nothing but was on `cpu`.
    fn workload_on(cpu: Option<CpuDescription>) -> WorkloadDescription {
        WorkloadDescription {
            root_pid: 7,
            spaces: Vec::new(),
            pids: Vec::new(),
            own_namespaces: Namespaces::NONE,
            hostname: String::new(),
            domainname: String::new(),
            links: Vec::new(),
            routes: Vec::new(),
            files: Vec::new(),
            shared: Vec::new(),
            copied: Vec::new(),
            boot_id: [0; 16],
            cpu,
            criu_version: 40201,
            page_size: 4096,
            kernel_release: String::new(),
            cwd: "/".to_owned(),
            root: "/".to_owned(),
            mounts: Vec::new(),
            needs: pageferry_proto::wire::needs::Needs::default(),
            container: None,
            members: Vec::new(),
            member_name: String::new(),
        }
    }

    fn check(description: &WorkloadDescription) -> Result<(), Failure> {
        let name = WorkloadName::Process(description.root_pid);
        Arriving::begin(&name, description)?.check(description)
    }

    #[test]
    fn a_workload_of_another_processor_is_refused_unless_nobody_is_to_compare() {
        let here = read();
        assert_eq!(check(&workload_on(Some(here.clone()))), Ok(()));
        assert_eq!(check(&workload_on(None)), Ok(()));
        let refused = |change: &dyn Fn(&mut CpuDescription), words: &[&str]| {
            let mut source = here.clone();
            change(&mut source);
            let failure = check(&workload_on(Some(source))).expect_err("a refusal");
            assert_eq!(failure.code(), ErrorCode::CpuDiffers, "{failure}");
            for word in words {
                assert!(failure.text().contains(word), "{word}: {failure}");
            }
        };
        refused(&|source| source.features.push(1), &["lacks", "feature 0"]);
        refused(
            &|source| source.vendor = "CentaurHauls".to_owned(),
            &["CentaurHauls"],
        );
        refused(
            &|source| {
                // The one that this processor has not: nobody has switched on the last.
                source.xcr0 |= 1 << COMPONENT_LAST;
            },
            &["component 62"],
        );
        if !here.components.is_empty() {
            refused(
                &|source| source.components[0].offset += 64,
                &["avx", "xsave has"],
            );
        }
    }
}
