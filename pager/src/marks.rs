//! The files in a pager's directory, and its first word: what a daemon knows one by.

use std::fs;
use std::io;
use std::path::Path;

use crate::message::FillReport;

/// Name of the pager's socket in its directory.
pub const SOCKET: &str = "pager.sock";

/// A pager's log in its directory.
pub const LOG: &str = "pager.log";

/// What the pager says on its standard output when it can be connected to.
pub const READY: &str = "ready";

/// Name of the file that is written when all is filled: a [`FillReport`] in JSON.
/// The pager ends soon after, so a daemon that was restarted meanwhile finds no pager but this.
pub const FILLED: &str = "filled";

/// Name of the file that says that a fill was lost.
pub const FILL_LOST: &str = "fill-lost";

/// Name of the file that says that the pager died while it held a tree that had not run.
pub const RESTORE_LOST: &str = "restore-lost";

/// Writes [`FILLED`], all of it or not.
pub fn write_filled(directory: &Path, report: &FillReport) -> io::Result<()> {
    let unfinished = directory.join(format!("{FILLED}.new"));
    fs::write(&unfinished, serde_json::to_vec(report)?)?;
    fs::rename(&unfinished, directory.join(FILLED))
}
