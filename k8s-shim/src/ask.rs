//! What a person asks for on the command line, and what is said of it.

use std::collections::BTreeMap;
use std::pin::pin;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use crate::migration::{
    Migration, MigrationSpec, MigrationStatus, Mode, Outcome, PodReference, Target,
};
use crate::names::manager;
use crate::observe;
use crate::plan::Step;
use crate::trigger::migration_name;

/// What is asked for.
#[derive(Clone, Debug)]
pub enum Ask {
    To(String),
    ToLabels(BTreeMap<String, String>),
    ToAny,
    Watch,
    Cancel,
}

/// How it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// Who asks, of which pod.
pub struct Asking {
    pub client: Client,
    pub namespace: String,
    pub pod: String,
    pub policy: Option<String>,
    pub output: Format,
    pub wait: bool,
}

impl std::fmt::Debug for Asking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asking")
            .field("pod", &self.pod)
            .finish_non_exhaustive()
    }
}

impl Asking {
    /// Does it. True when it ended as it was asked for.
    ///
    /// # Errors
    /// When that is not known.
    pub async fn run(&self, ask: Ask) -> Result<bool> {
        let migration = match &ask {
            Ask::To(node) => {
                let target = Target {
                    node: Some(node.clone()),
                    node_selector: None,
                };
                self.start(target).await?
            }
            Ask::ToLabels(labels) => {
                let target = Target {
                    node: None,
                    node_selector: Some(labels.clone()),
                };
                self.start(target).await?
            }
            Ask::ToAny => self.start(Target::default()).await?,
            Ask::Watch => self.newest().await?,
            Ask::Cancel => self.cancel().await?,
        };
        if !self.wait {
            self.say(&migration, None);
            return Ok(true);
        }
        let result = self.follow(&migration).await?;
        let wanted = match ask {
            Ask::Cancel => result == Outcome::Cancelled,
            Ask::To(_) | Ask::ToLabels(_) | Ask::ToAny | Ask::Watch => result == Outcome::Succeeded,
        };
        Ok(wanted)
    }

    fn migrations(&self) -> Api<Migration> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// All of the pod's name, the newest last.
    async fn known(&self) -> Result<Vec<Migration>> {
        let of_pod = ListParams::default().fields(&format!("spec.pod.name={}", self.pod));
        let listed = self.migrations().list(&of_pod).await;
        let mut known = listed.context("listing Migrations")?.items;
        known.sort_by_key(|one| one.metadata.creation_timestamp.clone());
        Ok(known)
    }

    async fn newest(&self) -> Result<Migration> {
        let newest = self.known().await?.pop();
        newest.with_context(|| format!("no Migration of pod {} is known", self.pod))
    }

    async fn start(&self, target: Target) -> Result<Migration> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = pods
            .get(&self.pod)
            .await
            .with_context(|| format!("pod {}", self.pod))?;
        let uid = pod.uid().context("the pod has no UID")?;
        let mut known = self.known().await?;
        known.retain(|one| one.spec.pod.uid == uid);
        if let Some(open) = known
            .iter()
            .find(|one| observe::record(one).step != Step::Ended)
        {
            ensure!(
                open.spec.target == target,
                "it is already moved by Migration {}: cancel that first",
                open.name_any()
            );
            return Ok(open.clone());
        }
        let migration = Migration {
            metadata: ObjectMeta {
                name: Some(migration_name(&self.pod, &uid, &known)),
                ..ObjectMeta::default()
            },
            spec: MigrationSpec {
                pod: PodReference {
                    name: self.pod.clone(),
                    uid,
                },
                target,
                mode: Mode::default(),
                policy: self.policy.clone(),
                cancel: false,
            },
            status: None,
        };
        let parameters = PostParams {
            field_manager: Some(manager::KUBECTL.to_owned()),
            ..PostParams::default()
        };
        let made = self.migrations().create(&parameters, &migration).await;
        made.context("making the Migration")
    }

    async fn cancel(&self) -> Result<Migration> {
        let migration = self.newest().await?;
        let name = migration.name_any();
        if observe::record(&migration).step == Step::Ended {
            bail!("Migration {name} has ended: there is nothing to cancel");
        }
        let patch = Patch::Merge(json!({
            "metadata": {"uid": migration.metadata.uid}, "spec": {"cancel": true},
        }));
        let patched = self
            .migrations()
            .patch(&name, &PatchParams::default(), &patch)
            .await;
        patched.with_context(|| format!("cancelling {name}"))
    }

    async fn follow(&self, migration: &Migration) -> Result<Outcome> {
        let name = migration.name_any();
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let changes = watcher(self.migrations(), config)
            .default_backoff()
            .touched_objects();
        let mut changes = pin!(changes);
        let mut said = None;
        while let Some(change) = changes.next().await {
            let now = match change {
                Ok(now) if now.uid() == migration.uid() => now,
                Ok(_) => continue,
                Err(error) => {
                    eprintln!("watching {name}: {error}");
                    continue;
                }
            };
            said = Some(self.say(&now, said.as_ref()));
            let ended = observe::record(&now).step == Step::Ended;
            if let Some(result) = now.status.and_then(|status| status.result)
                && ended
            {
                return Ok(result);
            }
            if now.metadata.deletion_timestamp.is_some() && now.metadata.finalizers.is_none() {
                bail!("Migration {name} was deleted");
            }
        }
        bail!("the watch of {name} ended");
    }

    /// Says how it stands, unless that was said last.
    fn say(&self, migration: &Migration, last: Option<&Value>) -> Value {
        let state = state(migration);
        if last != Some(&state) {
            match self.output {
                Format::Json => println!("{state}"),
                Format::Text => println!("{}", text(migration)),
            }
        }
        state
    }
}

fn state(migration: &Migration) -> Value {
    let status = migration.status.clone().unwrap_or_default();
    let record = observe::record(migration);
    json!({
        "migration": migration.name_any(),
        "pod": migration.spec.pod.name,
        "from": status.source,
        "to": status.target,
        "step": record.step,
        "phase": status.phase,
        "round": status.round,
        "bytes": status.bytes,
        "etaSeconds": status.eta_seconds,
        "predictedDowntimeMs": status.predicted_downtime_ms,
        "downtimeMs": status.downtime_ms,
        "newPod": status.new_pod.as_ref().map(|pod| &pod.name),
        "blocked": record.blocked.is_some(),
        "result": status.result,
        "reason": status.reason,
        "message": status.message,
    })
}

fn text(migration: &Migration) -> String {
    let status = migration.status.clone().unwrap_or_default();
    let step = observe::record(migration).step;
    let mut words = vec![format!(
        "{}: {}",
        migration.spec.pod.name,
        step_text(step, &status)
    )];
    if let Some(round) = status.round.filter(|_| step < Step::Moving) {
        words.push(format!("round {round}"));
    }
    if let Some(left) = status.eta_seconds {
        words.push(format!("{left} s left"));
    }
    if let Some(downtime) = status.downtime_ms.filter(|_| Step::Moving < step) {
        words.push(format!("stood still for {downtime} ms"));
    }
    if let (Some(reason), Some(message)) = (&status.reason, &status.message) {
        words.push(format!("{reason}: {message}"));
    }
    words.join(", ")
}

fn step_text(step: Step, status: &MigrationStatus) -> String {
    let target = status.target.as_deref().unwrap_or_default();
    let new = status
        .new_pod
        .as_ref()
        .map(|pod| pod.name.as_str())
        .unwrap_or_default();
    match step {
        Step::Waiting => "waits".to_owned(),
        Step::Copying => format!("copies to {target}"),
        Step::Placing => format!("the new pod {new} gets its place at {target}"),
        Step::Moving => format!("hands over to {new}"),
        Step::Switching => format!("runs at {target} as {new}"),
        Step::Cleaning => "what is left is removed".to_owned(),
        Step::Aborting => "is given up".to_owned(),
        Step::Ended => match status.result {
            Some(Outcome::Succeeded) => format!("has moved to {target}, as {new}"),
            Some(Outcome::SucceededWithoutRestore) => format!("is at {target}, and began anew"),
            Some(Outcome::Cancelled) => "goes on where it was, as it was asked for".to_owned(),
            Some(Outcome::Failed) | None => "goes on where it was".to_owned(),
        },
    }
}

/// `a=b,c=d`.
///
/// # Errors
/// If it is something else.
pub fn labels(text: &str) -> Result<BTreeMap<String, String>> {
    let pairs = text.split(',').map(|pair| {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("{pair:?} is not LABEL=VALUE"))?;
        Ok((name.to_owned(), value.to_owned()))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs() {
        assert_eq!(labels("a=b,c=").map(|all| all.len()).ok(), Some(2));
        assert!(labels("a").is_err());
    }
}
