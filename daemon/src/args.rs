//! The flags of `pageferryd`: what was typed, not yet what it means.
//!
//! Every key of the configuration file has a flag, and the flag wins. Defaults are not here but
//! in [`crate::config`], where both are resolved once.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use pageferry_proto::id::NodeName;

use crate::config::parking::Parking;
use crate::config::units::{Bytes, Span};

/// Moves live process trees to other nodes, and takes theirs.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "pageferryd", version, next_line_help = true, after_help = AFTER_HELP)]
pub struct DaemonArgs {
    /// Configuration file; may be missing if everything needed is given by flags
    /// [default: /etc/pageferry/pageferryd.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read the configuration and the certificates, say what is wrong with them, and exit
    #[arg(long)]
    pub check: bool,
    /// What to log, as tracing directives: a level, or `pageferry::net=debug,info`
    #[arg(
        long,
        value_name = "FILTER",
        env = "PAGEFERRY_LOG",
        default_value = "info"
    )]
    pub log: String,

    /// Name of this node, as in its certificate: 1 to 63 characters of a-z, 0-9 and -
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// UDP address peers dial, such as 10.90.0.11:7440
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Folder for what must survive a reboot, the journal [default: /var/lib/pageferry]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Folder for sockets and images, best on a tmpfs [default: /run/pageferry]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Certificate of the cluster's authority, PEM [default: /etc/pageferry/ca.pem]
    #[arg(long, value_name = "FILE", help_heading = "Trust")]
    pub tls_ca: Option<PathBuf>,
    /// This node's certificate, PEM [default: /etc/pageferry/node.pem]
    #[arg(long, value_name = "FILE", help_heading = "Trust")]
    pub tls_certificate: Option<PathBuf>,
    /// The key to it, PEM [default: /etc/pageferry/node.key]
    #[arg(long, value_name = "FILE", help_heading = "Trust")]
    pub tls_key: Option<PathBuf>,
    /// A node that may connect, and where it is dialled; may be given several times
    #[arg(long = "peer", value_name = "NAME=ADDRESS", value_parser = parse_peer)]
    #[arg(help_heading = "Trust")]
    pub peers: Vec<(NodeName, SocketAddr)>,

    /// Bridge whose ports the links of workloads become [default: none, only bare processes]
    #[arg(long, value_name = "NAME", help_heading = "Machinery")]
    pub bridge: Option<String>,
    /// How packets are kept that come for a workload that stands still: auto; capture, without
    /// programs of the kernel; or off, which drops them [default: auto]
    #[arg(long, value_name = "MEANS", help_heading = "Machinery")]
    pub parking: Option<Parking>,
    /// Whether workloads may leave this node, or come to it, before all their memory is there: then
    /// the loss of either node loses them until it is [default: false]
    #[arg(long, value_name = "BOOL", help_heading = "Machinery")]
    pub postcopy: Option<bool>,
    /// The criu to run [default: criu, looked for in PATH]
    #[arg(long, value_name = "FILE", help_heading = "Machinery")]
    pub criu: Option<PathBuf>,
    /// Library preloaded into criu [default: /usr/lib/pageferry/libcriu_view.so]
    #[arg(long, value_name = "FILE", help_heading = "Machinery")]
    pub criu_view_library: Option<PathBuf>,
    /// What container runtimes are to find as criu [default: pageferry-criu beside pageferryd]
    #[arg(long, value_name = "FILE", help_heading = "Machinery")]
    pub criu_stand_in: Option<PathBuf>,
    /// Whether a process that outlives criu traces the workload for it; without one a criu that is
    /// killed in a dump may take the workload with it [default: true]
    #[arg(long, value_name = "BOOL", help_heading = "Machinery")]
    pub criu_tracer: Option<bool>,
    /// The pager to run [default: pageferry-pager beside pageferryd]
    #[arg(long, value_name = "FILE", help_heading = "Machinery")]
    pub pager: Option<PathBuf>,

    /// Workloads arriving at the same time [default: 4]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub incoming_max: Option<u32>,
    /// Workloads leaving at the same time [default: 4]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub outgoing_max: Option<u32>,
    /// QUIC connections per migration, 1 to 8 [default: 2]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub lanes: Option<u32>,
    /// Memory of one workload that may be copied inside the freeze (shared, locked, executable)
    /// before it is refused unless forced [default: 256MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub eager_memory_max: Option<Bytes>,

    /// Downtime a migration aims for, unless it names its own [default: 300ms]
    #[arg(long, value_name = "TIME", help_heading = "Defaults of migrations")]
    pub downtime_max: Option<Span>,
    /// Pre-copy rounds before the freeze comes whatever it costs [default: 30]
    #[arg(long, value_name = "COUNT", help_heading = "Defaults of migrations")]
    pub rounds_max: Option<u32>,
    /// Time after which a migration that is not yet committed is aborted [default: 1h]
    #[arg(long, value_name = "TIME", help_heading = "Defaults of migrations")]
    pub timeout: Option<Span>,
    /// Time a workload may stand still before the commit
    /// [default: 5s, or twice the freeze that is predicted if that is more]
    #[arg(long, value_name = "TIME", help_heading = "Defaults of migrations")]
    pub frozen_max: Option<Span>,
}

fn parse_peer(text: &str) -> Result<(NodeName, SocketAddr), String> {
    let (name, address) = text
        .split_once('=')
        .ok_or("a peer is written NAME=ADDRESS:PORT")?;
    let name = name.parse().map_err(|error| format!("{error}"))?;
    let address = address
        .parse()
        .map_err(|_| format!("{address:?} is not an address and a port"))?;
    Ok((name, address))
}

const AFTER_HELP: &str = "\
Times are written like 300ms, 10s or 1h30m; sizes like 4096B, 64MiB or 1GiB.

Exit codes: 0 after an orderly stop, 1 on a failure, 2 on a wrong flag, 64 on a wrong
configuration.";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<DaemonArgs, String> {
        DaemonArgs::try_parse_from([&["pageferryd"], arguments].concat())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_grammar_holds_together() {
        <DaemonArgs as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn a_peer_is_a_name_and_an_address() {
        let parsed = parse(&["--peer", "b=10.0.0.2:7440", "--peer", "c=[::1]:1"]).unwrap();
        assert_eq!(parsed.peers.len(), 2);
        for wrong in ["b", "b=10.0.0.2", "B=10.0.0.2:7440"] {
            parse(&["--peer", wrong]).unwrap_err();
        }
    }

    #[test]
    fn times_and_sizes_need_units() {
        let parsed = parse(&["--downtime-max", "50ms", "--eager-memory-max", "1GiB"]).unwrap();
        assert_eq!(parsed.eager_memory_max, Some(Bytes(1 << 30)));
        let error = parse(&["--downtime-max", "50"]).unwrap_err();
        assert!(error.contains("has no unit"), "{error}");
    }
}
