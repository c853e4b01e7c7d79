//! `pageferry-controller`: has pods moved, as Migrations and annotations ask for.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::{Config, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use pageferry_k8s::lease::Leadership;
use pageferry_k8s::metrics::{self, Metrics};
use pageferry_k8s::migration::Migration;
use pageferry_k8s::names::MIGRATION_NAME;
use pageferry_k8s::reconcile::{Context, reconcile, retry};
use pageferry_k8s::webhook::certificates::{self, Certificates};
use pageferry_k8s::{logging, trigger, webhook};
use tracing::{debug, info};

/// Has pods moved, as Migrations and annotations ask for. Two may run: one leads.
#[derive(Debug, Parser)]
#[command(version, name = "pageferry-controller")]
struct Arguments {
    /// The namespace of the lease by which one leads.
    #[arg(long, env = "POD_NAMESPACE", default_value = "pageferry-system")]
    namespace: String,
    /// What this one is called, as nobody else is.
    #[arg(long, env = "POD_NAME", default_value_t = format!("controller-{}", std::process::id()))]
    name: String,
    /// Where metrics are served, at /metrics, such as 0.0.0.0:9464. Absent: nowhere.
    #[arg(long, env = "PAGEFERRY_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Where the API server asks before it evicts a pod: by the Service pageferry-webhook, at the
    /// port of deploy/kubernetes/webhook.yaml.
    #[arg(long, env = "PAGEFERRY_WEBHOOK", default_value = "0.0.0.0:9443")]
    webhook: SocketAddr,
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
    let metrics = Metrics::new(&metrics::CONTROLLER);
    metrics.serve(arguments.metrics).await?;
    let leadership = Leadership::new(client.clone(), &arguments.namespace, arguments.name.clone());
    let context = Arc::new(Context::new(client.clone(), Some(arguments.name), metrics));
    let certificates = Arc::new(Certificates::default());
    let kept = certificates::keep(
        client.clone(),
        arguments.namespace,
        Arc::clone(&certificates),
    );
    // All of them answer, and one leads.
    let answers = webhook::serve(arguments.webhook, Arc::clone(&context), certificates);
    tokio::select! {
        led = lead(client, context, leadership) => led,
        answered = answers => answered.and_then(|()| bail!("nobody answers before evictions")),
        () = kept => bail!("nobody keeps the certificates"),
        () = logging::asked_to_end() => {
            info!("ends, as it was asked to");
            Ok(())
        }
    }
}

async fn lead(client: Client, context: Arc<Context>, mut leadership: Leadership) -> Result<()> {
    leadership.acquire().await;
    context.metrics.set(&metrics::LEADS, 1);
    tokio::select! {
        () = leadership.keep() => bail!("another one leads, or the API server does not answer"),
        () = trigger::run(client.clone(), Arc::clone(&context)) => bail!("the watch of pods ended"),
        () = control(client, context) => bail!("the watch of Migrations ended"),
    }
}

async fn control(client: Client, context: Arc<Context>) {
    let pods: Api<Pod> = Api::all(client.clone());
    let coming = watcher::Config::default().labels(MIGRATION_NAME);
    let looks = Controller::new(Api::<Migration>::all(client), watcher::Config::default())
        .with_config(Config::default().concurrency(AT_ONCE))
        .watches(pods, coming, |pod: Pod| {
            let name = pod.labels().get(MIGRATION_NAME).cloned();
            let namespace = pod.namespace().unwrap_or_default();
            name.map(|name| ObjectRef::new(&name).within(&namespace))
        })
        .run(reconcile, retry, context);
    looks
        .for_each(|look| async {
            if let Err(error) = look {
                debug!(%error, "a look came to nothing");
            }
        })
        .await;
}

/// Limits count Migrations that wait: only one is let through at a time, whatever this is.
const AT_ONCE: u16 = 16;
