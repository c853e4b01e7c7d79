//! From a CRIU log to the cause of a failure.
//!
//! CRIU logs every step of its retreat as an error too; what went wrong is the first one.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The first error of a log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text} (line {line} of criu's log)")]
pub struct LogError {
    /// From 1.
    pub line: usize,
    /// Without time stamp and process.
    pub text: String,
}

/// The log could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read criu's log {path}")]
pub struct ReportError {
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

/// The first error of the log at `path`, if it has one.
///
/// # Errors
/// [`ReportError`] when there is no log to be read.
pub fn first_error(path: &Path) -> Result<Option<LogError>, ReportError> {
    let failed = |source| ReportError {
        path: path.to_owned(),
        source,
    };
    let log = File::open(path).map_err(failed)?.take(LOG_MAX);
    let lines = BufReader::new(log).split(b'\n');
    for (line, text) in (1..).zip(lines) {
        let text = text.map_err(failed)?;
        if let Some(text) = error_of(&String::from_utf8_lossy(&text)) {
            return Ok(Some(LogError { line, text }));
        }
    }
    Ok(None)
}

/// `(00.012345)     77: Error (criu/file.c:12): text` → `criu/file.c:12: text`.
pub(crate) fn error_of(line: &str) -> Option<String> {
    let (_, error) = line.split_once("Error (")?;
    let (place, text) = error.split_once("): ")?;
    let text: String = text.trim().chars().take(TEXT_MAX).collect();
    let harmless = HARMLESS.iter().any(|known| text.starts_with(known));
    (!harmless).then(|| format!("{place}: {text}"))
}

/// Whether the error that made a dump fail is of a state that passes by itself: the tree may be
/// dumped without it a moment later.
pub fn passes(error: &str) -> bool {
    PASSING.iter().any(|known| error.contains(known))
}

/// Parts of the texts of CRIU 4.2 for them.
const PASSING: [&str; 8] = [
    // TCP: connections wait to be accepted. Unix: the same, at a socket that listens no more.
    "In-flight connection",
    // Unix: a client has written before it was accepted, or has gone away.
    "Non-empty write queue on an in-flight socket",
    "Found a closed in-flight socket",
    // Unix: a message that carries more than data and descriptors.
    "Control messages in queue, not supported",
    // Netlink.
    "The socket has data to read",
    // TCP: a socket that changed its state while sockets were listed.
    "Socket state ",
    // A task did not stop: it waits in a vfork, or for a device.
    "Timeout reached. Try to interrupt",
    // A thread that was about to end.
    "Zombie thread not supported",
];

/// Logged as errors, yet CRIU goes on: the limit of open files cannot be raised without
/// CAP_SYS_RESOURCE.
const HARMLESS: [&str; 1] = ["rlimit: Can't setup RLIMIT_NOFILE for self"];

/// How much of a log is searched, in bytes; at level 4 a large process logs a few MiB.
const LOG_MAX: u64 = 64 << 20; // 64 MiB

/// Longest text taken over, in characters.
const TEXT_MAX: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(log: &str, expected: Option<(usize, &str)>) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("dump.log");
        std::fs::write(&path, log).expect("writable");
        let found = first_error(&path).expect("readable");
        let expected = expected.map(|(line, text)| LogError {
            line,
            text: text.to_owned(),
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_error_that_matters_is_found() {
        check(
            "(00.000001) Version: 4.2.1\n(00.1) Warn  (criu/a.c:1): b\n",
            None,
        );
        check(
            "(00.000002) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: \
             Operation not permitted\n\
             (00.012345)     77: Error (criu/files-reg.c:2227): Can't lookup mount=23 for fd=3\n\
             (00.012346) Error (criu/cr-dump.c:1): Dumping FAILED.\n",
            Some((2, "criu/files-reg.c:2227: Can't lookup mount=23 for fd=3")),
        );
        check(
            "pie: 77: Error (criu/pie/x.c:3): gone\n",
            Some((1, "criu/pie/x.c:3: gone")),
        );
    }

    #[test]
    fn a_state_that_passes_is_told_from_one_that_stays() {
        for text in [
            "criu/sk-inet.c:185: inet: In-flight connection (l) for 61a56",
            "criu/sk-netlink.c:77: netlink: The socket has data to read",
            "criu/sk-unix.c:480: unix: Non-empty write queue on an in-flight socket 0x1f",
            "criu/sk-queue.c:125: skqueue: Control messages in queue, not supported",
            "criu/cr-dump.c:1655: Timeout reached. Try to interrupt: 0",
        ] {
            assert!(passes(text), "{text}");
        }
        for text in [
            "criu/sk-unix.c:874: unix: External socket is used. Consider using --ext-unix-sk",
            "criu/sk-inet.c:137: inet: Unsupported proto 262 for socket 61442",
            "criu/files-reg.c:2227: Can't lookup mount=23 for fd=3",
        ] {
            assert!(!passes(text), "{text}");
        }
    }

    #[test]
    fn a_missing_log_is_named() {
        let error = first_error(Path::new("/nonexistent/dump.log")).expect_err("no such file");
        assert_eq!(
            error.to_string(),
            "cannot read criu's log /nonexistent/dump.log"
        );
    }
}
