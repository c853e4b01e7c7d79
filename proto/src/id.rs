//! Names of things: migrations, generations, spaces, rounds, nodes and workloads.
//!
//! Every type here is a value that is legal by construction: what comes from a peer, a file or a
//! command line is parsed once, and an illegal text or number becomes an [`IdError`].

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

/// One migration, from the offer to its end. Chosen at random by the source's daemon.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId([u8; MigrationId::BYTES]);

/// One attempt to hand the workload over. Starts at 1 and grows with every new attempt of one
/// migration; whoever sees an older generation than the one it holds ignores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(NonZeroU32);

/// One life of the target's side of a migration: drawn anew by every target process that
/// accepts an offer, so that a source can tell a target that lost its memory from the one it
/// has been sending pages to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// One address space of a migration: the pid of its leader as seen in the pid namespace of the
/// workload's root, which is what CRIU names it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

/// One pass of pre-copy over all spaces. Starts at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(NonZeroU32);

/// The name of a node, as in its certificate and in its peers' configuration:
/// 1 to 63 characters of `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

/// What moves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadName {
    /// A process tree, named by the pid of its root in the node's pid namespace. At least 1.
    Process(i32),
}

/// Why a text or a number is not a name of one of the kinds in this module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 hexadecimal digits.
    #[error("migration id {0:?} is not 32 hexadecimal digits")]
    MigrationId(String),
    /// Not 1 to 63 characters of `a-z`, `0-9` and `-`.
    #[error("node name {0:?} is not 1 to 63 characters of a-z, 0-9 and -")]
    NodeName(String),
    /// `process/` followed by something that is not a pid.
    #[error("workload {0:?} does not name a process by a pid of at least 1")]
    Pid(String),
    /// Neither a kind this build can move nor one it knows of.
    #[error("workload {0:?} is not of the form process/PID")]
    WorkloadForm(String),
    /// A kind of workload that has a name, but cannot be moved by this build.
    #[error("workload kind {0} is not supported yet by this build")]
    WorkloadKind(&'static str),
    /// Generation 0.
    #[error("generation 0 is never valid")]
    GenerationZero,
    /// Round 0.
    #[error("round 0 is never valid")]
    RoundZero,
}

impl MigrationId {
    /// Length of the binary form, in bytes.
    pub const BYTES: usize = 16;

    /// The id with these bytes.
    pub const fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// The binary form, as on the wire.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

impl FromStr for MigrationId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let refuse = || IdError::MigrationId(text.to_owned());
        // The digits are checked first: from_str_radix would also take a sign.
        if text.len() != 2 * Self::BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refuse());
        }
        let value = u128::from_str_radix(text, 16).map_err(|_| refuse())?;
        Ok(Self(value.to_be_bytes()))
    }
}

impl Generation {
    /// The first attempt.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The last there can be: what ends it ends all of them.
    pub const LAST: Self = Self(NonZeroU32::MAX);

    /// The generation with this number, unless it is 0.
    pub fn new(number: u32) -> Result<Self, IdError> {
        NonZeroU32::new(number)
            .map(Self)
            .ok_or(IdError::GenerationZero)
    }

    /// Its number, at least 1.
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    /// The generation after this one; the last one is its own successor.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Round {
    /// The first pass, over everything.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The round with this number, unless it is 0.
    pub fn new(number: u32) -> Result<Self, IdError> {
        NonZeroU32::new(number).map(Self).ok_or(IdError::RoundZero)
    }

    /// Its number, at least 1.
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    /// The round after this one; the last one is its own successor.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl NodeName {
    /// Longest name, in bytes: that of a DNS label, since the name is one in a certificate.
    pub const BYTES_MAX: usize = 63;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NodeName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || Self::BYTES_MAX < text.len() || !text.bytes().all(legal) {
            return Err(IdError::NodeName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for WorkloadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process/{pid}"),
        }
    }
}

impl FromStr for WorkloadName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let Some((kind, name)) = text.split_once('/') else {
            return Err(IdError::WorkloadForm(text.to_owned()));
        };
        if kind == "process" {
            return parse_pid(name)
                .map(Self::Process)
                .ok_or_else(|| IdError::Pid(text.to_owned()));
        }
        match UNSUPPORTED_KINDS.iter().find(|&&known| known == kind) {
            Some(known) => Err(IdError::WorkloadKind(known)),
            None => Err(IdError::WorkloadForm(text.to_owned())),
        }
    }
}

/// A pid in its only spelling: no sign, no leading zero, so that a name has one text.
fn parse_pid(text: &str) -> Option<i32> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.starts_with('0') {
        return None;
    }
    text.parse().ok()
}

/// Kinds of workload that have a name in the design and no runtime in this build.
const UNSUPPORTED_KINDS: [&str; 4] = ["runc", "crun", "podman", "containerd"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_id_reads_what_it_prints() {
        let id = MigrationId::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xff]);
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn a_migration_id_takes_nothing_but_digits() {
        for text in [
            "",
            "00",
            "+0102030405060708090a0b0c0d0e0ff",
            "zz0102030405060708090a0b0c0d0e",
        ] {
            assert_eq!(
                text.parse::<MigrationId>(),
                Err(IdError::MigrationId(text.to_owned()))
            );
        }
    }

    #[test]
    fn zero_is_no_generation_and_no_round() {
        assert_eq!(Generation::new(0), Err(IdError::GenerationZero));
        assert_eq!(Round::new(0), Err(IdError::RoundZero));
        assert_eq!(Generation::new(1), Ok(Generation::FIRST));
        assert_eq!(Round::FIRST.next().number(), 2);
    }

    #[test]
    fn a_node_name_is_a_lower_case_label() {
        assert_eq!("node-7".parse::<NodeName>().unwrap().as_str(), "node-7");
        for text in ["", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert_eq!(
                text.parse::<NodeName>(),
                Err(IdError::NodeName(text.to_owned()))
            );
        }
    }

    #[test]
    fn a_workload_name_reads_what_it_prints() {
        let name = WorkloadName::Process(4711);
        assert_eq!(name.to_string(), "process/4711");
        assert_eq!(name.to_string().parse(), Ok(name));
    }

    #[test]
    fn a_pid_has_one_spelling() {
        for text in [
            "process/0",
            "process/-1",
            "process/+1",
            "process/01",
            "process/",
            "process/9999999999",
        ] {
            assert_eq!(
                text.parse::<WorkloadName>(),
                Err(IdError::Pid(text.to_owned()))
            );
        }
    }

    #[test]
    fn a_kind_without_a_runtime_is_refused_by_its_name() {
        assert_eq!(
            "podman/web".parse::<WorkloadName>(),
            Err(IdError::WorkloadKind("podman"))
        );
        let refused = "vm/web".parse::<WorkloadName>();
        assert_eq!(refused, Err(IdError::WorkloadForm("vm/web".to_owned())));
    }
}
