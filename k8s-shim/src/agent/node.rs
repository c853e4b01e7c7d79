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
use crate::names::{DAEMON, READY};

/// What must be there for pods to come, besides the daemon.
#[derive(Clone, Debug)]
pub struct Needs {
    /// What the daemon is called among daemons.
    pub daemon: String,
    /// The program that containerd starts for pods that come.
    pub wrapper: PathBuf,
}

/// Keeps the node's label right, for ever.
pub async fn run(agent: Agent, needs: Needs) {
    let mut said = None;
    loop {
        let missing = missing(&agent, &needs).await;
        match set(&agent, &needs, missing.is_none()).await {
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

async fn missing(agent: &Agent, needs: &Needs) -> Option<String> {
    if let Err(error) = agent.daemon.check().await {
        return Some(error.to_string());
    }
    let there = tokio::fs::try_exists(&needs.wrapper).await;
    match there {
        Ok(true) => None,
        Ok(false) => Some(format!("there is no {}", needs.wrapper.display())),
        Err(error) => Some(format!("{}: {error}", needs.wrapper.display())),
    }
}

async fn set(agent: &Agent, needs: &Needs, ready: bool) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(agent.client.clone());
    let node = nodes.get(&agent.node).await?;
    let ready = ready.to_string();
    let right = node.labels().get(READY) == Some(&ready)
        && node.annotations().get(DAEMON) == Some(&needs.daemon);
    if right {
        return Ok(());
    }
    let patch = json!({"metadata": {
        "labels": {READY: ready},
        "annotations": {DAEMON: needs.daemon},
    }});
    let patch = Patch::Merge(patch);
    nodes
        .patch(&agent.node, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

const EVERY: Duration = Duration::from_secs(3);
