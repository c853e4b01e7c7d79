//! What a CRIU run is asked to do, as types.
//!
//! `new` gives what suits a tree whose network, cgroups and packet lock belong to somebody else:
//! no network lock, no cgroups in the images, notifications on. Everything else is off until it is
//! asked for, and sent explicitly, so that neither CRIU's defaults nor a configuration file of the
//! system decide.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::rpc::message::{
    CriuFeatures, CriuInheritFd, CriuJoinNamespace, CriuOpts, CriuPageServerInfo, CriuRequest,
    RequestType,
};

/// One request to a worker, with the descriptors CRIU reopens while it serves it.
#[derive(Debug)]
pub struct Request {
    pub(crate) message: CriuRequest,
    /// Open until the worker is gone: CRIU goes through `/proc/OUR-PID/fd/N`.
    pub(crate) held: Vec<OwnedFd>,
}

/// Where a run's files go.
#[derive(Debug)]
pub struct Directories {
    /// Images.
    pub images: OwnedFd,
    /// Log, statistics and `lazy-pages.socket`; CRIU's current directory. Images, when absent.
    pub work: Option<OwnedFd>,
}

/// CRIU's log. Levels above [`LogLevel::Info`] cost time for every page.
#[derive(Clone, Debug)]
pub struct Log {
    /// A bare file name in the work directory.
    pub file: String,
    pub level: LogLevel,
}

/// `-v` of CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum LogLevel {
    Error = 1,
    Warning = 2,
    Info = 3,
    Debug = 4,
}

/// How CRIU keeps packets out while sockets are in repair mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum NetworkLock {
    Iptables = 1,
    Nftables = 2,
    /// Somebody else holds the lock.
    Skip = 3,
}

/// What CRIU does about cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ManageCgroups {
    Ignore = 0,
    None = 1,
    Properties = 2,
    Soft = 3,
    Full = 4,
    Strict = 5,
}

/// What becomes of the dumped tasks when the dump has succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterDump {
    Kill,
    LeaveRunning,
    LeaveStopped,
}

/// `dump`: a frozen tree goes into images.
#[derive(Debug)]
pub struct DumpOptions {
    /// Root of the tree, as seen in the worker's pid namespace.
    pub pid: i32,
    pub directories: Directories,
    pub log: Log,
    /// Path of the freezer cgroup that holds exactly this tree; it may be frozen already.
    pub freeze_cgroup: Option<String>,
    /// How long freezing may take, in seconds; CRIU's own limit is 10.
    pub freeze_timeout: Option<u32>,
    pub after: AfterDump,
    pub tcp_established: bool,
    pub file_locks: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub link_remap: bool,
    /// Largest deleted file that goes along, in bytes; CRIU's own limit is 1 MiB.
    pub ghost_limit: Option<u32>,
    pub network_lock: NetworkLock,
    pub manage_cgroups: ManageCgroups,
    /// `--external` strings, such as `mnt[/data]:data` or `net[4026531840]:key`.
    pub external: Vec<String>,
    pub root: Option<String>,
    pub notify: bool,
    /// Descriptor number *in the worker* of a page server's connection.
    pub page_server: Option<RawFd>,
}

/// `restore`: images become a tree.
#[derive(Debug)]
pub struct RestoreOptions {
    pub directories: Directories,
    pub log: Log,
    /// Memory is filled through `lazy-pages.socket` in the work directory.
    pub lazy_pages: bool,
    pub tcp_established: bool,
    pub file_locks: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub link_remap: bool,
    pub manage_cgroups: ManageCgroups,
    pub network_lock: NetworkLock,
    pub external: Vec<String>,
    /// External resources given as descriptors.
    pub inherit_fd: Vec<InheritFd>,
    pub join_namespaces: Vec<JoinNamespace>,
    pub root: Option<String>,
    /// The root task becomes our child instead of the worker's.
    pub sibling: bool,
    pub notify: bool,
}

/// An external resource, by the descriptor number it has *in the worker*
/// ([`crate::rpc::SwrkConfig::inherited`]).
#[derive(Clone, Debug)]
pub struct InheritFd {
    pub key: String,
    pub fd: RawFd,
}

/// A namespace the restored tree joins instead of getting its own.
#[derive(Clone, Debug)]
pub struct JoinNamespace {
    /// `net`, `uts`, `ipc`, `time`, `user` or `pid`.
    pub kind: String,
    pub file: String,
}

impl Request {
    #[must_use]
    pub fn dump(options: DumpOptions) -> Self {
        options.into_request()
    }

    #[must_use]
    pub fn restore(options: RestoreOptions) -> Self {
        options.into_request()
    }

    /// Asks for the version. The worker takes another request afterwards.
    #[must_use]
    pub fn version() -> Self {
        Self::plain(CriuRequest {
            kind: RequestType::Version as i32,
            keep_open: Some(true),
            ..CriuRequest::default()
        })
    }

    /// Asks for the features we may use; it also probes the kernel, and so writes CRIU's cache of
    /// kernel features. The worker takes another request afterwards.
    #[must_use]
    pub fn feature_check() -> Self {
        Self::plain(CriuRequest {
            kind: RequestType::FeatureCheck as i32,
            keep_open: Some(true),
            features: Some(CriuFeatures {
                mem_track: Some(true),
                lazy_pages: Some(true),
                pidfd_store: Some(true),
            }),
            ..CriuRequest::default()
        })
    }

    /// `criu check`: the log goes to the worker's stderr. CRIU 4.2 or newer.
    #[must_use]
    pub fn check() -> Self {
        Self::plain(CriuRequest {
            kind: RequestType::Check as i32,
            opts: Some(CriuOpts {
                images_dir_fd: -1,
                log_to_stderr: Some(true),
                log_level: Some(LogLevel::Warning as i32),
                ..CriuOpts::default()
            }),
            ..CriuRequest::default()
        })
    }

    fn plain(message: CriuRequest) -> Self {
        Self {
            message,
            held: Vec::new(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            file: "criu.log".to_owned(),
            level: LogLevel::Warning,
        }
    }
}

impl DumpOptions {
    #[must_use]
    pub fn new(pid: i32, directories: Directories) -> Self {
        Self {
            pid,
            directories,
            log: Log {
                file: "dump.log".to_owned(),
                ..Log::default()
            },
            freeze_cgroup: None,
            freeze_timeout: None,
            after: AfterDump::Kill,
            tcp_established: false,
            file_locks: false,
            ext_unix_sk: false,
            shell_job: false,
            link_remap: false,
            ghost_limit: None,
            network_lock: NetworkLock::Skip,
            manage_cgroups: ManageCgroups::Ignore,
            external: Vec::new(),
            root: None,
            notify: true,
            page_server: None,
        }
    }

    fn into_request(self) -> Request {
        let ps = self.page_server.map(|fd| CriuPageServerInfo {
            fd: Some(fd),
            ..CriuPageServerInfo::default()
        });
        let opts = CriuOpts {
            pid: Some(self.pid),
            leave_running: Some(self.after == AfterDump::LeaveRunning),
            leave_stopped: Some(self.after == AfterDump::LeaveStopped),
            freeze_cgroup: self.freeze_cgroup,
            timeout: self.freeze_timeout,
            tcp_established: Some(self.tcp_established),
            file_locks: Some(self.file_locks),
            ext_unix_sk: Some(self.ext_unix_sk),
            shell_job: Some(self.shell_job),
            link_remap: Some(self.link_remap),
            ghost_limit: self.ghost_limit,
            network_lock: Some(self.network_lock as i32),
            manage_cgroups_mode: Some(self.manage_cgroups as i32),
            external: self.external,
            root: self.root,
            notify_scripts: Some(self.notify),
            ps,
            ..CriuOpts::default()
        };
        request(RequestType::Dump, opts, self.directories, self.log)
    }
}

impl RestoreOptions {
    #[must_use]
    pub fn new(directories: Directories) -> Self {
        Self {
            directories,
            log: Log {
                file: "restore.log".to_owned(),
                ..Log::default()
            },
            lazy_pages: false,
            tcp_established: false,
            file_locks: false,
            ext_unix_sk: false,
            shell_job: false,
            link_remap: false,
            manage_cgroups: ManageCgroups::Ignore,
            network_lock: NetworkLock::Skip,
            external: Vec::new(),
            inherit_fd: Vec::new(),
            join_namespaces: Vec::new(),
            root: None,
            sibling: false,
            notify: true,
        }
    }

    fn into_request(self) -> Request {
        let inherited = self.inherit_fd.into_iter();
        let joined = self.join_namespaces.into_iter();
        let opts = CriuOpts {
            lazy_pages: Some(self.lazy_pages),
            tcp_established: Some(self.tcp_established),
            file_locks: Some(self.file_locks),
            ext_unix_sk: Some(self.ext_unix_sk),
            shell_job: Some(self.shell_job),
            link_remap: Some(self.link_remap),
            manage_cgroups_mode: Some(self.manage_cgroups as i32),
            network_lock: Some(self.network_lock as i32),
            external: self.external,
            inherit_fd: inherited
                .map(|i| CriuInheritFd {
                    key: i.key,
                    fd: i.fd,
                })
                .collect(),
            join_ns: joined
                .map(|j| CriuJoinNamespace {
                    ns: j.kind,
                    ns_file: j.file,
                    extra_opt: None,
                })
                .collect(),
            root: self.root,
            rst_sibling: Some(self.sibling),
            notify_scripts: Some(self.notify),
            ..CriuOpts::default()
        };
        request(RequestType::Restore, opts, self.directories, self.log)
    }
}

fn request(kind: RequestType, opts: CriuOpts, directories: Directories, log: Log) -> Request {
    let opts = CriuOpts {
        images_dir_fd: directories.images.as_raw_fd(),
        work_dir_fd: directories.work.as_ref().map(AsRawFd::as_raw_fd),
        log_file: Some(log.file),
        log_level: Some(log.level as i32),
        ..opts
    };
    let held = std::iter::once(directories.images)
        .chain(directories.work)
        .collect();
    let message = CriuRequest {
        kind: kind as i32,
        opts: Some(opts),
        ..CriuRequest::default()
    };
    Request { message, held }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_dump_request_names_our_descriptors_and_holds_them() {
        let images = OwnedFd::from(File::open("/").expect("root directory"));
        let number = images.as_raw_fd();
        let options = DumpOptions::new(12, Directories { images, work: None });
        let request = Request::dump(options);
        let opts = request.message.opts.expect("dump has options");
        assert_eq!(
            (opts.images_dir_fd, opts.pid, opts.work_dir_fd),
            (number, Some(12), None)
        );
        assert_eq!(opts.network_lock, Some(NetworkLock::Skip as i32));
        assert_eq!(opts.manage_cgroups_mode, Some(0));
        assert_eq!(request.held.len(), 1);
    }
}
