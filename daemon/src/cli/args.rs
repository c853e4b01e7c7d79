//! What is typed after `pageferry`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pageferry_proto::id::{MigrationId, NetworkName, NodeName, PodUid, WorkloadName};
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::policy::{Mode, OnTimeout};

use super::setup::kubernetes;
use crate::config::units::Span;

/// Moves a running workload to another node, so fast that nobody using it notices.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// Socket of this node's pageferryd
    #[arg(long, global = true, value_name = "PATH", env = "PAGEFERRY_SOCKET")]
    #[arg(default_value = "/run/pageferry/api.sock")]
    pub socket: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a workload to another node, and wait until it runs there
    Migrate(MigrateArgs),
    /// Every migration this node takes or took part in, newest first; then what was refused before
    /// it began
    List(ListArgs),
    /// One migration, as it stands
    Show(OneArgs),
    /// One migration, until its end
    Watch(OneArgs),
    /// Give a migration up; the workload stays where it is
    Abort {
        /// Its id, as `list` prints it
        id: MigrationId,
    },
    /// Let a migration go on to its freeze that was begun with `--hold`
    Proceed {
        /// Its id, as `list` prints it
        id: MigrationId,
    },
    /// Say, at its target, which pod it is that a migration of a pod comes as
    Expect {
        /// Its id, as `list` prints it
        id: MigrationId,
        /// The UID of the pod
        #[arg(long, value_name = "UID")]
        pod: PodUid,
    },
    /// Decide a committed migration whose other side is dead for good
    Resolve {
        /// Its id, as `list` prints it
        id: MigrationId,
        /// The side that is dead and stays dead. If it is not, two copies run
        #[arg(long, value_name = "SIDE")]
        fenced: FencedSide,
    },
    /// Forget how a migration ended. This node keeps that for as long as the source may ask
    ///
    /// A target keeps how a migration ended until its source has said that it knows. If the source
    /// never will, because its node is gone for good, this is the way to forget it all the same. A
    /// source that asks afterwards hears that nobody knows, and offers its operator to declare this
    /// node dead; then the workload would run there, and may run here too. So look first what
    /// `pageferry show ID` says at the source: `done` and `aborted` mean that it does not ask.
    Forget {
        /// Its id, as `list --all` prints it
        id: MigrationId,
        /// The source knows how it ended, or is gone for good
        #[arg(long)]
        sure: bool,
    },
    /// Certificates for the nodes of a cluster
    #[command(subcommand)]
    Ca(CaCommand),
    /// Prepare this node for containers of an engine that come
    Setup(SetupArgs),
}

/// The flags of `setup`; it needs no daemon.
#[derive(Debug, Args)]
pub struct SetupArgs {
    /// The engine
    pub engine: Engine,
    /// Only look whether it is done
    #[arg(long, conflicts_with = "remove")]
    pub check: bool,
    /// Undo it, unless a container needs it
    #[arg(long)]
    pub remove: bool,
    /// For kubernetes: containerd's main configuration
    #[arg(long, value_name = "FILE", default_value = kubernetes::CONFIG)]
    pub config: PathBuf,
    /// For kubernetes: how containerd is started anew if it must be [default: systemctl restart
    /// containerd, where systemd runs; else it is said that it must be]
    #[arg(long, value_name = "COMMAND")]
    pub restart: Option<String>,
}

/// An engine that something must be prepared for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Engine {
    /// containerd
    Containerd,
    /// containerd, with the handler and the addresses that pods of Kubernetes need
    Kubernetes,
}

/// The flags of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// What moves: process/PID is the tree below that process; runc/ID, crun/ID, podman/NAME and
    /// containerd/NAMESPACE/ID are containers; podman-pod/NAME is a pod of podman with all its
    /// containers; pod/UID is a pod of Kubernetes, which is always held
    pub workload: WorkloadName,
    /// Name of the node it moves to
    #[arg(long, value_name = "NODE")]
    pub to: NodeName,
    /// Freeze when the workload would be gone no longer than this [default: the daemon's, 300ms]
    #[arg(long, value_name = "TIME")]
    pub downtime_max: Option<Span>,
    /// Abort if the workload is not frozen after this long [default: the daemon's, 1h]
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,
    /// Give the workload back when it has stood still for this long before the commit [default: the
    /// daemon's, 5s or twice the freeze that is predicted]
    #[arg(long, value_name = "TIME")]
    pub frozen_max: Option<Span>,
    /// Rounds of copying before the freeze comes whatever it costs [default: the daemon's, 30]
    #[arg(long, value_name = "COUNT")]
    pub rounds_max: Option<u32>,
    /// A file or folder that is the same storage at both nodes; may be given several times
    #[arg(long, value_name = "PATH")]
    pub shared: Vec<String>,
    /// A folder that travels along and is at the target then, under the same path; may be given
    /// several times
    #[arg(long, value_name = "PATH")]
    pub copy: Vec<String>,
    /// Copy on, round after round, and do not freeze before `pageferry proceed ID`
    #[arg(long)]
    pub hold: bool,
    /// How its memory moves: precopy, all before it runs at the target; postcopy, all after that;
    /// hybrid, after it what rounds do not bring; auto, as precopy if rounds will do, else as
    /// hybrid. Until all has followed, the loss of either node loses the workload [default:
    /// precopy]
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// When it is not frozen in time: cancel; force, freeze whatever that costs; or postcopy, and
    /// let what is left follow [default: cancel]
    #[arg(long, value_name = "WHAT")]
    pub on_timeout: Option<OnTimeout>,
    /// Compare every page at both nodes by digest while the workload is frozen
    #[arg(long)]
    pub verify: bool,
    /// Move even if much memory (shared, locked, executable) must be copied inside the freeze
    #[arg(long)]
    pub force_eager: bool,
    /// Move even if the target's processor lacks features that this one has
    #[arg(long)]
    pub force_cpu: bool,
    /// Move even if something of System V objects is lost: SEM_UNDO, a queue's own limit and such
    #[arg(long)]
    pub force_ipc: bool,
    /// Join this network namespace of the target, by its name in /run/netns, instead of having one
    /// made: it must have the same links, addresses and routes, attached to nothing
    #[arg(long, value_name = "NAME")]
    pub join_network: Option<NetworkName>,
    /// What to call the migration, in 32 hexadecimal digits: the same command with the same id
    /// begins nothing, and tells of the same migration [default: a random id]
    #[arg(long)]
    pub id: Option<MigrationId>,
    /// Print the id and return; the daemon goes on
    #[arg(long)]
    pub detach: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    pub json: bool,
}

/// What to list, and how to print it.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Also old ones of which a source may still ask how they ended, at most 1000 of them
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One migration, and how to print it.
#[derive(Debug, Args)]
pub struct OneArgs {
    /// Its id, as `list` prints it
    pub id: MigrationId,
    /// Print JSON, one object in a line
    #[arg(long)]
    pub json: bool,
}

/// A side, as typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FencedSide {
    /// The node it was leaving
    Source,
    /// The node it was going to
    Target,
}

impl From<FencedSide> for Side {
    fn from(side: FencedSide) -> Self {
        match side {
            FencedSide::Source => Self::Source,
            FencedSide::Target => Self::Target,
        }
    }
}

/// The commands of `ca`; they need no daemon.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make an authority: DIR/ca.pem and DIR/ca.key
    Init(CaArgs),
    /// Make a node's certificate: DIR/NODE/ca.pem, node.pem and node.key, for its /etc/pageferry
    Issue {
        /// Name of the node: 1 to 63 characters of a-z, 0-9 and -
        node: NodeName,
        /// Where the authority is
        #[command(flatten)]
        ca: CaArgs,
    },
}

/// Where an authority is.
#[derive(Debug, Args)]
pub struct CaArgs {
    /// Folder of the authority; its ca.key belongs on no node
    #[arg(long, value_name = "DIR", default_value = "pageferry-ca")]
    pub dir: PathBuf,
    /// Replace files that exist
    #[arg(long)]
    pub force: bool,
}

const AFTER_HELP: &str = "\
Times are written like 300ms, 10s or 1h30m.

Exit codes: 0 moved, or done; 1 failed or aborted: the workload runs on where it was, unless the
message says otherwise; 2 wrong usage; 3 the daemon cannot be reached.

Interrupting `migrate` (Ctrl-C) asks the daemon to give up, and waits for what comes of it.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    fn migrate(words: &[&str]) -> Result<MigrateArgs, clap::Error> {
        let begin = ["pageferry", "migrate"];
        let Cli { command, .. } = Cli::try_parse_from(begin.iter().chain(words))?;
        match command {
            Command::Migrate(arguments) => Ok(arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_workload_node_id_or_network_that_is_none_is_wrong_usage() {
        let whole = ["process/1", "--to", "b", "--join-network", "web", "--id"];
        let id = "0123456789abcdef0123456789abcdef";
        let arguments = migrate(&[&whole[..], &[id]].concat()).unwrap();
        assert_eq!(arguments.id.unwrap().to_string(), id);
        assert_eq!(arguments.join_network.unwrap().as_str(), "web");
        // Whether it can move the daemon says.
        assert!(migrate(&["runc/web", "--to", "b"]).is_ok());
        for wrong in [
            &["process/x", "--to", "b"][..],
            &["web", "--to", "b"],
            &["process/1", "--to", "B_2"],
            &["process/1", "--to", "b", "--id", "7"],
            &["process/1", "--to", "b", "--join-network", "/run/netns/web"],
        ] {
            let error = migrate(wrong).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }
}
