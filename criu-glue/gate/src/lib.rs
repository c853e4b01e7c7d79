//! What a container runtime starts in CRIU's place, and what that is told.
//!
//! A runtime makes a socket pair and starts `criu swrk FD`, which it finds by `PATH`. Where we are
//! asked first, that is the program of this crate: it gives FD to whoever made the folder in which
//! it was found, waits, and becomes the real CRIU on a socket that it gets in return. So nothing of
//! ours stays in the tree that CRIU makes, and the runtime's words reach CRIU through us.
//!
//! ```text
//! runtime ── FD ── pageferry-criu ──────── exec ─────────► criu swrk FD
//!                    │ hello: FD               ▲ instructions: CRIU's end of another pair
//!                    ▼                         │
//!                  the gate ───────────────────┘
//! ```
//!
//! The two say one packet each, on a `SOCK_SEQPACKET` socket. A gate that closes instead says no:
//! the program fails, and so does what the runtime wanted.
//!
//! Invariants: nothing is ever written to standard output or error, which may be those of the
//! container; no descriptor that the runtime has opened for CRIU changes its number, and none of
//! ours is left open but those that the instructions name.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The name by which a runtime looks for CRIU.
pub const PROGRAM: &str = "criu";

/// The socket beside it.
pub const SOCKET: &str = "gate";

/// The name by which CRIU looks for whoever writes and reads what is in a tmpfs; the program goes
/// by this name, too, in a folder of its own beside it.
pub const TAR: &str = "tar";

/// That folder.
pub const TOOLS: &str = "tools";

/// What the program says first; FD goes with it.
pub const HELLO: &[u8] = b"swrk";

/// Longest packet, in bytes: some paths.
pub const PACKET_MAX: usize = 64 << 10; // 64 KiB

/// Most descriptors with one packet.
pub const DESCRIPTORS_MAX: usize = 16;

/// How to become CRIU. The first descriptor that comes with it is CRIU's socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instructions {
    /// The real `criu`; an absolute path.
    pub program: PathBuf,
    /// How many of the next descriptors are namespaces to enter, in this order.
    pub namespaces: usize,
    /// Whether memory may come in huge pages, also that of everything it starts.
    pub huge_pages: bool,
    /// All of the environment.
    pub environment: Vec<(OsString, Value)>,
}

/// The value of a variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(OsString),
    /// The number of the next descriptor that is no namespace, which stays open.
    Descriptor,
}

/// Why a packet says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("a line begins with {0:?}")]
    Unknown(u8),
    #[error("a variable without a value")]
    NoValue,
    #[error("no program")]
    NoProgram,
}

impl Instructions {
    /// How many descriptors go with it.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        let kept = |(_, value): &&(OsString, Value)| *value == Value::Descriptor;
        1 + self.namespaces + self.environment.iter().filter(kept).count()
    }

    /// Lines that end with a zero byte, each with what it is in its first.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut packet = Vec::new();
        let mut line = |kind: u8, text: &[&[u8]]| {
            packet.push(kind);
            packet.extend(text.concat());
            packet.push(0);
        };
        line(b'p', &[self.program.as_os_str().as_bytes()]);
        for _ in 0..self.namespaces {
            line(b'n', &[]);
        }
        if !self.huge_pages {
            line(b's', &[]);
        }
        for (name, value) in &self.environment {
            match value {
                Value::Text(text) => line(b'v', &[name.as_bytes(), b"=", text.as_bytes()]),
                Value::Descriptor => line(b'd', &[name.as_bytes()]),
            }
        }
        packet
    }

    /// What [`Instructions::encode`] has written.
    ///
    /// # Errors
    /// [`DecodeError`] of the first line that means nothing.
    pub fn decode(packet: &[u8]) -> Result<Self, DecodeError> {
        let mut read = Self {
            huge_pages: true,
            ..Self::default()
        };
        let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        for line in packet.split(|byte| *byte == 0) {
            let Some((kind, text)) = line.split_first() else {
                continue;
            };
            match kind {
                b'p' => read.program = OsStr::from_bytes(text).into(),
                b'n' => read.namespaces += 1,
                b's' => read.huge_pages = false,
                b'v' => {
                    let end = text.iter().position(|byte| *byte == b'=');
                    let (name, value) = text.split_at(end.ok_or(DecodeError::NoValue)?);
                    let value = Value::Text(owned(&value[1..]));
                    read.environment.push((owned(name), value));
                }
                b'd' => read.environment.push((owned(text), Value::Descriptor)),
                unknown => return Err(DecodeError::Unknown(*unknown)),
            }
        }
        match read.program.as_os_str().is_empty() {
            true => Err(DecodeError::NoProgram),
            false => Ok(read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_arrive_as_they_were_given() {
        let text = |text: &str| Value::Text(text.into());
        let given = Instructions {
            program: "/usr/sbin/criu".into(),
            namespaces: 2,
            huge_pages: false,
            environment: vec![
                ("FEED".into(), Value::Descriptor),
                ("LD_PRELOAD".into(), text("/a=b")),
                ("ALONE".into(), text("")),
            ],
        };
        assert_eq!(given.descriptors(), 4);
        assert_eq!(Instructions::decode(&given.encode()), Ok(given.clone()));
        let plain = Instructions {
            program: "/criu".into(),
            huge_pages: true,
            ..Instructions::default()
        };
        assert_eq!(plain.descriptors(), 1);
        assert_eq!(Instructions::decode(&plain.encode()), Ok(plain));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let refused = |packet: &[u8]| Instructions::decode(packet).unwrap_err();
        assert_eq!(refused(b""), DecodeError::NoProgram);
        assert_eq!(refused(b"p/criu\0x\0"), DecodeError::Unknown(b'x'));
        assert_eq!(refused(b"p/criu\0vNAME\0"), DecodeError::NoValue);
    }
}
