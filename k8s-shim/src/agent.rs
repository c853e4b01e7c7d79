//! The agent of a node: it has the local daemon do what Migrations say, and says in them what the
//! daemon says.
//!
//! It decides nothing: [`orders::next`] says what to ask the daemon for, from what the controller
//! has written down, and every call may be repeated. It believes nothing of the peer, and reads
//! nothing of a checkpoint. Absent: whether anything may move, and pods.

mod address;
pub mod daemon;
pub mod node;
pub mod orders;
mod report;
mod serve;

use std::collections::BTreeMap;

use futures_util::{Stream, StreamExt, stream};
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Client, ResourceExt};
use tokio::sync::watch as channel;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use crate::metrics::Metrics;
use crate::migration::Migration;
use crate::plan::Side;
use daemon::Daemon;
use pageferry_ipam::Folders;

/// What an agent is.
#[derive(Clone)]
pub struct Agent {
    pub client: Client,
    pub metrics: Metrics,
    pub daemon: Daemon,
    /// Where the node's program for addresses looks.
    pub folders: Folders,
    /// Its node, as the cluster calls it.
    pub node: String,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Agent");
        shown.field("node", &self.node).finish_non_exhaustive()
    }
}

/// A Migration, and at which of its sides this node is.
type Key = (String, String, Side);

struct Served {
    changes: channel::Sender<Migration>,
    task: AbortHandle,
}

/// Serves what concerns the node, for ever.
pub async fn run(agent: Agent) {
    let sides = [Side::Source, Side::Target];
    let watches = sides.map(|side| events(&agent, side).boxed());
    let mut events = stream::select_all(watches);
    let mut served: BTreeMap<Key, Served> = BTreeMap::new();
    while let Some((side, event)) = events.next().await {
        match event {
            Ok(Event::Apply(migration) | Event::InitApply(migration)) => {
                apply(&agent, side, migration, &mut served);
            }
            Ok(Event::Delete(migration)) => {
                if let Some(gone) = served.remove(&key(side, &migration)) {
                    gone.task.abort();
                }
            }
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => warn!(%error, ?side, "watching Migrations"),
        }
        served.retain(|_, one| !one.task.is_finished());
    }
}

fn events(
    agent: &Agent,
    side: Side,
) -> impl Stream<Item = (Side, Result<Event<Migration>, watcher::Error>)> + use<> {
    let field = match side {
        Side::Source => "source",
        Side::Target => "target",
    };
    let config = watcher::Config::default().fields(&format!("status.{field}={}", agent.node));
    let migrations: Api<Migration> = Api::all(agent.client.clone());
    let events = watch(migrations, config).default_backoff();
    events.map(move |event| (side, event))
}

fn apply(agent: &Agent, side: Side, migration: Migration, served: &mut BTreeMap<Key, Served>) {
    let key = key(side, &migration);
    let same = served.get(&key).filter(|one| {
        let known = one.changes.borrow().uid();
        known == migration.uid() && !one.task.is_finished()
    });
    if let Some(one) = same {
        one.changes.send_replace(migration);
        return;
    }
    if let Some(old) = served.remove(&key) {
        old.task.abort();
    }
    if serve::is_over(side, &migration) {
        return;
    }
    info!(migration = key.1, ?side, "concerns this node");
    let (changes, receiver) = channel::channel(migration);
    let task = tokio::spawn(serve::serve(agent.clone(), side, receiver)).abort_handle();
    served.insert(key, Served { changes, task });
}

fn key(side: Side, migration: &Migration) -> Key {
    (
        migration.namespace().unwrap_or_default(),
        migration.name_any(),
        side,
    )
}
