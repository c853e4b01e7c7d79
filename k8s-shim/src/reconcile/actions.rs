//! Single actions. Each is guarded by the UID of what it acts on; done again, it does no more.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::{Context, Error, Trying, api};
use crate::migration::Migration;
use crate::names::{ADOPT, DELETION_COST, EVICTING, FINALIZER, RESTORED, daemon_id, manager};
use crate::newpod::{self, Adopt, Named};
use crate::observe::{self, LOWEST_COST, Objects};
use crate::plan::Action;

pub async fn act(
    context: &Context,
    objects: &Objects,
    migration: &Migration,
    action: &Action,
) -> Result<(), Error> {
    let pods: Api<Pod> = api(context, migration);
    match action {
        Action::Hold => finalizers(context, migration, true).await,
        Action::LetGo => finalizers(context, migration, false).await,
        Action::CreatePod { name, node } => create(&pods, objects, migration, name, node).await,
        Action::DeleteNew { name, uid } => delete(&pods, name, uid, 1).await,
        Action::Release { name, uid } => release(&pods, objects, name, uid).await,
        Action::SetRestored { name, uid } => set_restored(&pods, name, uid).await,
        Action::MarkSource => {
            let change = json!({"annotations": {DELETION_COST: LOWEST_COST}});
            let pod = &migration.spec.pod;
            change_pod(&pods, &pod.name, &pod.uid, change).await
        }
        Action::Adopt { name, uid } => adopt(&pods, objects, name, uid).await,
        Action::EndEviction => {
            let change = json!({"annotations": {EVICTING: null}});
            let pod = &migration.spec.pod;
            change_pod(&pods, &pod.name, &pod.uid, change).await
        }
        Action::DeleteSource => {
            let pod = &migration.spec.pod;
            delete(&pods, &pod.name, &pod.uid, 0).await
        }
    }
}

async fn finalizers(context: &Context, migration: &Migration, held: bool) -> Result<(), Error> {
    let mut finalizers = migration.finalizers().to_vec();
    finalizers.retain(|one| one != FINALIZER);
    if held {
        finalizers.push(FINALIZER.to_owned());
    }
    // Others may have theirs: none of them is to be lost.
    let patch = json!({"metadata": {
        "uid": migration.metadata.uid,
        "resourceVersion": migration.metadata.resource_version,
        "finalizers": finalizers,
    }});
    let migrations: Api<Migration> = api(context, migration);
    let name = migration.name_any();
    let patched = migrations
        .patch(&name, &parameters(), &Patch::Merge(patch))
        .await;
    unless_gone(patched).trying("changing the finalizers")
}

async fn create(
    pods: &Api<Pod>,
    objects: &Objects,
    migration: &Migration,
    name: &str,
    node: &str,
) -> Result<(), Error> {
    let Some(source) = observe::source(objects) else {
        return Err(Error::Object(format!("the pod of {name} has just gone")));
    };
    let id = Named {
        name: migration.name_any(),
        id: daemon_id(&migration.uid().unwrap_or_default()),
        owner: migration.owner_ref(&()),
    };
    let selector = objects.owner.as_ref().map(|owner| &owner.spec.selector);
    let pod = newpod::make(source, name, node, &id, selector);
    let parameters = PostParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    match pods.create(&parameters, &pod).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 422) => {
            Err(Error::Refused {
                what: format!("making the pod {name}"),
                message: status.message.clone(),
            })
        }
        created => created.map(drop).trying(format!("making the pod {name}")),
    }
}

async fn delete(pods: &Api<Pod>, name: &str, uid: &str, grace: u32) -> Result<(), Error> {
    let parameters = DeleteParams {
        grace_period_seconds: Some(grace),
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    let deleted = pods.delete(name, &parameters).await;
    unless_gone(deleted).trying(format!("deleting the pod {name}"))
}

async fn set_restored(pods: &Api<Pod>, name: &str, uid: &str) -> Result<(), Error> {
    let patch = json!({
        "metadata": {"uid": uid},
        "status": {"conditions": [{
            "type": RESTORED,
            "status": "True",
            "reason": "Restored",
            "message": "it goes on as the pod that it came from",
            "lastTransitionTime": Timestamp::now().to_string(),
        }]},
    });
    let patch = Patch::Strategic(patch);
    let patched = pods.patch_status(name, &parameters(), &patch).await;
    unless_gone(patched).trying(format!("saying that {name} is restored"))
}

async fn release(pods: &Api<Pod>, objects: &Objects, name: &str, uid: &str) -> Result<(), Error> {
    let owners = objects.new.as_ref().map(ResourceExt::owner_references);
    let mut owners = owners.unwrap_or_default().to_vec();
    owners.retain(|owner| owner.kind != Migration::kind(&()));
    change_pod(pods, name, uid, json!({"ownerReferences": owners})).await
}

async fn adopt(pods: &Api<Pod>, objects: &Objects, name: &str, uid: &str) -> Result<(), Error> {
    let new = objects.new.as_ref();
    let text = new.and_then(|pod| pod.annotations().get(ADOPT));
    let text = text.ok_or_else(|| Error::Object(format!("pod {name} has lost {ADOPT}")))?;
    let what: Adopt = serde_json::from_str(text)
        .map_err(|error| Error::Object(format!("pod {name}: {ADOPT}: {error}")))?;
    let mut owners = new
        .map(ResourceExt::owner_references)
        .unwrap_or_default()
        .to_vec();
    owners.retain(|owner| owner.controller != Some(true));
    owners.extend(what.owner_references);
    let change = json!({"labels": what.labels, "ownerReferences": owners});
    change_pod(pods, name, uid, change).await
}

async fn change_pod(pods: &Api<Pod>, name: &str, uid: &str, change: Value) -> Result<(), Error> {
    let mut patch = json!({"metadata": change});
    patch["metadata"]["uid"] = json!(uid);
    let patched = pods.patch(name, &parameters(), &Patch::Merge(patch)).await;
    unless_gone(patched).trying(format!("changing the pod {name}"))
}

fn parameters() -> PatchParams {
    PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    }
}

/// What is not there any more, or is another one by now, needs nothing.
fn unless_gone<T>(done: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match done {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}
