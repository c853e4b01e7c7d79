//! A container of a pod that comes: Kubernetes makes it, and its runtime, which waits, is told what
//! to restore.
//!
//! ```text
//! order ─► (the runtime that waits) ─► restore ─► … ─► containerd says that it runs; no order
//! ```
//!
//! Invariants: nothing of the container is made or removed here; before it may run it is marked as
//! going, durably, and as one that ran only when it has; what has not come, or may have run, is
//! refused whoever comes to its place later. The order stays for as long as containerd may have yet
//! to start what was restored: a start that the runtime did would fail, and containerd would kill
//! what runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pageferry_oci::{Order, OrderError, Orders, Place, Places};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use crate::arrival::Root;
use crate::client::{Client, ClientError};

/// What comes, and how; in a file of the migration's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodArrival {
    /// Where containerd listens.
    pub socket: PathBuf,
    /// Which container of which pod.
    pub place: Place,
    /// Its runtime, once that has come.
    pub runtime: Option<PodRuntime>,
}

/// The runtime of a container of a pod, which waits for its order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRuntime {
    /// The name space of containerd.
    pub namespace: String,
    /// What containerd calls the container.
    pub id: String,
    /// The process.
    pub pid: i32,
    /// The folder in which it has the container.
    pub state: PathBuf,
    /// What it is to do.
    pub order: PodOrder,
}

/// What a runtime is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodOrder {
    /// The migration.
    pub migration: String,
    /// All of the `PATH` of the runtime.
    pub gate: PathBuf,
    /// What the runtime reads of images by itself.
    pub images: PathBuf,
    /// For its logs.
    pub work: PathBuf,
    /// Its engine goes on before it restores.
    #[serde(default)]
    pub is_ahead: bool,
}

/// Why a container of a pod does not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PodError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot say what the container is to be restored from: {0}")]
    Order(#[from] OrderError),
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the runtime of the container {id} has not come to wait")]
    NoRuntime { id: String },
    #[error("the runtime of the container {id} has ended, and nothing runs in it")]
    Ended { id: String },
    #[error("containerd does not say that the container {id} runs, whose runtime has ended")]
    NotStarted { id: String },
}

impl PodError {
    /// A mark, or a refusal, could not be written.
    pub fn marking(source: io::Error) -> Self {
        Self::File {
            path: "the mark of the container of a pod".into(),
            source,
        }
    }
}

/// What comes, in a migration's folder.
const FILE: &str = "pod.json";

/// How often it is looked how far it is.
const POLL: Duration = Duration::from_millis(5);

/// How long containerd may take to start a container that runs.
const START_MAX: Duration = Duration::from_secs(30);

impl PodArrival {
    /// Writes it into a migration's folder.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let new = folder.join(format!("{FILE}.new"));
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, folder.join(FILE))
    }

    /// Reads it from a migration's folder; none if there is none.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>, PodError> {
        let path = folder.join(FILE);
        let failed = |source| PodError::File {
            path: path.clone(),
            source,
        };
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
            Ok(text) => {
                let read = serde_json::from_slice(&text);
                read.map(Some).map_err(|error| failed(error.into()))
            }
        }
    }

    /// Has the runtime restore the container, and waits until containerd knows that it runs.
    ///
    /// # Errors
    /// Why it does not. The order is left unless nothing runs: [`PodArrival::refuse`] takes it
    /// away.
    pub async fn come(&self) -> Result<(), PodError> {
        self.come_by(&Orders::of_node(), START_MAX).await
    }

    async fn come_by(&self, orders: &Orders, limit: Duration) -> Result<(), PodError> {
        let runtime = self.runtime.as_ref();
        let runtime = runtime.ok_or_else(|| PodError::NoRuntime {
            id: self.place.container.clone(),
        })?;
        let PodRuntime { namespace, id, .. } = runtime;
        orders.write(namespace, id, &runtime.order())?;
        let came = runtime.runs(orders, &self.socket, limit).await;
        if let Ok(()) | Err(PodError::Ended { .. }) = came {
            // Nobody is to take it any more, or to take a start for none.
            orders.clear(namespace, id, &runtime.order.migration)?;
        }
        came
    }

    /// It is about to run: until it is known that it has, nothing is created at its place. Durable
    /// when this returns.
    ///
    /// # Errors
    /// When the next start of the container might wait for a restore.
    pub fn mark_going(&self) -> io::Result<()> {
        Places::of_node().mark_going(&self.place)
    }

    /// It has run: from here on the place is one like others. Durable when this returns.
    ///
    /// # Errors
    /// When nothing might be created there.
    pub fn mark_ran(&self) -> io::Result<()> {
        Places::of_node().mark_ran(&self.place)
    }

    /// It may have run, and never will again; whoever comes to its place hears why. The mark stays.
    /// Nothing changes for one that is known to have run.
    ///
    /// # Errors
    /// When somebody might wait for it yet.
    pub fn lose(&self, why: &str) -> io::Result<()> {
        Places::of_node().refuse(&self.place, why)
    }

    /// It does not come, for this reason, and has not run.
    ///
    /// # Errors
    /// When somebody might wait for it yet.
    pub fn refuse(&self, why: &str) -> Result<(), PodError> {
        let places = Places::of_node();
        let failed = |source| PodError::File {
            path: self.place.pod.clone().into(),
            source,
        };
        places.refuse(&self.place, why).map_err(failed)?;
        places.unmark(&self.place).map_err(failed)?;
        match &self.runtime {
            Some(runtime) => {
                let PodRuntime { namespace, id, .. } = runtime;
                let migration = &runtime.order.migration;
                Ok(Orders::of_node().clear(namespace, id, migration)?)
            }
            None => Ok(()),
        }
    }
}

impl PodRuntime {
    fn order(&self) -> Order {
        Order {
            migration: self.order.migration.clone(),
            gate: self.order.gate.clone(),
            images: self.order.images.clone(),
            work: self.order.work.clone(),
            is_ahead: self.order.is_ahead,
        }
    }

    /// Waits until the container runs, and for `limit` then until containerd knows it, which may
    /// be busy, or be started again.
    async fn runs(&self, orders: &Orders, socket: &Path, limit: Duration) -> Result<(), PodError> {
        // Its number means another process only when it has been given away once around.
        let is_there = |pid: i32| Path::new(&format!("/proc/{pid}")).exists();
        while is_there(self.pid) {
            sleep(POLL).await;
        }
        // If it is ahead the engine has gone on, and another one restores.
        let held = orders.held(&self.namespace, &self.id)?;
        while held.is_some_and(|held| is_there(held.runtime)) {
            sleep(POLL).await;
        }
        let id = || self.id.clone();
        let began = Instant::now();
        let mut client = None;
        loop {
            if !Root::read(&self.state).is_some_and(|root| root.runs()) {
                return Err(PodError::Ended { id: id() });
            }
            let left = limit.saturating_sub(began.elapsed());
            let asked = timeout(left, self.is_started(socket, &mut client)).await;
            let asked = asked.unwrap_or(Err(ClientError::Late { limit }));
            if let Ok(true) = asked {
                return Ok(());
            }
            if limit <= began.elapsed() {
                asked?;
                return Err(PodError::NotStarted { id: id() });
            }
            if asked.is_err() {
                client = None;
            }
            sleep(POLL).await;
        }
    }

    /// Whether containerd says that the container runs; connects if there is no connection.
    async fn is_started(
        &self,
        socket: &Path,
        client: &mut Option<Client>,
    ) -> Result<bool, ClientError> {
        let client = match client {
            Some(client) => client,
            None => client.insert(Client::connect(socket, &self.namespace).await?),
        };
        let task = client.task(&self.id).await?;
        Ok(task.is_some_and(|task| task.is_running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that waits for its order, whose runtime has ended already.
    fn arrival(folder: &Path) -> PodArrival {
        PodArrival {
            socket: folder.join("nobody"),
            place: Place {
                pod: "u-1".to_owned(),
                container: "web".to_owned(),
            },
            runtime: Some(PodRuntime {
                namespace: "k8s.io".to_owned(),
                id: "0a".to_owned(),
                // The greatest number that a process may have is less.
                pid: i32::MAX,
                state: folder.to_owned(),
                order: PodOrder {
                    migration: "m".to_owned(),
                    gate: "/g".into(),
                    images: "/i".into(),
                    work: "/w".into(),
                    is_ahead: false,
                },
            }),
        }
    }

    #[tokio::test]
    async fn the_order_stays_for_as_long_as_containerd_may_start_what_runs() {
        let folder = tempfile::tempdir().unwrap();
        let (orders, limit) = (Orders::at(folder.path().join("orders")), 4 * POLL);
        let arrival = arrival(folder.path());
        let ended = arrival.come_by(&orders, limit).await.unwrap_err();
        assert!(matches!(ended, PodError::Ended { .. }), "{ended}");
        assert!(!orders.has("k8s.io", "0a"));
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (_, behind) = stat.rsplit_once(") ").unwrap();
        let started: u64 = behind.split(' ').nth(19).unwrap().parse().unwrap();
        let state = serde_json::json!({
            "init_process_pid": std::process::id(),
            "init_process_start": started,
        });
        fs::write(folder.path().join("state.json"), state.to_string()).unwrap();
        let began = Instant::now();
        let late = arrival.come_by(&orders, limit).await.unwrap_err();
        assert!(matches!(late, PodError::Client(_)), "{late}");
        // It was tried until then.
        assert!(limit <= began.elapsed());
        assert!(orders.has("k8s.io", "0a"));
    }

    #[test]
    fn what_comes_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert!(PodArrival::read(folder.path()).unwrap().is_none());
        let arrival = PodArrival {
            socket: "/s".into(),
            place: Place {
                pod: "u-1".to_owned(),
                container: "web".to_owned(),
            },
            runtime: None,
        };
        arrival.write(folder.path()).unwrap();
        let read = PodArrival::read(folder.path()).unwrap().unwrap();
        assert_eq!(read.place, arrival.place);
        fs::write(folder.path().join(FILE), "half").unwrap();
        assert!(PodArrival::read(folder.path()).is_err());
    }
}
