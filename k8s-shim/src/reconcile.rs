//! Does what the plan says, through the API server.
//!
//! What is written down goes through the status with the version that was looked at, so that who
//! decided by old news is told so. Everything else is guarded by a UID, and may be done again.
//! Absent: deciding anything.

pub mod actions;
pub(crate) mod gather;
mod moment;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::controller::Action as Again;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tracing::{error, info, warn};

use crate::eligible;
use crate::invariants::{self, Suspicions};
use crate::metrics::{self, Metrics};
use crate::migration::{Migration, MigrationStatus, Outcome};
use crate::names::manager;
use crate::observe::{self, Objects};
use crate::plan::{Action, Decision, Observed, Record, Step, new_pod_refused, plan};
use crate::{probes, status};
use moment::Moments;

/// Why a look at a Migration came to nothing: it is looked at again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {error}")]
    Api {
        what: String,
        #[source]
        error: Box<kube::Error>,
    },
    #[error("{0}")]
    Object(String),
    /// What it does not take, however often it is asked: forbidden, by a quota too, or invalid.
    #[error("{what}: {message}")]
    Refused { what: String, message: String },
}

/// Names what was tried of the API server.
pub(crate) trait Trying<T> {
    fn trying(self, what: impl Into<String>) -> Result<T, Error>;
}

impl<T> Trying<T> for Result<T, kube::Error> {
    fn trying(self, what: impl Into<String>) -> Result<T, Error> {
        self.map_err(|error| Error::Api {
            what: what.into(),
            error: Box::new(error),
        })
    }
}

/// What a reconcile needs.
pub struct Context {
    pub client: Client,
    recorder: Recorder,
    pub metrics: Metrics,
    suspicions: Suspicions,
    moments: Moments,
    /// How often in a row the looks at a Migration, by its UID, came to nothing.
    failed: Mutex<BTreeMap<String, u32>>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

impl Context {
    pub fn new(client: Client, instance: Option<String>, metrics: Metrics) -> Self {
        let reporter = Reporter {
            controller: manager::CONTROLLER.to_owned(),
            instance,
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            metrics,
            suspicions: Suspicions::default(),
            moments: Moments::default(),
            failed: Mutex::default(),
        }
    }

    fn failed(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        // Counts are whole whoever panicked.
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn went_well(&self, uid: &str) {
        self.failed().remove(uid);
    }

    /// After what time it is tried again.
    fn went_wrong(&self, uid: &str) -> Duration {
        let mut failed = self.failed();
        let times = failed.entry(uid.to_owned()).or_default();
        let after = retry_after(*times);
        *times = times.saturating_add(1);
        after
    }

    /// For people; a lost one is not made up for.
    pub async fn tell<K>(&self, object: &K, good: bool, reason: &str, action: &str, note: String)
    where
        K: Resource<DynamicType = ()>,
    {
        let mut note = note;
        note.truncate(note.floor_char_boundary(NOTE_MAX));
        let event = Event {
            type_: match good {
                true => EventType::Normal,
                false => EventType::Warning,
            },
            reason: reason.to_owned(),
            note: Some(note),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            warn!(%error, reason, "an event is lost");
        }
    }
}

/// Looks at a Migration, and does the next thing.
///
/// # Errors
/// What the API server said. Nothing is half done by it that would not be done again.
pub async fn reconcile(migration: Arc<Migration>, context: Arc<Context>) -> Result<Again, Error> {
    if let Some(left) = context.moments.left(&migration) {
        return Ok(Again::requeue(left));
    }
    let objects = gather::gather(&context.client, &migration).await?;
    let now = Timestamp::now().as_second();
    let (Some(seen), Some(migration)) = (observe::observe(&objects, now), &objects.migration)
    else {
        context.went_well(&migration.uid().unwrap_or_default());
        return Ok(Again::await_change());
    };
    let suspect = watch(&context, migration, &seen);
    let Decision {
        record,
        actions,
        again,
    } = plan(&seen);
    let hands_over =
        |record: &&Record| record.step == Step::Moving && seen.record.step != record.step;
    let hands_over = record.as_ref().filter(hands_over);
    if let Some(record) = hands_over {
        // Before it, and not while the pod stands still.
        tell(&context, &objects, migration, &seen.record, record).await;
    }
    let changed = write(&context, &objects, migration, &seen, record.as_ref()).await?;
    if let Some(record) = &record {
        match hands_over {
            Some(_) => context.moments.begin(migration),
            None => tell(&context, &objects, migration, &seen.record, record).await,
        }
        context.went_well(&migration.uid().unwrap_or_default());
        return Ok(Again::requeue(SOON));
    }
    let acted = !actions.is_empty();
    for action in actions {
        info!(migration = %migration.name_any(), ?action, "acting");
        match actions::act(&context, &objects, migration, &action).await {
            Err(Error::Refused { message, .. }) if matches!(action, Action::CreatePod { .. }) => {
                let record = new_pod_refused(&seen, &message);
                write(&context, &objects, migration, &seen, record.as_ref()).await?;
                if let Some(record) = &record {
                    tell(&context, &objects, migration, &seen.record, record).await;
                }
                break;
            }
            done => done?,
        }
    }
    context.went_well(&migration.uid().unwrap_or_default());
    Ok(match (acted || changed, again) {
        (true, _) => Again::requeue(SOON),
        (false, _) if suspect => Again::requeue(LOOK_AGAIN),
        (false, Some(seconds)) => Again::requeue(Duration::from_secs(seconds.unsigned_abs())),
        (false, None) => Again::requeue(AT_LEAST),
    })
}

/// Counts rules that are broken. Whether something looks like it.
fn watch(context: &Context, migration: &Migration, seen: &Observed) -> bool {
    let broken = invariants::broken(seen);
    let uid = migration.uid().unwrap_or_default();
    let (counted, again) = context.suspicions.look(&uid, &broken, Instant::now());
    for rule in counted {
        error!(migration = %migration.name_any(), ?rule, ?seen, "a rule is broken: this is a bug");
        context.metrics.count(&metrics::VIOLATIONS, rule.name());
    }
    again
}

/// What to do when a reconcile failed.
#[allow(
    clippy::needless_pass_by_value,
    reason = "its type is the controller's"
)]
pub fn retry(migration: Arc<Migration>, error: &Error, context: Arc<Context>) -> Again {
    if is_conflict(error) {
        return Again::requeue(SOON);
    }
    let after = context.went_wrong(&migration.uid().unwrap_or_default());
    context.metrics.count(&metrics::LOOKS_FAILED, "");
    warn!(migration = %migration.name_any(), %error, ?after, "trying again");
    Again::requeue(after)
}

/// Whether only somebody else has written meanwhile, such as an agent: what is known is old, and
/// nothing is wrong.
fn is_conflict(error: &Error) -> bool {
    match error {
        Error::Api { error, .. } => {
            matches!(&**error, kube::Error::Api(status) if status.code == 409)
        }
        Error::Object(_) | Error::Refused { .. } => false,
    }
}

fn retry_after(times: u32) -> Duration {
    let factor = 2_u32.saturating_pow(times);
    RETRY.saturating_mul(factor).min(RETRY_MAX)
}

/// Writes the status down if it is to be another one.
async fn write(
    context: &Context,
    objects: &Objects,
    migration: &Migration,
    seen: &Observed,
    record: Option<&Record>,
) -> Result<bool, Error> {
    let before = migration.status.clone().unwrap_or_default();
    let generation = migration.metadata.generation;
    let spec = objects.source.as_ref().and_then(|pod| pod.spec.as_ref());
    let containers = spec.into_iter().flat_map(eligible::lasting);
    let containers: Vec<String> = containers.map(|one| one.name.clone()).collect();
    let record = record.unwrap_or(&seen.record);
    let mut status = status::make(record, seen, &before, &containers, generation);
    // What holds is what held when it began.
    if seen.record.step == Step::Waiting && record.step != Step::Waiting {
        status.budget = probes::budget(observe::policy(objects), observe::source(objects));
    }
    let ours = MigrationStatus {
        source_report: None,
        target_report: None,
        ..before
    };
    if ours == status {
        return Ok(false);
    }
    let name = migration.name_any();
    let patch = json!({
        "apiVersion": Migration::api_version(&()),
        "kind": Migration::kind(&()),
        "metadata": {
            "name": name,
            "uid": migration.metadata.uid,
            "resourceVersion": migration.metadata.resource_version,
        },
        "status": status,
    });
    let api: Api<Migration> = api(context, migration);
    let parameters = PatchParams::apply(manager::CONTROLLER).force();
    let patch = Patch::Apply(&patch);
    let written = api.patch_status(&name, &parameters, &patch).await;
    written.trying("writing the status")?;
    Ok(true)
}

/// Says what has changed, of the Migration and of the pods.
async fn tell(
    context: &Context,
    objects: &Objects,
    migration: &Migration,
    before: &Record,
    record: &Record,
) {
    let name = migration.name_any();
    if let Some(why) = record
        .blocked
        .as_ref()
        .filter(|_| before.blocked != record.blocked)
    {
        info!(migration = %name, reason = why.reason, why.message, "blocked");
        let note = why.message.clone();
        context
            .tell(migration, false, &why.reason, "Wait", note)
            .await;
    }
    if before.step == record.step {
        return;
    }
    if let Some(result) = record.result.filter(|_| record.step == Step::Ended) {
        context.metrics.count(&metrics::MOVES, result.name());
        let status = migration.status.as_ref();
        let report = status.and_then(|status| status.source_report.as_ref());
        let downtime = report
            .filter(|report| report.moved)
            .and_then(|one| one.downtime_ms);
        let downtime = downtime.and_then(|ms| u64::try_from(ms).ok());
        context
            .metrics
            .add(&metrics::DOWNTIME, "", downtime.unwrap_or_default());
    }
    let why = &record.why;
    info!(migration = %name, from = ?before.step, to = ?record.step, ?why, "next step");
    let good = !matches!(
        record.result,
        Some(Outcome::Failed | Outcome::SucceededWithoutRestore)
    );
    let good = good && record.step != Step::Aborting;
    let (reason, note) = said(record);
    let step = format!("{:?}", record.step);
    context
        .tell(migration, good, &reason, &step, note.clone())
        .await;
    if let Some(pod) = observe::source(objects)
        && matches!(record.step, Step::Copying | Step::Ended)
    {
        context.tell(pod, good, &reason, &step, note.clone()).await;
    }
    if let Some(pod) = objects.new.as_ref().filter(|_| record.step == Step::Ended) {
        context.tell(pod, good, &reason, &step, note).await;
    }
}

/// A step for people.
fn said(record: &Record) -> (String, String) {
    let target = record.target.as_deref().unwrap_or_default();
    let new = record.new_name.as_deref().unwrap_or_default();
    let why = record.why.as_ref();
    let why = why.map_or_else(String::new, |why| {
        format!("{}: {}", why.reason, why.message)
    });
    let (reason, note) = match record.step {
        Step::Waiting => ("Waiting", "waits for its turn".to_owned()),
        Step::Copying => ("Copying", format!("copies to node {target} while it runs")),
        Step::Placing => ("Placing", format!("pod {new} is made at node {target}")),
        Step::Moving => ("Moving", format!("hands over to {new}, which waits")),
        Step::Switching => ("Moved", format!("goes on as {new} at node {target}")),
        Step::Cleaning => (
            "Cleaning",
            "what is left of the old pod is removed".to_owned(),
        ),
        Step::Aborting => ("GivingUp", why),
        Step::Ended => {
            let result = record.result.map_or("Ended", Outcome::name);
            return (result.to_owned(), why);
        }
    };
    (reason.to_owned(), note)
}

pub(crate) fn api<K>(context: &Context, near: &impl ResourceExt) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    Api::namespaced(
        context.client.clone(),
        &near.namespace().unwrap_or_default(),
    )
}

const SOON: Duration = Duration::from_millis(200);
/// What looks broken is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// At first, and then twice as long each time.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// What has nothing to wait for is looked at nevertheless.
const AT_LEAST: Duration = Duration::from_secs(300);
/// The API server takes no longer ones.
const NOTE_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_overtaken_looks_again_at_once() {
        let said = |code: u16| {
            let status = serde_json::json!({"code": code, "status": "Failure"});
            let status = serde_json::from_value(status).expect("a status");
            Error::Api {
                what: "writing the status".to_owned(),
                error: Box::new(kube::Error::Api(Box::new(status))),
            }
        };
        assert!(is_conflict(&said(409)));
        assert!(!is_conflict(&said(500)));
        assert!(!is_conflict(&Error::Object("gone".to_owned())));
    }

    #[test]
    fn it_is_tried_less_and_less_often() {
        let after: Vec<u64> = (0..7).map(|times| retry_after(times).as_secs()).collect();
        assert_eq!(after, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(retry_after(u32::MAX), RETRY_MAX);
    }
}
