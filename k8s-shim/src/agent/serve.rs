//! One Migration, at one of its sides.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use pageferry_api as schema;
use serde_json::json;
use tokio::sync::watch::Receiver;
use tokio::time::{sleep, timeout};
use tonic::Streaming;
use tracing::{info, warn};

use super::daemon::Error;
use super::orders::{self, Call, Orders};
use super::report::{self, Besides};
use super::{Agent, address};
use crate::metrics;
use crate::migration::Migration;
use crate::names::{DAEMON, daemon_id, manager};
use crate::observe;
use crate::plan::{Report, Side, Step};

/// Whether nothing is to be done for it here any more.
pub fn is_over(side: Side, migration: &Migration) -> bool {
    observe::record(migration).step == Step::Ended
        && last_report(side, migration).is_some_and(|report| report.is_final)
}

fn last_report(side: Side, migration: &Migration) -> Option<Report> {
    let status = migration.status.as_ref()?;
    match side {
        Side::Source => status.source_report.clone(),
        Side::Target => status.target_report.clone(),
    }
}

/// Has the daemon do what the Migration says until it has ended, and says what the daemon says.
pub async fn serve(agent: Agent, side: Side, mut changes: Receiver<Migration>) {
    let migration = changes.borrow().clone();
    let last = last_report(side, &migration);
    let refused = last.as_ref().filter(|last| last.phase == "refused");
    let mut serving = Serving {
        id: daemon_id(&migration.uid().unwrap_or_default()),
        besides: Besides {
            prepared: None,
            expected: None,
            refused: refused.and_then(|last| last.failure.clone()),
        },
        reported: last.map(|last| (last, Instant::now())),
        passing: None,
        watching: None,
        status: None,
        agent,
        side,
    };
    loop {
        let migration = changes.borrow_and_update().clone();
        let done = serving.look(&migration).await;
        match done {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                warn!(migration = %migration.name_any(), ?side, "{error}");
                sleep(RETRY).await;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            () = serving.wait() => {}
        }
    }
}

struct Serving {
    agent: Agent,
    side: Side,
    id: String,
    besides: Besides,
    /// What was last said, and when.
    reported: Option<(Report, Instant)>,
    /// Since when it is in a phase that passes.
    passing: Option<Instant>,
    watching: Option<Streaming<schema::Status>>,
    status: Option<schema::Status>,
}

impl Serving {
    /// Calls and reports. True when nothing is left to be done.
    async fn look(&mut self, migration: &Migration) -> Result<bool, String> {
        let orders = orders(migration);
        self.refresh().await?;
        self.settle(migration)?;
        let known = report::known(self.status.as_ref(), &self.besides);
        let mut called = Ok(());
        if let Some(call) = orders::next(self.side, &orders, known.as_ref()) {
            let (name, side) = (migration.name_any(), self.side);
            info!(migration = %name, ?side, ?call, "calling the daemon");
            called = self.call(migration, &call).await;
            let metrics = &self.agent.metrics;
            metrics.count(&metrics::CALLS, call.name());
            if called.is_err() {
                metrics.count(&metrics::CALLS_FAILED, call.name());
            }
            self.refresh().await?;
            // It may have ended by that, and then its address is given back before it is said.
            self.settle(migration)?;
        }
        let given_up = matches!(orders.step, Step::Aborting | Step::Ended);
        let now = Timestamp::now().as_second();
        let report = report::report(self.status.as_ref(), &self.besides, given_up, now);
        let over = orders.step == Step::Ended && report.is_final;
        // Also where the call failed: the daemon is there, and how it stands is known.
        if self.is_due(&report, orders.proceed) {
            let said = self.say(migration, &report).await;
            let counted = match said {
                Ok(()) => &metrics::REPORTS,
                Err(_) => &metrics::REPORTS_FAILED,
            };
            self.agent.metrics.count(counted, "");
            said?;
            self.reported = Some((report, Instant::now()));
        }
        called.map(|()| over)
    }

    /// Has the pod's address be where it belongs, as things stand.
    fn settle(&mut self, migration: &Migration) -> Result<(), String> {
        let place = address::Place {
            side: self.side,
            namespace: &migration.namespace().unwrap_or_default(),
            old_uid: &migration.spec.pod.uid,
            record: &observe::record(migration),
            id: &self.id,
            given_back: self
                .status
                .as_ref()
                .is_some_and(|status| status.r#final && !status.moved),
        };
        let prepared = place.settle(&self.agent.folders);
        self.besides.prepared = prepared.map_err(|error| format!("the pod's address: {error}"))?;
        Ok(())
    }

    /// Reads how it stands, and sees to it that changes come by themselves.
    async fn refresh(&mut self) -> Result<(), String> {
        if self.watching.is_some() {
            return Ok(());
        }
        let daemon = &self.agent.daemon;
        self.status = daemon
            .show(&self.id)
            .await
            .map_err(|error| error.to_string())?;
        if self.status.as_ref().is_some_and(|status| !status.r#final) {
            self.watching = daemon.watch(&self.id).await.ok();
        }
        Ok(())
    }

    /// Until there is something to look at.
    async fn wait(&mut self) {
        let Some(watching) = &mut self.watching else {
            return sleep(POLL).await;
        };
        match timeout(LOOK_AGAIN, watching.message()).await {
            Ok(Ok(Some(status))) => self.status = Some(status),
            // It has ended, or the daemon has gone: it is asked.
            Ok(Ok(None) | Err(_)) => self.watching = None,
            Err(_) => {}
        }
    }

    async fn call(&mut self, migration: &Migration, call: &Call) -> Result<(), String> {
        let daemon = self.agent.daemon.clone();
        let called = match call {
            Call::Migrate => daemon.migrate(self.request(migration).await?).await,
            Call::Expect { pod_uid } => daemon.expect(&self.id, pod_uid).await,
            Call::Proceed => daemon.proceed(&self.id).await,
            Call::Abort => daemon.abort(&self.id).await,
            Call::Resolve => {
                let fenced = match self.side {
                    Side::Source => schema::Side::Target,
                    Side::Target => schema::Side::Source,
                };
                daemon.resolve(&self.id, fenced).await
            }
        };
        match (call, called) {
            (Call::Expect { pod_uid }, Ok(())) => self.besides.expected = Some(pod_uid.clone()),
            // Nothing has begun, and nothing will.
            (Call::Migrate, Err(Error::Refused(why))) => self.besides.refused = Some(why),
            (_, Ok(()) | Err(Error::Unknown)) => {}
            (_, Err(error)) => return Err(format!("{call:?}: {error}")),
        }
        // What it brought about is asked for: a stream may bring it later.
        self.watching = None;
        Ok(())
    }

    async fn request(&self, migration: &Migration) -> Result<schema::MigrateRequest, String> {
        let record = observe::record(migration);
        let target = record.target.unwrap_or_default();
        let nodes: Api<Node> = Api::all(self.agent.client.clone());
        let node = nodes
            .get_opt(&target)
            .await
            .map_err(|error| error.to_string())?;
        let named = node.and_then(|node| node.annotations().get(DAEMON).cloned());
        let limits = migration
            .status
            .as_ref()
            .and_then(|status| status.budget.clone());
        let limits = limits.unwrap_or_default();
        let micros = |millis: Option<i64>| millis.and_then(|one| u64::try_from(one * 1000).ok());
        let stop = migration.spec.mode == crate::migration::Mode::StopAndCopy;
        Ok(schema::MigrateRequest {
            workload: format!("pod/{}", migration.spec.pod.uid),
            to: named.unwrap_or(target),
            downtime_max_us: micros(limits.downtime_ms),
            timeout_us: micros(limits.move_ms),
            frozen_max_us: micros(limits.frozen_ms),
            rounds_max: stop.then_some(1),
            force_eager: stop,
            id: Some(self.id.clone()),
            hold: true,
            ..schema::MigrateRequest::default()
        })
    }

    /// News at once, figures every now and then, and that nothing has changed too. That it stands
    /// still is news only if it lasts: to say it costs processors that the hand-over needs, here
    /// and where it is heard.
    fn is_due(&mut self, report: &Report, proceed: bool) -> bool {
        let passes = report::is_passing(report) || report::is_about_to_pass(report, proceed);
        if !passes {
            self.passing = None;
        } else if self.passing.get_or_insert_with(Instant::now).elapsed() < PASSING {
            return false;
        }
        let Some((last, at)) = &self.reported else {
            return true;
        };
        let figures = Report {
            at: report.at,
            ..last.clone()
        } != *report;
        report::is_news(report, last)
            || (figures && FIGURES <= at.elapsed())
            || (!report.is_final && STILL_THERE <= at.elapsed())
    }

    async fn say(&self, migration: &Migration, report: &Report) -> Result<(), String> {
        let (field, manager) = match self.side {
            Side::Source => ("sourceReport", manager::SOURCE),
            Side::Target => ("targetReport", manager::TARGET),
        };
        let name = migration.name_any();
        let patch = json!({
            "apiVersion": Migration::api_version(&()),
            "kind": Migration::kind(&()),
            "metadata": {"name": name, "uid": migration.metadata.uid},
            "status": {field: report},
        });
        let namespace = migration.namespace().unwrap_or_default();
        let api: Api<Migration> = Api::namespaced(self.agent.client.clone(), &namespace);
        let (parameters, patch) = (PatchParams::apply(manager).force(), Patch::Apply(patch));
        let said = api.patch_status(&name, &parameters, &patch);
        match timeout(SAY_TIME, said).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("reporting: {error}")),
            Err(_) => Err("reporting: the API server does not answer".to_owned()),
        }
    }
}

fn orders(migration: &Migration) -> Orders {
    let record = observe::record(migration);
    Orders {
        step: record.step,
        proceed: record.proceed,
        fenced: record.fenced,
        new_uid: record.new_uid,
    }
}

/// How often the daemon is asked for what it does not have yet.
const POLL: Duration = Duration::from_millis(250);
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(1);
/// With [`LOOK_AGAIN`] it is said within two seconds.
const PASSING: Duration = Duration::from_millis(750);
const FIGURES: Duration = Duration::from_secs(1);
const STILL_THERE: Duration = Duration::from_secs(10);
const SAY_TIME: Duration = Duration::from_secs(5);
