//! What a worker says.

use nix::errno::Errno;

use super::message::CriuResponse;
use crate::report;

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// CRIU has reached this point and waits for [`super::Conversation::answer`]. `pid` is the root
    /// task's, at `setup-namespaces` and `post-restore` only.
    Notify {
        script: NotifyScript,
        pid: Option<i32>,
    },
    /// The request is done; the worker exits unless the request was `version` or `feature_check`.
    Response(Response),
}

/// The points at which CRIU notifies (its `action-scripts.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotifyScript {
    PreStream,
    /// Nothing has been touched yet, the tree runs.
    PreDump,
    /// Everything is dumped; tasks are stopped by ptrace alone.
    PostDump,
    PreRestore,
    /// Tasks exist, memory is mapped, none has run. The last point where failing undoes it.
    PostRestore,
    NetworkLock,
    NetworkUnlock,
    SetupNamespaces,
    PostSetupNamespaces,
    PreResume,
    PostResume,
    OrphanPtsMaster,
    StatusReady,
    QueryExtFiles,
    Other(String),
}

/// The answer to a request. A successful one may carry a message too, so `success` alone decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub success: bool,
    pub errno: Option<i32>,
    /// First error of CRIU's log, unless it is a harmless one that hides the cause: the log has it
    /// ([`crate::report`]).
    pub message: Option<String>,
    /// Root task of a restored tree, in the worker's pid namespace.
    pub pid: Option<i32>,
    pub version: Option<Version>,
    pub features: Option<Features>,
}

/// CRIU's version. 4.2 has no sublevel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: i32,
    pub minor: i32,
    pub sublevel: i32,
}

/// What CRIU found the kernel to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Soft-dirty page tracking.
    pub mem_track: bool,
    /// Userfaultfd with the events a lazy restore needs.
    pub lazy_pages: bool,
    pub pidfd_store: bool,
}

/// CRIU said no.
#[derive(Debug, thiserror::Error)]
#[error("criu failed{}{}", errno_text(*.errno), message_text(.message))]
pub struct RequestFailed {
    pub errno: Option<i32>,
    /// As in [`Response::message`].
    pub message: Option<String>,
}

impl From<String> for NotifyScript {
    fn from(name: String) -> Self {
        let known = SCRIPTS.iter().find(|(_, known)| *known == name);
        known.map_or_else(|| Self::Other(name), |(script, _)| script.clone())
    }
}

impl std::fmt::Display for NotifyScript {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = SCRIPTS.iter().find(|(script, _)| script == self);
        match (known, self) {
            (Some((_, name)), _) => f.write_str(name),
            (None, Self::Other(name)) => f.write_str(name),
            (None, _) => unreachable!("every script that CRIU has is in the table"),
        }
    }
}

impl NotifyScript {
    /// Whether CRIU gives up, with nothing left, when this is answered with no.
    #[must_use]
    pub fn asks(&self) -> bool {
        match self {
            Self::PreStream
            | Self::PreDump
            | Self::PostDump
            | Self::PreRestore
            | Self::PostRestore
            | Self::NetworkLock
            | Self::SetupNamespaces
            | Self::PostSetupNamespaces
            | Self::OrphanPtsMaster
            | Self::QueryExtFiles => true,
            Self::NetworkUnlock
            | Self::PreResume
            | Self::PostResume
            | Self::StatusReady
            | Self::Other(_) => false,
        }
    }
}

impl From<CriuResponse> for Response {
    fn from(response: CriuResponse) -> Self {
        let version = response.version.map(|version| Version {
            major: version.major_number,
            minor: version.minor_number,
            sublevel: version.sublevel.unwrap_or(0),
        });
        let features = response.features.map(|features| Features {
            mem_track: features.mem_track.unwrap_or(false),
            lazy_pages: features.lazy_pages.unwrap_or(false),
            pidfd_store: features.pidfd_store.unwrap_or(false),
        });
        Self {
            success: response.success,
            errno: response.cr_errno.filter(|errno| *errno != 0),
            message: response.cr_errmsg.and_then(|text| report::error_of(&text)),
            pid: response.restore.map(|restore| restore.pid),
            version,
            features,
        }
    }
}

impl Response {
    /// The response itself if CRIU succeeded.
    ///
    /// # Errors
    /// [`RequestFailed`] with what CRIU gave as the reason.
    pub fn into_result(self) -> Result<Self, RequestFailed> {
        if self.success {
            Ok(self)
        } else {
            Err(RequestFailed {
                errno: self.errno,
                message: self.message,
            })
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel == 0 {
            Ok(())
        } else {
            write!(f, ".{}", self.sublevel)
        }
    }
}

/// What CRIU calls its notifications.
const SCRIPTS: [(NotifyScript, &str); 14] = [
    (NotifyScript::PreStream, "pre-stream"),
    (NotifyScript::PreDump, "pre-dump"),
    (NotifyScript::PostDump, "post-dump"),
    (NotifyScript::PreRestore, "pre-restore"),
    (NotifyScript::PostRestore, "post-restore"),
    (NotifyScript::NetworkLock, "network-lock"),
    (NotifyScript::NetworkUnlock, "network-unlock"),
    (NotifyScript::SetupNamespaces, "setup-namespaces"),
    (NotifyScript::PostSetupNamespaces, "post-setup-namespaces"),
    (NotifyScript::PreResume, "pre-resume"),
    (NotifyScript::PostResume, "post-resume"),
    (NotifyScript::OrphanPtsMaster, "orphan-pts-master"),
    (NotifyScript::StatusReady, "status-ready"),
    (NotifyScript::QueryExtFiles, "query-ext-files"),
];

fn errno_text(errno: Option<i32>) -> String {
    errno
        .map(|number| format!(" ({})", Errno::from_raw(number).desc()))
        .unwrap_or_default()
}

fn message_text(message: &Option<String>) -> String {
    message
        .as_ref()
        .map(|text| format!(": {text}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_errno_and_message_and_no_more() {
        let failed = RequestFailed {
            errno: Some(3),
            message: Some("no task".to_owned()),
        };
        assert_eq!(failed.to_string(), "criu failed (No such process): no task");
        let failed = RequestFailed {
            errno: None,
            message: None,
        };
        assert_eq!(failed.to_string(), "criu failed");
    }

    #[test]
    fn versions_are_ordered_and_printed_as_criu_prints_them() {
        let version = |major, minor, sublevel| Version {
            major,
            minor,
            sublevel,
        };
        assert!(version(4, 1, 1) < version(4, 2, 0));
        assert_eq!(version(4, 1, 1).to_string(), "4.1.1");
        assert_eq!(version(4, 2, 0).to_string(), "4.2");
    }

    #[test]
    fn an_unknown_notification_keeps_its_name() {
        assert_eq!(
            NotifyScript::from("post-dump".to_owned()),
            NotifyScript::PostDump
        );
        let unknown = NotifyScript::from("new-one".to_owned());
        assert_eq!(unknown, NotifyScript::Other("new-one".to_owned()));
    }
}
