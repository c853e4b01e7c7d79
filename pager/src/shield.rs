//! How the pager's process shields itself: from being killed with others, and from the network.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

use crate::error::PagerError;

/// Of all processes the one to be killed for memory last, short of never. Lowering it needs
/// CAP_SYS_RESOURCE.
const OOM_SCORE_ADJ: &str = "-900";

/// The `cgroup.procs` files of the cgroups that the two processes go into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CgroupFiles {
    /// The pager's.
    pub pager: Vec<PathBuf>,
    /// The watcher's, which must be others: what takes one must not take both.
    pub watcher: Vec<PathBuf>,
}

/// Goes into these cgroups.
pub fn join(cgroups: &[PathBuf]) -> Result<(), PagerError> {
    let mut files = cgroups.iter();
    files.try_for_each(|path| {
        // The kernel reads it as the process that writes.
        let written = fs::write(path, "0");
        written.map_err(|source| PagerError::Cgroup {
            path: path.clone(),
            source,
        })
    })
}

/// Makes this process one that lives long and can do little. Answers the network namespace it
/// was started in.
pub fn shield() -> Result<OwnedFd, PagerError> {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        warn!(%error, "cannot lower oom_score_adj: the pager is killed for memory like any other");
    }
    // Each restored process, and each child it forks, is a descriptor.
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
    let network = File::open("/proc/self/ns/net").map_err(PagerError::Namespace)?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| PagerError::Namespace(errno.into()))?;
    Ok(network.into())
}
