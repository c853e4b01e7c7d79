//! `kubectl-migrate`: has a pod moved, and watches it. kubectl finds it as `kubectl migrate`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use pageferry_k8s::ask::{self, Ask, Format};

/// Moves a pod to another node while it runs.
///
/// Exits with 0 when it has moved (or was cancelled, with --cancel), with 1 when it has not, and
/// with 2 when that is not known.
#[derive(Debug, Parser)]
#[command(version, name = "kubectl-migrate", bin_name = "kubectl migrate")]
struct Arguments {
    /// The pod.
    pod: String,
    #[command(flatten)]
    what: What,
    /// The MigrationPolicy that is to hold, whichever selects the pod.
    #[arg(long, conflicts_with_all = ["watch", "cancel"])]
    policy: Option<String>,
    /// Say that it is begun, and do not wait for its end.
    #[arg(long)]
    no_wait: bool,
    /// How to say it: lines for people, or every state as a line of JSON.
    #[arg(long, short, value_enum, default_value_t = Format::Text)]
    output: Format,
    #[arg(long, short)]
    namespace: Option<String>,
    /// The context of the kubeconfig.
    #[arg(long)]
    context: Option<String>,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct What {
    /// The node it is to go to.
    #[arg(long = "to", id = "to_node", value_name = "NODE")]
    to: Option<String>,
    /// Labels of which the node is to have all.
    #[arg(long, value_name = "LABEL=VALUE,…")]
    to_selector: Option<String>,
    /// Have it go to any node that takes it.
    #[arg(long)]
    anywhere: bool,
    /// Watch the move that goes on.
    #[arg(long)]
    watch: bool,
    /// Give the move up that goes on.
    #[arg(long)]
    cancel: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(arguments: Arguments) -> Result<bool> {
    let config = config(arguments.context).await?;
    let namespace = arguments
        .namespace
        .unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config).context("reaching the cluster")?;
    let what = arguments.what;
    let ask = match (what.to, what.to_selector) {
        (Some(node), _) => Ask::To(node),
        (None, Some(labels)) => Ask::ToLabels(ask::labels(&labels)?),
        (None, None) if what.anywhere => Ask::ToAny,
        (None, None) if what.cancel => Ask::Cancel,
        (None, None) => Ask::Watch,
    };
    let asking = ask::Asking {
        client,
        namespace,
        pod: arguments.pod,
        policy: arguments.policy,
        output: arguments.output,
        wait: !arguments.no_wait,
    };
    asking.run(ask).await
}

async fn config(context: Option<String>) -> Result<Config> {
    let Some(context) = context else {
        return Config::infer()
            .await
            .context("finding the cluster: KUBECONFIG or ~/.kube/config");
    };
    let options = KubeConfigOptions {
        context: Some(context),
        ..KubeConfigOptions::default()
    };
    let file = Kubeconfig::read().context("reading the kubeconfig")?;
    let config = Config::from_custom_kubeconfig(file, &options).await;
    config.context("finding the context in the kubeconfig")
}
