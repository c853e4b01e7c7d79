//! Why a pager could not run.

use std::io;
use std::path::PathBuf;

use crate::channel::ChannelError;
use crate::watcher::WatcherError;

/// Why a pager could not run.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// It cannot leave the cgroup of the daemon.
    #[error("cannot join the cgroup of {path}")]
    Cgroup {
        /// Its `cgroup.procs`.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no watcher.
    #[error("cannot be watched")]
    Watcher(#[source] WatcherError),
    /// The network namespace cannot be left.
    #[error("cannot use network namespaces")]
    Namespace(#[source] io::Error),
    /// The runtime cannot be started.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// Nobody can connect.
    #[error("cannot be talked to")]
    Channel(#[source] ChannelError),
}
