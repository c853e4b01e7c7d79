//! What the daemon and a pager say to each other.
//!
//! One message per packet of a `SOCK_SEQPACKET` socket, in JSON, with descriptors beside it. The
//! daemon asks ([`Ask`]); the pager answers each question once, when it has the answer, which may
//! be after answers to later questions ([`Told::Reply`]). Three things it tells unasked, because
//! they happen while nobody asks ([`Told::Filled`], [`Told::Failed`], [`Told::Wanted`]).
//!
//! Every question may be asked again, by the same daemon or by one that was restarted, and gets the
//! answer that is true by then: a second [`Request::Go`] is answered [`Reply::Resumed`], too.
//!
//! | request | descriptors | answers |
//! |---|---|---|
//! | `space` | the store | `ok` |
//! | `plan` | per space, in order, a memfd of pending runs ([`crate::plan`]) | `ok` |
//! | `lo-gate` | a program on the tree's loopback, and its switch | `ok`, `failed` |
//! | `absent` | as for `plan`, of planned pages whose contents are to come | `ok` |
//! | `arrived` | – | `ok` |
//! | `missing` | – | `missing`, with the store and a memfd of runs for each space |
//! | `prepare` | as for `restore` | `prepared`, `failed` |
//! | `restore` | the namespaces, then the inherited ones | `restored`, `failed` |
//! | `lock` | – | `ok`, `failed` |
//! | `go` | – | `resumed`, `failed` |
//! | `discard` | – | `ok` when nothing of the tree is left, `failed` after `go` |
//! | `status` | – | `status` |
//!
//! Anything that is out of order is answered `failed` with the code `unexpected`, and changes
//! nothing.

use std::path::PathBuf;

use pageferry_cgroup::freezer::Freezer;
use pageferry_cgroup::identity::FolderId;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};

/// Longest message, in bytes: some hundred paths.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10; // 64 KiB

/// Most spaces of one workload.
pub const SPACES_MAX: usize = 4096;

/// A question.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// The answer carries the same number.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What the daemon asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Here is the store of a space.
    Space {
        /// Which, by the pid of its leader in the workload's pid namespace.
        space: u32,
    },
    /// Here are the pages to be filled in some spaces.
    Plan {
        /// Which spaces, in the order of the descriptors.
        spaces: Vec<u32>,
    },
    /// Here are pages of the plan whose contents are not in the stores yet.
    Absent {
        /// Which spaces, in the order of the descriptors.
        spaces: Vec<u32>,
    },
    /// Contents of such pages are in the stores now. May be said again of the same.
    Arrived {
        /// Of which space, the first page, and how many.
        runs: Vec<(u32, u64, u64)>,
    },
    /// What has not arrived of the spaces after this one, if any; what threads wait for is told
    /// once more.
    Missing {
        /// The last one that was told.
        after: Option<u32>,
    },
    /// Here is the gate of the loopback that the tree will use: it is to be shut from the restore
    /// on, and open before the tree runs.
    LoGate,
    /// Start CRIU already, for a restore that will ask for the same: it waits.
    Prepare(Box<RestoreRequest>),
    /// Restore the tree and hold it.
    Restore(Box<RestoreRequest>),
    /// Have the held tree take its file locks. Comes before `Go` if the restore has any; may be
    /// asked again if another has one.
    Lock,
    /// Let it run, and fill its memory.
    Go,
    /// Undo all that was done. Only before `Go`.
    Discard,
    /// How things stand.
    Status,
}

/// How a tree is restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The `criu` program.
    pub criu: PathBuf,
    /// CRIU's view library, for a root that has to adopt orphans from the beginning.
    pub reaper: Option<PathBuf>,
    /// Directory of the images.
    pub images_dir: PathBuf,
    /// Directory for CRIU's log and the lazy-pages socket. Short: a socket's path has 107 bytes.
    pub work_dir: PathBuf,
    /// Of CRIU's log: 1 errors, 2 warnings, 3 information, 4 all.
    pub log_level: u8,
    /// `cgroup.procs` files (`tasks` in v1) that CRIU joins, and with it the tree.
    pub cgroup_procs: Vec<PathBuf>,
    /// Directory of the freezer cgroup that is among them: it must hold the whole tree and
    /// nothing else, for what is in it is killed or frozen.
    pub freezer: PathBuf,
    /// What that is known by: another one of its path is not there.
    pub freezer_id: Option<FolderId>,
    /// How many spaces were planned: all that CRIU will restore.
    pub spaces: u32,
    /// Namespaces CRIU is started in, in the order of the descriptors. Without `net` it is the
    /// one that the pager was started in.
    pub namespaces: Vec<Namespace>,
    /// Keys (`--inherit-fd`) of the descriptors after those of the namespaces.
    pub inherit: Vec<String>,
    /// `--external`.
    pub external: Vec<String>,
    /// `--join-ns`: kind and file.
    pub join: Vec<(String, String)>,
    /// `--root`.
    pub root: Option<String>,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--ext-unix-sk`.
    pub ext_unix_sk: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--link-remap`.
    pub link_remap: bool,
    /// There is a list of file locks among the images, which are taken by [`Request::Lock`].
    pub locks: bool,
    /// The container runtime that restores the tree and asks CRIU for that itself: what is asked
    /// for here counts where it says something else.
    pub runtime: Option<RuntimeRequest>,
}

impl RestoreRequest {
    /// The cgroup that holds the tree.
    pub fn cgroup(&self) -> Freezer {
        Freezer::again(self.freezer.clone(), self.freezer_id)
    }

    /// Whether CRIU would be started in the same way for both.
    pub fn starts_like(&self, other: &Self) -> bool {
        self.criu == other.criu
            && self.reaper == other.reaper
            && self.work_dir == other.work_dir
            && self.cgroup_procs == other.cgroup_procs
            && self.namespaces == other.namespaces
            && self.inherit == other.inherit
            && self.runtime == other.runtime
    }
}

/// How a container runtime is had to restore.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeRequest {
    /// What the runtime is to find as `criu`: the program of `criu-gate`.
    pub stand_in: PathBuf,
    /// The runtime.
    pub program: PathBuf,
    /// Whether it is an engine, which starts the runtime with other streams than its own.
    pub is_engine: bool,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where they have it write what goes wrong. Its standard streams are those of the container.
    pub log: PathBuf,
    /// Where the gate is made. Short, as `work_dir`.
    pub gate: PathBuf,
    /// Files by which what is to become CRIU joins the cgroups of the container, where there are
    /// such: its runtime does not put it there.
    pub cgroup_procs: Vec<PathBuf>,
    /// The cgroup in which it is to restore, if it says where.
    pub cgroup: Option<String>,
    /// The folder of the container among those of the runtime.
    pub folder: PathBuf,
    /// The folder in which the runtime binds the root file system while it restores,
    pub bound_in: PathBuf,
    /// and to what name.
    pub bound: String,
    /// The file that the runtime has of a container.
    pub state: PathBuf,
    /// Files and folders that are left, without that, of a restore that failed.
    pub leaves: Vec<PathBuf>,
    /// Arguments with which it is started again when its restore has failed, if any;
    pub undo: Vec<String>,
    /// and when the container runs.
    pub then: Vec<String>,
}

/// A kind of namespace that CRIU can be started in. A pid namespace cannot be entered by exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// SysV IPC and message queues.
    Ipc,
    /// Mounts.
    Mount,
    /// Network.
    Net,
    /// Host name.
    Uts,
}

/// What a pager says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// The answer to a question.
    Reply {
        /// The number of the question.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// All memory is filled. The pager has nothing left to do and ends.
    Filled(FillReport),
    /// Threads wait for these pages, which have not arrived: space and page. Each is told once, and
    /// again after a `missing`.
    Wanted(Vec<(u32, u64)>),
    /// It came to an end that nobody asked about: CRIU died while the tree was held (nothing is
    /// left of the tree then), or failed after it was let go.
    Failed(Fault),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Ok,
    /// A CRIU waits, or what is to become it.
    Prepared {
        /// In the pager's pid namespace.
        criu_pid: i32,
    },
    /// The tree is there and held.
    Restored(Restored),
    /// It runs, or could.
    Resumed,
    /// It was not done.
    Failed(Fault),
    /// These spaces have not all their pages; none: there are no more such.
    Missing(Vec<u32>),
    /// How things stand.
    Status(Status),
}

/// A tree that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Its root, in the pager's pid namespace.
    pub root_pid: i32,
    /// From the request to this, in milliseconds.
    pub restore_ms: u64,
    /// What its cgroup is known by: a runtime that was started again has made another one.
    pub freezer_id: Option<FolderId>,
}

/// A failure, as it is written in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The name of an [`ErrorCode`].
    pub code: String,
    /// What happened, on which object.
    pub text: String,
    /// Whether the tree had been let go: if not, nothing of it is left.
    pub after_go: bool,
}

/// How a fill went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillReport {
    /// From `Go` to the last page, in milliseconds.
    pub fill_ms: u64,
    /// Pages that were missing and are not any more, in the restored processes and in children
    /// they forked meanwhile.
    pub pages: u64,
    /// Faults served, before `Go` and after.
    pub faults: u64,
    /// Planned pages that had no mapping when their turn came, although nothing had told so.
    pub unmapped: u64,
    /// How long threads waited for pages that had not come yet.
    #[serde(default)]
    pub waited: Waited,
}

/// How long threads waited for pages that had not come yet, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// How many faults that were.
    pub faults: u64,
    /// The median, within an eighth.
    pub p50_us: u64,
    /// What 99 of 100 took at most, within an eighth.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// How things stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The state.
    pub state: State,
    /// The root of the tree, from `Held` on.
    pub root_pid: Option<i32>,
    /// Pages filled, given up or unmapped.
    pub filled_pages: u64,
    /// Pages still missing.
    pub pending_pages: u64,
    /// Those of them whose contents have not come yet.
    #[serde(default)]
    pub absent_pages: u64,
    /// How long threads waited for such.
    #[serde(default)]
    pub waited: Waited,
    /// Faults served.
    pub faults: u64,
    /// Errors met in the fill; the pages are tried again.
    pub errors: u64,
    /// Whether the watcher lives: without it, the death of the pager would not freeze the tree.
    pub watched: bool,
    /// Why it failed, in the state `Failed`.
    pub failure: Option<Fault>,
}

/// The state of a pager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing restored.
    Idle,
    /// CRIU is at work.
    Restoring,
    /// The tree is there and waits for `Go`.
    Held,
    /// Let go, but CRIU has not finished.
    Resuming,
    /// It runs and is being filled.
    Running,
    /// All is filled.
    Filled,
    /// What was restored is being undone.
    Discarding,
    /// It failed.
    Failed,
}

impl Fault {
    /// A failure before the tree was let go.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        // The constructor bounds the text.
        let failure = Failure::new(code, text);
        Self {
            code: code.name().to_owned(),
            text: failure.text().to_owned(),
            after_go: false,
        }
    }

    /// The failure, with a code that this build may not know.
    pub fn failure(&self) -> Failure {
        Failure::new(
            self.code.parse().unwrap_or(ErrorCode::Unknown),
            self.text.clone(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_they_were_written() {
        let restore = RestoreRequest {
            criu: "criu".into(),
            namespaces: vec![Namespace::Net, Namespace::Uts],
            join: vec![("time".to_owned(), "/proc/1/ns/time".to_owned())],
            ..RestoreRequest::default()
        };
        let ask = Ask {
            id: 7,
            request: Request::Restore(Box::new(restore)),
        };
        let text = serde_json::to_string(&ask).unwrap();
        let read: Ask = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let told = Told::Failed(Fault::new(ErrorCode::CriuFailed, "no"));
        let text = serde_json::to_string(&told).unwrap();
        assert_eq!(
            text,
            r#"{"failed":{"code":"criu-failed","text":"no","after_go":false}}"#
        );
        assert_eq!(serde_json::from_str::<Told>(&text).unwrap(), told);
    }

    #[test]
    fn a_code_of_another_build_is_unknown() {
        let fault = Fault {
            code: "novel".to_owned(),
            text: String::new(),
            after_go: true,
        };
        assert_eq!(fault.failure().code(), ErrorCode::Unknown);
    }
}
