//! Reads everything that one Migration depends on, now and not from a cache.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use super::{Error, Trying};
use crate::eligible::{self, Claims};
use crate::migration::Migration;
use crate::names::{ORIGIN, next_pod};
use crate::observe::{self, Objects};
use crate::plan::Step;
use crate::policy::MigrationPolicy;
use crate::surroundings;

pub async fn gather(client: &Client, migration: &Migration) -> Result<Objects, Error> {
    let namespace = migration.namespace().unwrap_or_default();
    let migrations: Api<Migration> = Api::namespaced(client.clone(), &namespace);
    let found = migrations.get_opt(&migration.name_any()).await;
    let found = found.trying("reading the Migration")?;
    let Some(migration) = found.filter(|found| found.uid() == migration.uid()) else {
        return Ok(Objects::default());
    };
    let record = observe::record(&migration);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let source = pods
        .get_opt(&migration.spec.pod.name)
        .await
        .trying("reading the pod")?;
    let mut objects = Objects {
        nodes: listed(client, "nodes").await?,
        policies: listed::<MigrationPolicy>(client, "policies").await?,
        ..Objects::default()
    };
    if record.step == Step::Waiting {
        // Limits count what is there now.
        objects.others = listed(client, "Migrations").await?;
        if let Some(pod) = &source {
            objects.claims = claims(client, pod).await?;
        }
        if has_room(&migration, &objects) {
            objects.pods = Some(self::pods(client).await?);
        }
        let budgets: Api<PodDisruptionBudget> = Api::namespaced(client.clone(), &namespace);
        let listed = budgets.list(&ListParams::default()).await;
        objects.budgets = listed.trying("listing disruption budgets")?.items;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let labels = namespaces
            .get(&namespace)
            .await
            .trying("reading the namespace")?;
        objects.namespace = labels.labels().clone();
    }
    if let Some(pod) = &source {
        owners(client, pod, &mut objects).await?;
    }
    let new = record.new_name.clone().or_else(|| {
        let pod = source.as_ref()?;
        let origin = pod.annotations().get(ORIGIN).map(String::as_str);
        Some(next_pod(&pod.name_any(), origin))
    });
    if let Some(name) = new {
        objects.new = pods.get_opt(&name).await.trying("reading the new pod")?;
    }
    if let Some(owner) = objects.new.as_ref().and_then(observe::adopter)
        && !owner.name.is_empty()
    {
        let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), &namespace);
        let found = sets.get_opt(&owner.name).await;
        objects.adopter = found.trying("reading the ReplicaSet that adopts")?;
    }
    objects.source = source;
    objects.migration = latest(&migrations, &migration).await?;
    Ok(objects)
}

/// The Migration as it is now. Agents say something in it each second, and all the rest takes a
/// while to read: what is written down then, with the version that was looked at, would be refused
/// again and again.
async fn latest(
    migrations: &Api<Migration>,
    migration: &Migration,
) -> Result<Option<Migration>, Error> {
    let name = migration.name_any();
    let found = migrations.get_opt(&name).await;
    let found = found.trying("reading the Migration once more")?;
    let found = found.filter(|found| found.uid() == migration.uid());
    // By the step it was chosen what else to read.
    let is_as_it_was = |now: &Migration| observe::record(now) == observe::record(migration);
    match found.as_ref().is_none_or(is_as_it_was) {
        true => Ok(found),
        false => Err(Error::Object(format!(
            "{name} has got on while it was looked at"
        ))),
    }
}

/// Whether there may be one more move. Where there may not, all the cluster's pods say nothing.
fn has_room(migration: &Migration, objects: &Objects) -> bool {
    let going = surroundings::others(migration, &objects.others).len();
    going < PODS_READ_MAX
}

/// The cluster's pods that have not ended, as the API server last knew them: where there is room
/// is the scheduler's to say.
pub async fn pods(client: &Client) -> Result<Vec<Pod>, Error> {
    let pods: Api<Pod> = Api::all(client.clone());
    let running = "status.phase!=Succeeded,status.phase!=Failed";
    let wanted = ListParams::default().fields(running).match_any();
    Ok(pods.list(&wanted).await.trying("listing pods")?.items)
}

pub async fn listed<K>(client: &Client, what: &str) -> Result<Vec<K>, Error>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::all(client.clone());
    let listed = api.list(&ListParams::default()).await;
    Ok(listed.trying(format!("listing {what}"))?.items)
}

async fn owners(client: &Client, pod: &Pod, objects: &mut Objects) -> Result<(), Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let owner = eligible::owner(pod).filter(|owner| owner.kind == "ReplicaSet");
    let Some(owner) = owner else {
        return Ok(());
    };
    let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), &namespace);
    objects.owner = sets
        .get_opt(&owner.name)
        .await
        .trying("reading the ReplicaSet")?;
    let above = objects.owner.iter().flat_map(ResourceExt::owner_references);
    let mut above = above.filter(|owner| owner.kind == "Deployment");
    if let Some(owner) = above.next() {
        let deployments: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
        let found = deployments.get_opt(&owner.name).await;
        objects.deployment = found.trying("reading the Deployment")?;
    }
    Ok(())
}

pub async fn claims(client: &Client, pod: &Pod) -> Result<Claims, Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &namespace);
    let mut claims = BTreeMap::new();
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    for claim in volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref()) {
        let name = &claim.claim_name;
        let found = api.get_opt(name).await.trying("reading a claim")?;
        let modes = found.and_then(|claim| claim.spec?.access_modes);
        claims.insert(name.clone(), modes.unwrap_or_default());
    }
    Ok(claims)
}

/// With so many others before it a move waits, by all likely limits, and looks every few seconds.
const PODS_READ_MAX: usize = 64;
