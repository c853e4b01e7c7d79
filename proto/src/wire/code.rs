//! Why something ended: one enum for messages, stream resets, connection closes, the API and the
//! command line.
//!
//! A [`Failure`] is a code, which programs act upon, and a text, which only people read. Errors
//! of this program's types never cross the wire; whoever tells a peer chooses a code.

use std::fmt;
use std::str::FromStr;

/// Defines the enum once: variant, kebab-case name, wire value.
macro_rules! codes {
    ($($(#[$doc:meta])+ $variant:ident = $value:literal, $name:literal;)+) => {
        /// The reason of an end. On the wire a `u32` that is never 0, in text kebab-case.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum ErrorCode {
            $($(#[$doc])+ $variant = $value,)+
        }

        impl ErrorCode {
            /// Every code, in the order of wire values.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Its name: what the API and the command line print.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The code with this wire value. A value this build does not know is
            /// [`ErrorCode::Unknown`], so that a newer peer can still say that it gave up.
            /// None for 0, which is never valid.
            pub const fn from_wire(value: u32) -> Option<Self> {
                match value {
                    0 => None,
                    $($value => Some(Self::$variant),)+
                    1..=u32::MAX => Some(Self::Unknown),
                }
            }
        }
    };
}

codes! {
    /// A reason that this build does not know; the text says more.
    Unknown = 1, "unknown";
    /// Nothing is wrong: the migration is over and the connection is no longer needed.
    Finished = 2, "finished";
    /// A fault of this program.
    Internal = 3, "internal";
    /// No version that both nodes speak.
    Version = 4, "version";
    /// Bytes that break a clause of the protocol.
    Malformed = 5, "malformed";
    /// More of something than a limit allows.
    Limit = 6, "limit";
    /// A checksum that does not fit its bytes.
    Checksum = 7, "checksum";
    /// A message or an event that has no place in the present state.
    Unexpected = 8, "unexpected";
    /// The connection to the peer is gone, or there never was one.
    PeerLost = 9, "peer-lost";
    /// A step took longer than its limit.
    Timeout = 10, "timeout";
    /// The operator ended it.
    Aborted = 11, "aborted";
    /// The operator declared the other side dead.
    Fenced = 12, "fenced";
    /// The target refused to run the workload, and has that on disk.
    Refused = 13, "refused";
    /// A newer connection or migration took the place of this one.
    Superseded = 14, "superseded";
    /// The journal could not be written.
    JournalFailed = 15, "journal-failed";
    /// The freeze found what another round must send first.
    RetryRound = 16, "retry-round";
    /// The daemon was restarted before the hand-off was decided.
    Restarted = 17, "restarted";
    /// The peer is not one this node is configured to talk to.
    PeerUnknown = 18, "peer-unknown";
    /// The stream or connection names a migration that this node does not know.
    MigrationUnknown = 19, "migration-unknown";
    /// The workload stood still for as long as it may, and runs on at the source.
    FrozenTooLong = 20, "frozen-too-long";
    /// The peer's certificate, or ours, is not accepted.
    PeerUntrusted = 21, "peer-untrusted";
    /// The id that a migration was to have is that of another one.
    IdTaken = 22, "id-taken";

    /// This build cannot move this kind of workload, or something it is made of.
    UnsupportedWorkload = 32, "unsupported-workload";
    /// The workload does not exist, or ended by itself.
    WorkloadGone = 33, "workload-gone";
    /// The workload is already being moved.
    WorkloadBusy = 34, "workload-busy";
    /// A pid of the workload is in use at the target.
    PidTaken = 35, "pid-taken";
    /// A file that the workload uses is missing or different at the target.
    FileDiffers = 36, "file-differs";
    /// A file that the workload may write is not declared shared.
    FileWritable = 37, "file-writable";
    /// A space has memory that was never tracked.
    NotTracked = 38, "not-tracked";
    /// A space cannot be tracked.
    Untrackable = 39, "untrackable";
    /// The workload writes its memory by direct or asynchronous I/O.
    DirectIo = 40, "direct-io";
    /// The workload has an io_uring.
    IoUring = 41, "io-uring";
    /// The workload maps huge pages of hugetlbfs.
    Hugetlb = 42, "hugetlb";
    /// A task of the workload is traced.
    Traced = 43, "traced";
    /// The workload maps secret memory.
    Secretmem = 44, "secretmem";
    /// More memory that only CRIU can copy than the budget allows.
    SharedMemoryBudget = 45, "shared-memory-budget";
    /// The workload's network cannot be rebuilt at the target.
    NetworkUnfit = 46, "network-unfit";
    /// The workload's terminal or standard streams cannot be moved.
    StdioUnfit = 47, "stdio-unfit";
    /// Live pages of the frozen workload could not be read.
    PagesUnread = 48, "pages-unread";
    /// Each freeze met the workload in a state that passes, but cannot be dumped.
    PassingState = 49, "passing-state";
    /// The workload has a lock or a lease on a file that both nodes share, and it cannot move.
    SharedLock = 50, "shared-lock";
    /// The workload maps a file, shared and writable, whose caches are not coherent.
    SharedIncoherent = 51, "shared-incoherent";
    /// A connection over loopback to a process that does not move.
    LoopbackPeer = 52, "loopback-peer";
    /// The workload uses objects of System V or POSIX message queues that cannot move.
    IpcUnfit = 53, "ipc-unfit";
    /// Something of the workload's System V objects would not be carried.
    IpcLost = 54, "ipc-lost";
    /// A folder that is to travel with the workload cannot.
    FolderUnfit = 55, "folder-unfit";

    /// The target has as many migrations as it takes.
    TargetBusy = 64, "target-busy";
    /// The node lacks something that the migration needs.
    NodeUnfit = 65, "node-unfit";
    /// The node has too little memory or disk.
    Capacity = 66, "capacity";
    /// CRIU failed.
    CriuFailed = 67, "criu-failed";
    /// The workload could not be frozen.
    FreezeFailed = 68, "freeze-failed";
    /// A page differs between source and target.
    VerifyMismatch = 69, "verify-mismatch";
    /// The target lacks pages that are live at the source.
    LedgerIncomplete = 70, "ledger-incomplete";
    /// The mappings changed after they were described to CRIU.
    SmapsDiffer = 71, "smaps-differ";
    /// The process that fills the workload's memory died.
    FillLost = 72, "fill-lost";
    /// A path declared shared is not the same storage at both nodes.
    SharedDiffers = 73, "shared-differs";
    /// What the workload wrote to shared storage could not be made durable.
    SyncFailed = 74, "sync-failed";
    /// The node has less memory than the workload may need.
    MemoryShort = 75, "memory-short";
    /// The target's processor lacks something that the source's has.
    CpuDiffers = 76, "cpu-differs";
    /// Between the two nodes another process has taken a file lock that is the workload's.
    LockTaken = 77, "lock-taken";
    /// A container runtime failed.
    RuntimeFailed = 78, "runtime-failed";
    /// The target has another workload of this name.
    NameTaken = 79, "name-taken";
    /// The target has something where a folder is to come that travels.
    PathTaken = 80, "path-taken";
    /// The node has too little room on disk.
    DiskShort = 81, "disk-short";
    /// A folder that travelled is not the same at both nodes.
    FolderDiffers = 82, "folder-differs";
    /// The workload ran at the target, and pages of it that only the source had are lost.
    LostInDrain = 83, "lost-in-drain";
    /// The target takes no workload with pages missing.
    PostcopyForbidden = 84, "postcopy-forbidden";
}

/// What went wrong: a code to act upon and a text to read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Failure {
    code: ErrorCode,
    text: String,
}

/// A text that is no code's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of an error code")]
pub struct UnknownCode(pub String);

impl ErrorCode {
    /// Its value on the wire, and in stream resets and connection closes. Never 0.
    pub const fn wire(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ErrorCode {
    type Err = UnknownCode;

    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        let named = Self::ALL.iter().find(|code| code.name() == text);
        named.copied().ok_or_else(|| UnknownCode(text.to_owned()))
    }
}

impl Failure {
    /// Longest text, in bytes. Enough for a path (4096) would let a peer's log lines grow;
    /// 1 KiB holds a sentence and what it is about.
    pub const TEXT_BYTES_MAX: usize = 1024;

    /// A failure. A text that is too long is cut at a character.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let mut text = text.into();
        if Self::TEXT_BYTES_MAX < text.len() {
            text.truncate(text.floor_char_boundary(Self::TEXT_BYTES_MAX));
        }
        Self { code, text }
    }

    /// Its code.
    pub const fn code(&self) -> ErrorCode {
        self.code
    }

    /// Its text, at most [`Failure::TEXT_BYTES_MAX`] bytes.
    pub fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_reads_what_it_prints_and_survives_the_wire() {
        for &code in ErrorCode::ALL {
            assert_eq!(code.to_string().parse(), Ok(code));
            assert_eq!(ErrorCode::from_wire(code.wire()), Some(code));
            let kebab = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
            assert!(code.name().bytes().all(kebab), "{code}");
        }
        assert!(ErrorCode::ALL.is_sorted_by(|a, b| a.wire() < b.wire()));
    }

    // clause: V-5
    #[test]
    fn a_code_of_a_newer_peer_is_unknown_and_zero_is_none() {
        assert_eq!(ErrorCode::from_wire(0), None);
        assert_eq!(
            ErrorCode::from_wire(4_000_000_000),
            Some(ErrorCode::Unknown)
        );
        assert!("no-such-code".parse::<ErrorCode>().is_err());
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let failure = Failure::new(ErrorCode::Internal, "ä".repeat(1000));
        assert_eq!(failure.text().len(), Failure::TEXT_BYTES_MAX);
        let odd = Failure::new(ErrorCode::Internal, format!("x{}", "ä".repeat(1000)));
        assert_eq!(odd.text().len(), Failure::TEXT_BYTES_MAX - 1);
    }
}
