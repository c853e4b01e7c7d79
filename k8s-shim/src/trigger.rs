//! From the annotation on a pod to a Migration.
//!
//! The annotation is a wish, and is taken off when the Migration is there: the same wish again is
//! another Migration. A crash in between finds the Migration, and takes the annotation off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::migration::{Migration, MigrationSpec, Mode, PodReference, Target};
use crate::names::{MIGRATE_TO, manager};
use crate::observe;
use crate::plan::Step;
use crate::reconcile::{Context, Error, Trying};

/// Watches all pods for the annotation, for as long as this process leads.
pub async fn run(client: Client, context: Arc<Context>) {
    let pods: Api<PartialObjectMeta<Pod>> = Api::all(client.clone());
    let changes = watcher(pods, watcher::Config::default());
    let mut changes = std::pin::pin!(changes.default_backoff().applied_objects());
    let mut wishes: BTreeMap<(String, String), ()> = BTreeMap::new();
    let mut again = interval(RETRY);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(pod)) if pod.annotations().contains_key(MIGRATE_TO) => {
                    wishes.insert((pod.namespace().unwrap_or_default(), pod.name_any()), ());
                }
                Some(Ok(_)) => continue,
                Some(Err(error)) => {
                    warn!(%error, "watching pods");
                    continue;
                }
                None => return,
            },
            _ = again.tick() => {}
        }
        let tried: Vec<_> = wishes.keys().cloned().collect();
        for (namespace, name) in tried {
            match serve(&client, &context, &namespace, &name).await {
                Ok(()) => drop(wishes.remove(&(namespace, name))),
                Err(error) => warn!(%error, namespace, name, "the wish is tried again"),
            }
        }
    }
}

/// Makes the Migration that a pod's annotation asks for, and takes the annotation off.
async fn serve(
    client: &Client,
    context: &Context,
    namespace: &str,
    name: &str,
) -> Result<(), Error> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let Some(pod) = pods.get_opt(name).await.trying("reading the pod")? else {
        return Ok(());
    };
    let (Some(node), Some(uid)) = (pod.annotations().get(MIGRATE_TO), pod.uid()) else {
        return Ok(());
    };
    let migrations: Api<Migration> = Api::namespaced(client.clone(), namespace);
    let of_pod = ListParams::default().fields(&format!("spec.pod.name={name}"));
    let listed = migrations
        .list(&of_pod)
        .await
        .trying("listing Migrations")?;
    let mut known = listed.items;
    known.retain(|one| one.spec.pod.uid == uid);
    let open = known
        .iter()
        .find(|one| observe::record(one).step != Step::Ended);
    if let Some(open) = open {
        if open.spec.target.node.as_deref() != Some(node) {
            let note = format!(
                "it is already moved by {}, and not to {node}: cancel that first",
                open.name_any()
            );
            context
                .tell(&pod, false, "AlreadyMoving", "Migrate", note)
                .await;
        }
        return take_off(&pods, &pod).await;
    }
    let migration = Migration {
        metadata: ObjectMeta {
            name: Some(migration_name(name, &uid, known.len())),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        spec: MigrationSpec {
            pod: PodReference {
                name: name.to_owned(),
                uid,
            },
            target: Target {
                node: Some(node.clone()),
                node_selector: None,
            },
            mode: Mode::default(),
            policy: None,
            cancel: false,
        },
        status: None,
    };
    let parameters = PostParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    match migrations.create(&parameters, &migration).await {
        Ok(made) => info!(migration = %made.name_any(), pod = name, node, "asked for by a pod"),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(kube::Error::Api(status)) if status.is_invalid() => {
            let note = format!("{MIGRATE_TO}={node} is no node's name: {}", status.message);
            context
                .tell(&pod, false, "MigrationInvalid", "Migrate", note)
                .await;
        }
        Err(error) => return Err(error).trying("making the Migration"),
    }
    take_off(&pods, &pod).await
}

/// As it was looked at: a wish that has come meanwhile stays.
async fn take_off(pods: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
    let patch = json!({"metadata": {
        "uid": pod.metadata.uid,
        "resourceVersion": pod.metadata.resource_version,
        "annotations": {MIGRATE_TO: null},
    }});
    let parameters = PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    match pods
        .patch(&pod.name_any(), &parameters, &Patch::Merge(patch))
        .await
    {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        patched => patched.map(drop).trying("taking the annotation off"),
    }
}

/// The name of a Migration: the same for the same wish, and another one for the next.
pub fn migration_name(pod: &str, uid: &str, before: usize) -> String {
    let start: String = uid.chars().take(8).collect();
    let suffix = format!("-{start}-{}", before + 1);
    let kept: String = pod.chars().take(253 - suffix.len()).collect();
    kept + &suffix
}

const RETRY: Duration = Duration::from_secs(2);
