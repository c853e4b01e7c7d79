//! `pageferry-agent`: has a node's pageferryd do what Migrations say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kube::Client;
use pageferry_ipam::Folders;
use pageferry_k8s::agent::daemon::Daemon;
use pageferry_k8s::agent::node::Needs;
use pageferry_k8s::agent::{self, Agent, node};
use pageferry_k8s::logging;
use pageferry_k8s::metrics::{self, Metrics};
use tracing::info;

/// Has a node's pageferryd do what Migrations say, and says in them what it says.
#[derive(Debug, Parser)]
#[command(version, name = "pageferry-agent")]
struct Arguments {
    /// The node, as the cluster calls it.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// What pageferryd here is called. Absent: as it says itself.
    #[arg(long, env = "PAGEFERRY_NODE")]
    daemon_name: Option<String>,
    /// The socket of pageferryd.
    #[arg(
        long,
        env = "PAGEFERRY_SOCKET",
        default_value = "/run/pageferry/api.sock"
    )]
    socket: PathBuf,
    /// Where pageferry-ipam is told of pods that come.
    #[arg(long, env = "PAGEFERRY_IPAM_RUN", default_value = pageferry_ipam::RUN)]
    ipam_run: PathBuf,
    /// Where it is told of addresses that are away.
    #[arg(long, env = "PAGEFERRY_IPAM_STATE", default_value = pageferry_ipam::STATE)]
    ipam_state: PathBuf,
    /// The program that containerd starts for pods that come.
    #[arg(
        long,
        env = "PAGEFERRY_WRAPPER",
        default_value = "/usr/local/lib/pageferry/pageferry-oci"
    )]
    wrapper: PathBuf,
    /// Where metrics are served, at /metrics, such as 0.0.0.0:9464. Absent: nowhere.
    #[arg(long, env = "PAGEFERRY_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> ExitCode {
    logging::start();
    logging::exit_code(run(Arguments::parse()).await)
}

async fn run(arguments: Arguments) -> Result<()> {
    let client = Client::try_default()
        .await
        .context("finding the cluster: in it, or by KUBECONFIG")?;
    let metrics = Metrics::new(&metrics::AGENT);
    metrics.serve(arguments.metrics).await?;
    let agent = Agent {
        metrics,
        client,
        daemon: Daemon::new(&arguments.socket),
        folders: Folders::new(arguments.ipam_run, arguments.ipam_state),
        node: arguments.node,
    };
    let needs = Needs {
        daemon: arguments.daemon_name,
        wrapper: arguments.wrapper,
    };
    tokio::select! {
        () = agent::run(agent.clone()) => bail!("the watch of Migrations ended"),
        () = node::run(agent, needs) => bail!("the watch of the node ended"),
        () = logging::asked_to_end() => info!("ends, as it was asked to"),
    }
    Ok(())
}
