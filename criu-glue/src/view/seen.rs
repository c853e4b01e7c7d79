//! Whether it is CRIU that sees through a feed.
//!
//! The library counts who loads it, but that may have been another program: a shell that runs a
//! script in CRIU's place, or what such a script starts. What must be true is that the process that
//! speaks for CRIU, and will dump, has the feed mapped now. The kernel tells both: it writes the
//! sender's pid beside every packet, and lists mappings.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::Feed;
use crate::rpc::Conversation;

/// Why a worker does not see through the feed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Blind {
    #[error("criu has not said anything yet")]
    Silent,
    #[error(
        "process {speaks} speaks for criu, not process {started}, which was started: a script in \
         criu's place must end in `exec criu \"$@\"`"
    )]
    Another { started: i32, speaks: i32 },
    #[error(
        "process {pid}, which speaks for criu and runs {program}, has not loaded it in this \
         version: the program must be criu itself, linked dynamically and allowed to read the \
         file, or a script that hands its environment and descriptors on to such a criu by exec"
    )]
    Unloaded { pid: i32, program: PathBuf },
    #[error("cannot read the mappings of process {pid}, which speaks for criu")]
    Inspect {
        pid: i32,
        #[source]
        source: io::Error,
    },
}

impl Feed {
    /// Checks that the process that sent the last packet is the worker that was started, and has
    /// this feed mapped. The worker must be waiting for an answer or a request.
    ///
    /// # Errors
    /// [`Blind`] with what is wrong.
    pub fn check_seen_by(&self, worker: &Conversation) -> Result<(), Blind> {
        let started = worker.pid();
        let speaks = worker.speaker().ok_or(Blind::Silent)?;
        if speaks != started {
            return Err(Blind::Another { started, speaks });
        }
        let pid = speaks;
        let inspecting = |source| Blind::Inspect { pid, source };
        let inode = self.memory.metadata().map_err(inspecting)?.ino();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(inspecting)?;
        let is_feed = |line: &str| {
            let mut words = line.split_ascii_whitespace().skip(4);
            let (found, name) = (words.next(), words.next());
            name == Some(NAME_IN_MAPS) && found.is_some_and(|found| found.parse() == Ok(inode))
        };
        if maps.lines().any(is_feed) {
            return Ok(());
        }
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        Err(Blind::Unloaded { pid, program })
    }
}

/// What `/proc` calls the memory file of a feed.
const NAME_IN_MAPS: &str = "/memfd:criu-view";
