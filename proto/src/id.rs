//! Names of things: migrations, generations, spaces, rounds, nodes and workloads.
//!
//! Every type here is a value that is legal by construction: what comes from a peer, a file or a
//! command line is parsed once, and an illegal text or number becomes an [`IdError`].

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

pub use member::{MEMBERS_MAX, MemberIndex, SpaceId};

mod member;

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

/// One pass of pre-copy over all spaces. Starts at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(NonZeroU32);

/// The name of a node, as in its certificate and in its peers' configuration:
/// 1 to 63 characters of `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

/// What moves, as its node knows it: `KIND/NAME`. Both nodes read every kind, whether or not they
/// can move it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadName {
    /// A container of containerd: `containerd/NAMESPACE/ID`.
    Containerd {
        /// The namespace of containerd that it is in.
        namespace: ContainerId,
        /// Its id there.
        id: ContainerId,
    },
    /// A container that crun runs for nobody else: `crun/ID`.
    Crun(ContainerId),
    /// A pod of Kubernetes: `pod/UID`.
    Pod(PodUid),
    /// A container of podman: `podman/NAME`.
    Podman(ContainerId),
    /// A pod of podman, with all its containers: `podman-pod/NAME`.
    PodmanPod(ContainerId),
    /// A process tree, named by the pid of its root in the node's pid namespace, which is at least
    /// 1: `process/PID`.
    Process(i32),
    /// A container that runc runs for nobody else: `runc/ID`.
    Runc(ContainerId),
}

/// What a workload is to its node: the first part of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKind {
    /// A container of containerd.
    Containerd,
    /// A container of crun alone.
    Crun,
    /// A pod of Kubernetes.
    Pod,
    /// A container of podman.
    Podman,
    /// A pod of podman.
    PodmanPod,
    /// A bare process tree.
    Process,
    /// A container of runc alone.
    Runc,
}

/// What a runtime or an engine calls a container: 1 to 128 characters of `A-Z`, `a-z`, `0-9`, `_`,
/// `.`, `+` and `-`, the first a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

/// What a node calls a network namespace, as `ip netns` and container engines do: a name as a
/// [`ContainerId`] is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

/// What Kubernetes knows a pod by: a UUID in lower case, as the API server writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(String);

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
    /// Not 1 to 128 of the characters that a container's name has.
    #[error(
        "container {0:?} is not 1 to 128 characters of A-Z, a-z, 0-9, _, ., + and -, the first a \
         letter or a digit"
    )]
    Container(String),
    /// The same of a network's name.
    #[error(
        "network {0:?} is not 1 to 128 characters of A-Z, a-z, 0-9, _, ., + and -, the first a \
         letter or a digit"
    )]
    Network(String),
    /// Not a UUID in lower case.
    #[error("pod {0:?} is not a UID as the API server writes it, a UUID in lower case")]
    PodUid(String),
    /// Not of the form that its kind has.
    #[error("workload {text:?} is not of the form {form}")]
    WorkloadForm {
        /// What was read.
        text: String,
        /// What its kind has.
        form: &'static str,
    },
    /// No kind of workload.
    #[error(
        "workload {text:?} is of no known kind: {kind:?} is not one of {}",
        kinds()
    )]
    WorkloadKind {
        /// What was read.
        text: String,
        /// What stands for a kind in it.
        kind: String,
    },
    /// More members than a party has.
    #[error("there is no member {0} of a workload: there are at most {MEMBERS_MAX}, from 0")]
    Member(usize),
    /// A pid that no kernel has.
    #[error("pid {0} is more than the number of an address space can say")]
    SpacePid(u32),
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

impl ContainerId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match is_file_name(text) {
            true => Ok(Self(text.to_owned())),
            false => Err(IdError::Container(text.to_owned())),
        }
    }
}

impl NetworkName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NetworkName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match is_file_name(text) {
            true => Ok(Self(text.to_owned())),
            false => Err(IdError::Network(text.to_owned())),
        }
    }
}

impl PodUid {
    /// The UID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for PodUid {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let parts = text.split('-').map(str::len);
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let is_text = text.bytes().all(|byte| is_digit(byte) || byte == b'-');
        match is_text && parts.eq(UUID_PARTS) {
            true => Ok(Self(text.to_owned())),
            false => Err(IdError::PodUid(text.to_owned())),
        }
    }
}

/// Digits of the parts of a UUID.
const UUID_PARTS: [usize; 5] = [8, 4, 4, 4, 12];

/// Whether a text can name a file, and nothing but a file of the folder it is looked for in.
fn is_file_name(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    let begins = text.starts_with(|first: char| first.is_ascii_alphanumeric());
    begins && text.len() <= NAME_BYTES_MAX && text.bytes().all(legal)
}

/// Longest name of a container or a network, in bytes: containerd takes 76, podman makes 64, and
/// with something around it it is to be the name of a file.
const NAME_BYTES_MAX: usize = 128;

impl WorkloadKind {
    /// Every kind, in the order of their names.
    pub const ALL: [Self; 7] = [
        Self::Containerd,
        Self::Crun,
        Self::Pod,
        Self::Podman,
        Self::PodmanPod,
        Self::Process,
        Self::Runc,
    ];

    /// The first part of the names of this kind.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Crun => "crun",
            Self::Pod => "pod",
            Self::Podman => "podman",
            Self::PodmanPod => "podman-pod",
            Self::Process => "process",
            Self::Runc => "runc",
        }
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl WorkloadName {
    /// What it is.
    pub const fn kind(&self) -> WorkloadKind {
        match self {
            Self::Containerd { .. } => WorkloadKind::Containerd,
            Self::Crun(_) => WorkloadKind::Crun,
            Self::Pod(_) => WorkloadKind::Pod,
            Self::Podman(_) => WorkloadKind::Podman,
            Self::PodmanPod(_) => WorkloadKind::PodmanPod,
            Self::Process(_) => WorkloadKind::Process,
            Self::Runc(_) => WorkloadKind::Runc,
        }
    }
}

impl fmt::Display for WorkloadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Self::Containerd { namespace, id } => write!(f, "{kind}/{namespace}/{id}"),
            Self::Crun(name) | Self::Podman(name) | Self::PodmanPod(name) | Self::Runc(name) => {
                write!(f, "{kind}/{name}")
            }
            Self::Pod(uid) => write!(f, "{kind}/{uid}"),
            Self::Process(pid) => write!(f, "{kind}/{pid}"),
        }
    }
}

impl FromStr for WorkloadName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let (kind, name) = text.split_once('/').unwrap_or((text, ""));
        let Some(known) = WorkloadKind::ALL.iter().find(|known| known.name() == kind) else {
            let (text, kind) = (text.to_owned(), kind.to_owned());
            return Err(IdError::WorkloadKind { text, kind });
        };
        match known {
            WorkloadKind::Containerd => match name.split_once('/') {
                Some((namespace, id)) => Ok(Self::Containerd {
                    namespace: namespace.parse()?,
                    id: id.parse()?,
                }),
                None => Err(IdError::WorkloadForm {
                    text: text.to_owned(),
                    form: "containerd/NAMESPACE/ID",
                }),
            },
            WorkloadKind::Crun => name.parse().map(Self::Crun),
            WorkloadKind::Pod => name.parse().map(Self::Pod),
            WorkloadKind::Podman => name.parse().map(Self::Podman),
            WorkloadKind::PodmanPod => name.parse().map(Self::PodmanPod),
            WorkloadKind::Process => match parse_pid(name) {
                Some(pid) => Ok(Self::Process(pid)),
                None => Err(IdError::Pid(text.to_owned())),
            },
            WorkloadKind::Runc => name.parse().map(Self::Runc),
        }
    }
}

/// The names of all kinds.
fn kinds() -> String {
    WorkloadKind::ALL.map(WorkloadKind::name).join(", ")
}

/// A pid in its only spelling: no sign, no leading zero, so that a name has one text.
fn parse_pid(text: &str) -> Option<i32> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.starts_with('0') {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
#[path = "id_tests.rs"]
mod tests;
