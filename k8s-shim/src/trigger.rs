//! From the annotation on a pod to a Migration.
//!
//! The annotation is a wish, and is taken off when the Migration is there: the same wish again is
//! another Migration. A crash in between finds the Migration, and takes the annotation off. A wish
//! is the value at the pod with this UID: what has been made of it is not made again as long as
//! this process lives, even where the Migration has ended before the annotation was off.

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
use crate::names::{ANYWHERE, EVICT_ONLY, MIGRATE_TO, ON_EVICTION, REQUESTED_BY, manager};
use crate::observe;
use crate::plan::Step;
use crate::reconcile::{Context, Error, Trying};

/// Watches all pods for the annotation, for as long as this process leads.
pub async fn run(client: Client, context: Arc<Context>) {
    let pods: Api<PartialObjectMeta<Pod>> = Api::all(client.clone());
    let changes = watcher(pods, watcher::Config::default());
    let mut changes = std::pin::pin!(changes.default_backoff().applied_objects());
    let mut wishes: BTreeMap<(String, String), Option<Wish>> = BTreeMap::new();
    let mut again = interval(RETRY);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(pod)) => {
                    tell_descheduler(&client, &pod).await;
                    if !pod.annotations().contains_key(MIGRATE_TO) {
                        continue;
                    }
                    let key = (pod.namespace().unwrap_or_default(), pod.name_any());
                    wishes.entry(key).or_default();
                }
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
            let key = (namespace, name);
            let mut made = wishes.get(&key).cloned().flatten();
            let served = serve(&client, &context, &key, &mut made).await;
            let (namespace, name) = &key;
            match served {
                Ok(()) => drop(wishes.remove(&key)),
                Err(error) => {
                    warn!(%error, namespace, name, "the wish is tried again");
                    wishes.insert(key, made);
                }
            }
        }
    }
}

/// One that says that it moves when it is evicted says so to the descheduler, too. Without that the
/// descheduler takes the answer for a failure; it is tried again when the pod changes.
async fn tell_descheduler(client: &Client, pod: &PartialObjectMeta<Pod>) {
    let annotations = pod.annotations();
    let moves = annotations
        .get(ON_EVICTION)
        .is_some_and(|what| what == "migrate");
    if !moves || annotations.contains_key(EVICT_ONLY) {
        return;
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({"metadata": {
        "uid": pod.metadata.uid, "annotations": {EVICT_ONLY: ""},
    }});
    let parameters = PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let name = pod.name_any();
    let patched = pods.patch(&name, &parameters, &Patch::Merge(patch)).await;
    if let Err(error) = patched {
        warn!(%error, pod = name, "the descheduler does not know that it moves");
    }
}

/// What was asked for, of which pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    uid: String,
    node: String,
}

impl Wish {
    fn named(&self) -> Option<&str> {
        Some(self.node.as_str()).filter(|node| *node != ANYWHERE)
    }
}

/// Makes the Migration that a pod's annotation asks for, and takes the annotation off.
async fn serve(
    client: &Client,
    context: &Context,
    (namespace, name): &(String, String),
    made: &mut Option<Wish>,
) -> Result<(), Error> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let Some(pod) = pods.get_opt(name).await.trying("reading the pod")? else {
        return Ok(());
    };
    let (Some(node), Some(uid)) = (pod.annotations().get(MIGRATE_TO), pod.uid()) else {
        return Ok(());
    };
    let wish = Wish {
        uid: uid.clone(),
        node: node.clone(),
    };
    if made.as_ref() == Some(&wish) {
        return take_off(&pods, &pod, &wish).await;
    }
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
        if open.spec.target.node.as_deref() != wish.named() {
            let note = format!(
                "it is already moved by {}, and not to {node}: cancel that first",
                open.name_any()
            );
            context
                .tell(&pod, false, "AlreadyMoving", "Migrate", note)
                .await;
        }
        return take_off(&pods, &pod, &wish).await;
    }
    let migration = asked(&pod, wish.named(), None, &known);
    let parameters = PostParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    match migrations.create(&parameters, &migration).await {
        Ok(made) => info!(migration = %made.name_any(), pod = name, node, "asked for by a pod"),
        Err(kube::Error::Api(status)) if status.is_invalid() => {
            let note = format!("{MIGRATE_TO}={node} is no node's name: {}", status.message);
            context
                .tell(&pod, false, "MigrationInvalid", "Migrate", note)
                .await;
        }
        // One of that name has come since they were listed: it is looked again.
        Err(error) => return Err(error).trying("making the Migration"),
    }
    *made = Some(wish.clone());
    take_off(&pods, &pod, &wish).await
}

/// The Migration that is asked for, with a name that none of `known` has: to a node, or to any.
/// `by`: who asks, where it is no person.
pub fn asked(pod: &Pod, node: Option<&str>, by: Option<&str>, known: &[Migration]) -> Migration {
    let name = pod.name_any();
    let uid = pod.uid().unwrap_or_default();
    let by = by.map(|by| BTreeMap::from([(REQUESTED_BY.to_owned(), by.to_owned())]));
    Migration {
        metadata: ObjectMeta {
            name: Some(migration_name(&name, &uid, known)),
            namespace: pod.namespace(),
            annotations: by,
            ..ObjectMeta::default()
        },
        spec: MigrationSpec {
            pod: PodReference { name, uid },
            target: Target {
                node: node.map(str::to_owned),
                node_selector: None,
            },
            mode: Mode::default(),
            policy: None,
            cancel: false,
        },
        status: None,
    }
}

/// Of the very pod, as long as it has the very value: a wish that has come meanwhile stays.
async fn take_off(pods: &Api<Pod>, pod: &Pod, wish: &Wish) -> Result<(), Error> {
    let name = pod.name_any();
    let parameters = PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let mut version = pod.metadata.resource_version.clone();
    for _ in 0..TAKE_OFF_TRIES {
        let patch = json!({"metadata": {
            "uid": wish.uid,
            "resourceVersion": version,
            "annotations": {MIGRATE_TO: null},
        }});
        match pods.patch(&name, &parameters, &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
            // Others write pods too: what they wrote is looked at.
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            patched => return patched.map(drop).trying("taking the annotation off"),
        }
        let now = pods.get_opt(&name).await.trying("reading the pod")?;
        let same = now.filter(|now| {
            now.uid().as_ref() == Some(&wish.uid)
                && now.annotations().get(MIGRATE_TO) == Some(&wish.node)
        });
        let Some(now) = same else {
            return Ok(());
        };
        version = now.metadata.resource_version;
    }
    Err(Error::Object(format!(
        "the annotation of pod {name} is not off: it is written all the time"
    )))
}

/// The name of the next Migration of a pod: one that none of `known` has.
pub fn migration_name(pod: &str, uid: &str, known: &[Migration]) -> String {
    let start: String = uid.chars().take(8).collect();
    let stem = format!("-{start}-");
    // Some may have been deleted: how many there are says nothing.
    let numbers = known.iter().filter_map(|one| {
        let name = one.name_any();
        let (_, number) = name.rsplit_once(&stem)?;
        number.parse::<u64>().ok()
    });
    let next = numbers.max().unwrap_or(0).saturating_add(1);
    let suffix = format!("{stem}{next}");
    let kept: String = pod.chars().take(253 - suffix.len()).collect();
    kept + &suffix
}

const RETRY: Duration = Duration::from_secs(2);
const TAKE_OFF_TRIES: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_numbers_is_no_name_twice() {
        let uid = "0f2c7f3e-8c1e-4a52-9a55-0d5f8f5d6c1a";
        let mut pod = Pod::default();
        pod.metadata.name = Some("web".to_owned());
        pod.metadata.uid = Some(uid.to_owned());
        let mut known = Vec::new();
        for number in 1..=3 {
            let next = asked(&pod, Some("node-b"), None, &known);
            assert_eq!(next.name_any(), format!("web-0f2c7f3e-{number}"));
            known.push(next);
        }
        known.remove(0);
        assert_eq!(migration_name("web", uid, &known), "web-0f2c7f3e-4");
        // A person's is none of ours.
        known[0].metadata.name = Some("mine".to_owned());
        assert_eq!(migration_name("web", uid, &known), "web-0f2c7f3e-4");
    }
}
