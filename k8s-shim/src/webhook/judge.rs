//! One eviction: what is known of the pod is read, and a Migration made if it is to move.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::core::admission::{AdmissionRequest, AdmissionResponse, Operation};
use kube::core::response::StatusSummary;
use kube::core::{DynamicObject, Status};
use serde_json::json;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::eligible;
use crate::evict::{self, Answer, Asked};
use crate::migration::{Migration, Target};
use crate::names::{BY_EVICTION, EVICTING, MIGRATION_NAME, manager};
use crate::observe::{self, Objects};
use crate::plan::{self, Why};
use crate::reconcile::gather::{self, listed};
use crate::reconcile::{Context, Error, Trying};
use crate::trigger::asked;
use crate::{surroundings, target};

/// What is answered to the API server.
pub async fn judge(
    context: &Context,
    request: &AdmissionRequest<DynamicObject>,
) -> AdmissionResponse {
    let mut response = AdmissionResponse::from(request);
    let eviction = request.sub_resource.as_deref() == Some("eviction");
    if !eviction || request.operation != Operation::Create {
        return response;
    }
    let namespace = request.namespace.clone().unwrap_or_default();
    let answer = match timeout(TIME_MAX, answer(context, request, &namespace)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => unknown(&error.to_string()),
        Err(_) => unknown("the API server takes its time"),
    };
    match answer {
        Answer::Evict(None) | Answer::Move => {}
        Answer::Evict(Some(why)) => {
            let text = format!(
                "pageferry does not move it: {}: {}",
                why.reason, why.message
            );
            response.warnings = Some(vec![text]);
        }
        Answer::Wait(text) => {
            response.allowed = false;
            response.result = Status {
                status: Some(StatusSummary::Failure),
                code: TOO_MANY_REQUESTS,
                reason: kube::core::response::reason::TOO_MANY_REQUESTS.to_owned(),
                message: text,
                ..Status::default()
            };
        }
    }
    response
}

/// Of whom nothing is known, it is not known that he wants to move.
fn unknown(error: &str) -> Answer {
    warn!(error, "an eviction that nothing is known of goes on");
    Answer::Evict(Some(Why::new("NotLookedAt", error)))
}

async fn answer(
    context: &Context,
    request: &AdmissionRequest<DynamicObject>,
    namespace: &str,
) -> Result<Answer, Error> {
    let client = &context.client;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let found = pods.get_opt(&request.name).await;
    let Some(pod) = found.trying("reading the pod")? else {
        return Ok(Answer::Evict(None));
    };
    let objects = read(context, &pod).await?;
    let migrations: Api<Migration> = Api::namespaced(client.clone(), namespace);
    let of_pod = ListParams::default().fields(&format!("spec.pod.name={}", request.name));
    let known = migrations
        .list(&of_pod)
        .await
        .trying("listing Migrations")?
        .items;
    let came_by = match pod.labels().get(MIGRATION_NAME) {
        Some(name) => migrations
            .get_opt(name)
            .await
            .trying("reading a Migration")?,
        None => None,
    };
    let policy = observe::selecting(&objects.policies, pod.labels(), &objects.namespace);
    let answer = evict::answer(&Asked {
        pod: &pod,
        migrations: &known,
        came_by: came_by.as_ref(),
        policy,
        now: Timestamp::now().as_second(),
    });
    let object = request.object.as_ref().map(|object| &object.data);
    let meant = object.is_none_or(|object| evict::is_meant(object, pod.uid().as_deref()));
    if request.dry_run || !meant {
        return Ok(Answer::Evict(dry(&answer)));
    }
    match answer {
        Answer::Move => Ok(begin(context, &pod, objects, &known).await),
        Answer::Evict(Some(why)) => Ok(evicted(context, &pod, why).await),
        Answer::Evict(None) => Ok(Answer::Evict(None)),
        Answer::Wait(text) => Ok(Answer::Wait(text)),
    }
}

/// What is said of an eviction that is not meant.
fn dry(answer: &Answer) -> Option<Why> {
    match answer {
        Answer::Evict(why) => why.clone(),
        Answer::Move | Answer::Wait(_) => Some(Why::new(
            "DryRun",
            "it would move, or does, and is gone then",
        )),
    }
}

/// What says whether a pod is to move.
async fn read(context: &Context, pod: &Pod) -> Result<Objects, Error> {
    let client = &context.client;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = namespaces.get(&pod.namespace().unwrap_or_default()).await;
    Ok(Objects {
        policies: listed(client, "policies").await?,
        namespace: namespace.trying("reading the namespace")?.labels().clone(),
        ..Objects::default()
    })
}

/// Begins a move, if there can be one.
async fn begin(context: &Context, pod: &Pod, mut objects: Objects, known: &[Migration]) -> Answer {
    let begun = async {
        let client = &context.client;
        let claims = gather::claims(client, pod).await?;
        if let Some(why) = eligible::refusal(pod, &claims) {
            return Ok(Err(why));
        }
        objects.nodes = listed(client, "nodes").await?;
        objects.others = listed(client, "Migrations").await?;
        objects.pods = Some(gather::pods(client).await?);
        let anywhere = Target::default();
        let target = target::choose(&anywhere, Some(pod), &surroundings::cluster(&objects));
        if let plan::Target::None(why) = target {
            return Ok(Err(why));
        }
        make(context, pod, known).await.map(Ok)
    };
    match begun.await {
        Ok(Ok(migration)) => Answer::Wait(evict::moving(pod, &migration)),
        Ok(Err(why)) => evicted(context, pod, why).await,
        // It would say the same whenever it is asked.
        Err(Error::Refused { what, message }) => {
            let why = Why::new("MigrationRefused", format!("{what}: {message}"));
            evicted(context, pod, why).await
        }
        Err(error) => {
            warn!(%error, pod = pod.name_any(), "a move by eviction is tried again");
            Answer::Wait(format!("pod {} is to move: {error}", pod.name_any()))
        }
    }
}

async fn make(context: &Context, pod: &Pod, known: &[Migration]) -> Result<Migration, Error> {
    let client = &context.client;
    let namespace = pod.namespace().unwrap_or_default();
    let migrations: Api<Migration> = Api::namespaced(client.clone(), &namespace);
    let migration = asked(pod, None, Some(BY_EVICTION), known);
    let parameters = PostParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    let made = match migrations.create(&parameters, &migration).await {
        Ok(made) => {
            info!(migration = %made.name_any(), pod = pod.name_any(), "asked for by an eviction");
            let note = format!("it moves by Migration {}", made.name_any());
            context
                .tell(pod, true, "EvictionMoves", "Evict", note)
                .await;
            made
        }
        // Another one has answered the same.
        Err(kube::Error::Api(status)) if status.is_already_exists() => migration,
        Err(kube::Error::Api(status)) if status.is_invalid() || status.is_forbidden() => {
            return Err(Error::Refused {
                what: "making the Migration".to_owned(),
                message: status.message.clone(),
            });
        }
        Err(error) => return Err(error).trying("making the Migration"),
    };
    mark(context, pod, &made).await;
    Ok(made)
}

/// Tells the descheduler that it goes. One that does not hear of it asks once more.
async fn mark(context: &Context, pod: &Pod, migration: &Migration) {
    let pods: Api<Pod> =
        Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({"metadata": {
        "uid": pod.metadata.uid,
        "annotations": {EVICTING: migration.name_any()},
    }});
    let parameters = PatchParams {
        field_manager: Some(manager::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let patched = pods
        .patch(&pod.name_any(), &parameters, &Patch::Merge(patch))
        .await;
    if let Err(error) = patched {
        warn!(%error, pod = pod.name_any(), "it does not say that it is evicted");
    }
}

async fn evicted(context: &Context, pod: &Pod, why: Why) -> Answer {
    info!(
        pod = pod.name_any(),
        why.reason, why.message, "evicted, as it does not move"
    );
    let note = format!("{}: {}", why.reason, why.message);
    context
        .tell(pod, false, "EvictedUnmoved", "Evict", note)
        .await;
    Answer::Evict(Some(why))
}

const TOO_MANY_REQUESTS: u16 = 429;
/// Less than the API server waits.
const TIME_MAX: Duration = Duration::from_secs(4);
