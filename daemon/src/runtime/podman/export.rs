//! `podman container checkpoint --export`, without a dump: what it writes is the container as
//! podman knows it.
//!
//! podman has its runtime checkpoint the container and leave it running. The runtime finds us where
//! it looks for CRIU, and hears that all went well; so podman goes on, and the container has not
//! stopped for a moment.

use std::fs::{self, DirBuilder};
use std::io::{self, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criu_glue::rpc::{Gate, GateError, Runtime, RuntimeError};
use pageferry_proto::wire::container::ARCHIVE_BYTES_MAX;
use thiserror::Error;

use super::archive::{is_whole, without_policy};
use super::{PROGRAM, Podman};

/// How long podman may take from its start to its runtime's request.
const ASK_MAX: Duration = Duration::from_secs(20);

/// How long it may take to export.
const END_MAX: Duration = Duration::from_secs(20);

/// How often it is exported, if what the container prints spoils that.
const EXPORTS_MAX: u32 = 8;

/// Where podman has its runtime put images, in the container's bundle, and what says to the import
/// that there are some. They come from us; it may be empty.
const IMAGES: &str = "checkpoint";
const INVENTORY: &str = "inventory.img";

/// Why there is no archive.
#[derive(Debug, Error)]
pub enum ExportError {
    /// A file or folder cannot be used.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// podman has not come to its request.
    #[error("{PROGRAM} container checkpoint")]
    Runtime(#[from] RuntimeError),
    /// Its request cannot be served.
    #[error("serving {PROGRAM} container checkpoint")]
    Gate(#[from] GateError),
    /// It has asked for something else.
    #[error("{PROGRAM} has asked for a dump of process {0:?}, which is another")]
    Other(Option<i32>),
    /// It has failed; `said` is the last of it.
    #[error("{PROGRAM} container checkpoint has failed: {said}")]
    Failed {
        /// The last line of what it said.
        said: String,
    },
    /// What it has written is not whole.
    #[error("{PROGRAM} has written an archive that cannot be read, {EXPORTS_MAX} times")]
    Spoilt(#[source] io::Error),
    /// It is too long for an offer.
    #[error("what {PROGRAM} exports has {0} bytes, more than {ARCHIVE_BYTES_MAX}")]
    TooLong(usize),
    /// Files that would not go along.
    #[error("the container has files in /dev/shm, which are not moved yet")]
    SharedFiles,
}

/// The archive. It is made in `folder`, which the caller removes. One that is spoilt by what the
/// container prints meanwhile is made again.
pub async fn export(
    podman: &Podman,
    programs: (&Path, &Path),
    folder: &Path,
) -> Result<Vec<u8>, ExportError> {
    let mut times = 1;
    loop {
        match once(podman, programs, folder).await {
            Err(ExportError::Spoilt(error)) if times < EXPORTS_MAX => {
                tracing::debug!(%error, times, "what podman exports is exported again");
                times += 1;
            }
            exported => return exported,
        }
    }
}

async fn once(
    podman: &Podman,
    (criu, stand_in): (&Path, &Path),
    folder: &Path,
) -> Result<Vec<u8>, ExportError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::Io {
            action,
            path,
            source,
        }
    };
    let bundle = podman.container.bundle();
    let shared = fs::read_dir(bundle.join("shm")).into_iter().flatten();
    if shared.flatten().next().is_some() {
        return Err(ExportError::SharedFiles);
    }
    // What an earlier one has left.
    drop(fs::remove_dir_all(folder));
    let mut private = DirBuilder::new();
    let made = private.mode(0o700).recursive(true).create(folder);
    made.map_err(io("creating", folder))?;
    let gate = Gate::bind(&folder.join("gate"), stand_in)?;
    let (archive, log) = (folder.join("container.tar"), folder.join("podman.log"));
    let arguments = [
        "container".as_ref(),
        "checkpoint".as_ref(),
        "--leave-running".as_ref(),
        "--ignore-rootfs".as_ref(),
        "--ignore-volumes".as_ref(),
        "--compress".as_ref(),
        "none".as_ref(),
        "--export".as_ref(),
        archive.as_os_str(),
        podman.id.as_str().as_ref(),
    ];
    let mut process = Runtime::start_engine(&gate, PROGRAM.as_ref(), arguments, log)?;
    let images = bundle.join(IMAGES);
    let exported = async {
        let asked = process.asks(&gate, criu, ASK_MAX).await?;
        let pid = asked.request().options().and_then(|options| options.pid);
        if pid != Some(podman.container.root()) {
            return Err(ExportError::Other(pid));
        }
        let inventory = images.join(INVENTORY);
        fs::write(&inventory, []).map_err(io("writing", &inventory))?;
        asked.pretend().await?;
        Ok(())
    };
    let exported = exported.await;
    let ended = process.ended(END_MAX).await;
    // It is nobody's then.
    drop(fs::remove_dir_all(&images));
    exported?;
    if !ended.is_ok_and(|status| status.success()) {
        let said = process.last_line();
        return Err(ExportError::Failed { said });
    }
    let exported = fs::File::open(&archive).map_err(io("reading", &archive))?;
    let exported = without_policy(BufReader::new(exported)).map_err(ExportError::Spoilt)?;
    if !is_whole(&exported).map_err(ExportError::Spoilt)? {
        return Err(ExportError::Spoilt(io::ErrorKind::UnexpectedEof.into()));
    }
    match exported.len() {
        length if ARCHIVE_BYTES_MAX < length => Err(ExportError::TooLong(length)),
        _ => Ok(exported),
    }
}
