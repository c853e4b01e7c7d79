//! What an agent says of its node: whether pods may come.

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::time::sleep;
use tracing::{info, warn};

use super::Agent;
use crate::metrics;
use crate::names::{DAEMON, READY};

/// What must be there for pods to come, besides the daemon.
#[derive(Clone, Debug)]
pub struct Needs {
    /// What the daemon is called among daemons, if not as it says.
    pub daemon: Option<String>,
    /// The program that containerd starts for pods that come.
    pub wrapper: PathBuf,
}

/// Keeps the node's label right, for ever.
pub async fn run(agent: Agent, needs: Needs) {
    let mut said = None;
    loop {
        let (daemon, missing) = look(&agent, &needs).await;
        agent.metrics.set(&metrics::READY, missing.is_none().into());
        match set(&agent, daemon.as_deref(), missing.is_none()).await {
            Ok(()) if said.as_ref() == Some(&missing) => {}
            Ok(()) => {
                match &missing {
                    None => info!(node = agent.node, "pods may come"),
                    Some(missing) => warn!(node = agent.node, missing, "pods may not come"),
                }
                said = Some(missing);
            }
            Err(error) => warn!(%error, "the node's label cannot be set"),
        }
        sleep(EVERY).await;
    }
}

/// What the daemon is called, if it answers; and what is missing for pods to come.
async fn look(agent: &Agent, needs: &Needs) -> (Option<String>, Option<String>) {
    match agent.daemon.name().await {
        Ok(name) => {
            let name = Some(name).filter(|name| !name.is_empty());
            let name = needs.daemon.clone().or(name);
            (
                name.or_else(|| Some(agent.node.clone())),
                missing(needs).await,
            )
        }
        Err(error) => (None, Some(error.to_string())),
    }
}

async fn missing(needs: &Needs) -> Option<String> {
    let there = tokio::fs::try_exists(&needs.wrapper).await;
    match there {
        Ok(true) => None,
        Ok(false) => Some(format!("there is no {}", needs.wrapper.display())),
        Err(error) => Some(format!("{}: {error}", needs.wrapper.display())),
    }
}

/// One that does not answer is called as ever.
async fn set(agent: &Agent, daemon: Option<&str>, ready: bool) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(agent.client.clone());
    let node = nodes.get(&agent.node).await?;
    let ready = ready.to_string();
    let right = node.labels().get(READY) == Some(&ready)
        && daemon.is_none_or(|name| node.annotations().get(DAEMON).is_some_and(|is| is == name));
    if right {
        return Ok(());
    }
    let mut patch = json!({"metadata": {"labels": {READY: ready}}});
    if let Some(daemon) = daemon {
        patch["metadata"]["annotations"] = json!({DAEMON: daemon});
    }
    let patch = Patch::Merge(patch);
    nodes
        .patch(&agent.node, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

const EVERY: Duration = Duration::from_secs(3);
