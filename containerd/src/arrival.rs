//! A container that comes: made, restored and started, or undone.
//!
//! ```text
//! order ─► container ─► snapshot ─► task: shim ─► pageferry-oci ─► runc restore ─► …
//!                                     start ◄─ (the restore is over, and the container runs)
//!                                     labels as they were; no order
//! ```
//!
//! Invariants: until the labels are put back the container has the migration in one, and what has
//! another in it is never removed; the order is the first that is made, and the last that goes; an
//! attempt and its undoing are never at work at the same time, and none begins when it is undone:
//! the file is locked by whoever does either, and goes with what it describes.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pageferry_oci::{Order, OrderError, Orders};
use serde::{Deserialize, Serialize};

use crate::client::{Client, ClientError, Container};
use crate::labels::{self, MIGRATION};
use crate::leave;

/// What comes, and how; in a file of the migration's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arrival {
    /// Where containerd listens.
    pub socket: PathBuf,
    /// Its namespace.
    pub namespace: String,
    /// The migration.
    pub migration: String,
    /// What the shim is to start as the runtime.
    pub wrapper: PathBuf,
    /// The container, encoded.
    pub container: Vec<u8>,
    /// What its snapshot is to be on.
    pub parent: String,
    /// All of the `PATH` of the runtime.
    pub gate: PathBuf,
    /// What the runtime reads of images by itself.
    pub images: PathBuf,
    /// For its logs.
    pub work: PathBuf,
    /// The folder in which it has the container.
    pub state: PathBuf,
}

/// Why a container does not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot say what the container is to be restored from: {0}")]
    Order(#[from] OrderError),
    #[error("the container cannot be read")]
    Container(#[from] prost::DecodeError),
    #[error(
        "process {pid} runs in the container, as {state} says, and containerd does not know of it"
    )]
    Lost { pid: i32, state: PathBuf },
    #[error("what has come with the migration has run here, or may have, and is not made again")]
    HasRun,
    #[error("{path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What is known of a container that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It has not run.
    Waits,
    /// It has run here.
    Ran,
    /// It may have run here, and has ended; or may run.
    MayHaveRun,
}

/// One that nobody else works at.
#[derive(Debug)]
pub struct Held {
    arrival: Arrival,
    fate: Fate,
    path: PathBuf,
    _lock: File,
}

/// What the runtime has written of a container that runs.
#[derive(Debug, Deserialize)]
pub(crate) struct Root {
    init_process_pid: i32,
    init_process_start: u64,
}

impl Root {
    /// What it has written into its folder of a container.
    pub(crate) fn read(state: &Path) -> Option<Self> {
        let text = fs::read(state.join("state.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    pub(crate) fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.init_process_pid));
        let stat = stat.unwrap_or_default();
        // The name may have anything in it; the state is the first behind it, the start the 20th.
        let mut rest = stat
            .rsplit_once(") ")
            .map_or("", |(_, rest)| rest)
            .split(' ');
        let is_alive = rest.next().is_some_and(|state| !matches!(state, "Z" | "X"));
        let started = rest.nth(18).and_then(|start| start.parse().ok());
        is_alive && started == Some(self.init_process_start)
    }
}

/// What comes, in a migration's folder.
const FILE: &str = "arrival.json";

/// Files beside it that say more of what has become of it, the first one counts.
const FATES: [(&str, Fate); 2] = [
    ("arrival.ran", Fate::Ran),
    ("arrival.may-have-run", Fate::MayHaveRun),
];

/// How long an attempt may take to end whose pager is gone.
const LOCK_MAX: Duration = Duration::from_secs(12);

/// How often it is looked whether it has.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// How long containerd may take to settle what a command that died has begun.
const SETTLE_MAX: Duration = Duration::from_secs(15);

impl Arrival {
    /// Keeps that of a migration's folder in another one, too: it is the same file.
    ///
    /// # Errors
    /// When it is not kept.
    pub fn keep(folder: &Path, other: &Path) -> io::Result<()> {
        fs::create_dir_all(other)?;
        // Before anybody reads it there.
        for (name, _) in FATES.iter().filter(|(name, _)| folder.join(name).exists()) {
            fs::write(other.join(name), "")?;
        }
        match fs::hard_link(folder.join(FILE), other.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    /// Says in a migration's folder that what came with it has run, or may have; nothing where
    /// nothing came, or has come to its end.
    ///
    /// # Errors
    /// When it is not said.
    pub fn mark(folder: &Path, fate: Fate) -> io::Result<()> {
        let file = FATES.iter().find(|(_, known)| *known == fate);
        match file {
            Some((name, _)) if folder.join(FILE).exists() => fs::write(folder.join(name), ""),
            _ => Ok(()),
        }
    }

    /// Takes back that what came with it may have run: it has not, and never will.
    ///
    /// # Errors
    /// When it is said yet.
    pub fn never_ran(folder: &Path) -> io::Result<()> {
        let said = FATES.iter().filter(|(_, fate)| *fate == Fate::MayHaveRun);
        said.map(|(name, _)| fs::remove_file(folder.join(name)))
            .try_for_each(|removed| match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            })
    }

    /// Writes it into a migration's folder.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::write(folder.join(FILE), serde_json::to_vec(self)?)
    }

    /// Reads it from a migration's folder, when nobody else works at it; none if there is none.
    ///
    /// # Errors
    /// [`ArrivalError::File`], also when somebody else is not done.
    pub fn hold(folder: &Path) -> Result<Option<Held>, ArrivalError> {
        let path = folder.join(FILE);
        let failed = |source| ArrivalError::File {
            path: path.clone(),
            source,
        };
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed)?,
        };
        let deadline = Instant::now() + LOCK_MAX;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        // Whoever had it may have undone it.
        if !path.exists() {
            return Ok(None);
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed)?;
        let arrival = serde_json::from_slice(&text);
        Ok(Some(Held {
            fate: fate_in(folder),
            arrival: arrival.map_err(|error| failed(error.into()))?,
            path,
            _lock: file,
        }))
    }
}

impl Held {
    /// Has containerd make the container, whose runtime restores it, and start it.
    ///
    /// # Errors
    /// Why not; nothing of it is left then, or it may have run meanwhile, or [`Held::settle`] is to
    /// be tried again.
    pub async fn come(&self) -> Result<(), ArrivalError> {
        let Arrival {
            socket, namespace, ..
        } = &self.arrival;
        let client = Client::connect(socket, namespace).await?;
        let container = Container::decode(&self.arrival.container)?;
        let id = container.id().to_owned();
        if self.fate_now() != Fate::Waits {
            return Err(ArrivalError::HasRun);
        }
        // What an attempt before this one has left.
        self.undo(&client, &id).await?;
        if let Err(error) = self.make(&client, container).await {
            // It is let go while containerd makes it. What it has written then is settled by
            // whoever let it go, and knows what has become of it.
            if self.fate_now() == Fate::Waits {
                self.undo(&client, &id).await?;
            }
            return Err(error);
        }
        self.finish(&client, &id).await
    }

    async fn make(&self, client: &Client, container: Container) -> Result<(), ArrivalError> {
        let arrival = &self.arrival;
        let mut container = container.with_program(&arrival.wrapper);
        let id = container.id().to_owned();
        let on_the_way = &mut container.0.labels;
        *on_the_way = labels::aside(on_the_way);
        on_the_way.insert(MIGRATION.to_owned(), arrival.migration.clone());
        let order = Order {
            migration: arrival.migration.clone(),
            gate: arrival.gate.clone(),
            images: arrival.images.clone(),
            work: arrival.work.clone(),
            is_ahead: false,
        };
        Orders::of_node().write(&arrival.namespace, &id, &order)?;
        client.create(&container).await?;
        // containerd keeps it, since the container names it.
        let prepared = client.prepare(container.snapshot(), &arrival.parent).await;
        let mounts = match prepared {
            Err(error) if error.is_taken() => {
                // It is another's, and would be removed with the container.
                client.delete(&id).await?;
                return Err(error.into());
            }
            prepared => prepared?,
        };
        client.create_task(&container, mounts).await?;
        Ok(())
    }

    /// It runs, and containerd has yet to hear of it.
    async fn finish(&self, client: &Client, id: &str) -> Result<(), ArrivalError> {
        // Its runtime has nothing to do.
        client.start_task(id).await?;
        labels::put_back(client, id).await?;
        self.forget(id)
    }

    /// Brings an attempt that did not come to its end to one: a container that runs is
    /// containerd's, and of one that has not run nothing is left. One that may have run, and has
    /// ended, stays, with what it has written.
    ///
    /// # Errors
    /// Why something stays as it was; this may be tried again then.
    pub async fn settle(&self) -> Result<(), ArrivalError> {
        let Arrival {
            socket, namespace, ..
        } = &self.arrival;
        let client = Client::connect(socket, namespace).await?;
        let id = Container::decode(&self.arrival.container)?.id().to_owned();
        let settled = tokio::time::timeout(SETTLE_MAX, self.bring_to_an_end(&client, &id)).await;
        let late = |_| ClientError::Late { limit: SETTLE_MAX };
        settled.map_err(late)?
    }

    async fn bring_to_an_end(&self, client: &Client, id: &str) -> Result<(), ArrivalError> {
        if !self.is_ours(client, id).await? {
            return self.forget(id);
        }
        match client.task(id).await? {
            Some(task) if task.is_running => {
                labels::put_back(client, id).await?;
                self.forget(id)
            }
            Some(task) if task.is_created && Orders::of_node().is_taken(self.namespace(), id) => {
                self.finish(client, id).await
            }
            _ => {
                match self.fate {
                    Fate::Waits => self.undo(client, id).await?,
                    // What it has written is nobody's to remove.
                    Fate::Ran => {
                        self.check_ended()?;
                        labels::put_back(client, id).await?;
                    }
                    Fate::MayHaveRun => {
                        self.check_ended()?;
                        labels::let_go(client, id).await?;
                    }
                }
                self.forget(id)
            }
        }
    }

    /// Removes what there is of the container, unless it runs, or is another's.
    async fn undo(&self, client: &Client, id: &str) -> Result<(), ArrivalError> {
        if self.is_ours(client, id).await? {
            self.check_ended()?;
            leave::remove(client, id).await?;
        }
        let migration = &self.arrival.migration;
        Ok(Orders::of_node().clear(self.namespace(), id, migration)?)
    }

    /// Refuses to remove what a process runs in: containerd may have forgotten its task.
    fn check_ended(&self) -> Result<(), ArrivalError> {
        let state = self.arrival.state.join("state.json");
        match Root::read(&self.arrival.state) {
            Some(root) if root.runs() => Err(ArrivalError::Lost {
                pid: root.init_process_pid,
                state,
            }),
            _ => Ok(()),
        }
    }

    /// Whether containerd has a container that has come with this migration, and not yet to its
    /// end.
    async fn is_ours(&self, client: &Client, id: &str) -> Result<bool, ArrivalError> {
        let container = client.container(id).await?;
        let came = container.and_then(|container| container.labels().get(MIGRATION).cloned());
        Ok(came.as_ref() == Some(&self.arrival.migration))
    }

    /// What is said of it by now.
    fn fate_now(&self) -> Fate {
        self.path.parent().map_or(self.fate, fate_in)
    }

    /// There is nothing to be settled any more.
    fn forget(&self, id: &str) -> Result<(), ArrivalError> {
        let migration = &self.arrival.migration;
        Orders::of_node().clear(self.namespace(), id, migration)?;
        fs::remove_file(&self.path).map_err(|source| ArrivalError::File {
            path: self.path.clone(),
            source,
        })?;
        for (name, _) in FATES {
            // There is nothing any more that it is said of.
            drop(fs::remove_file(self.path.with_file_name(name)));
        }
        Ok(())
    }

    fn namespace(&self) -> &str {
        &self.arrival.namespace
    }
}

/// What a migration's folder says of what came.
fn fate_in(folder: &Path) -> Fate {
    let mut said = FATES.iter().filter(|(name, _)| folder.join(name).exists());
    said.next().map_or(Fate::Waits, |(_, fate)| *fate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(folder: &Path) -> Arrival {
        Arrival {
            socket: folder.join("none"),
            namespace: "default".to_owned(),
            migration: "m".to_owned(),
            wrapper: "/w".into(),
            container: Vec::new(),
            parent: String::new(),
            gate: "/g".into(),
            images: "/i".into(),
            work: "/w".into(),
            state: folder.join("state"),
        }
    }

    #[test]
    fn an_arrival_is_held_by_one_and_its_link_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (here, there) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir(&here).unwrap();
        assert!(Arrival::hold(&here).unwrap().is_none());
        arrival(&here).write(&here).unwrap();
        Arrival::keep(&here, &there).unwrap();
        Arrival::keep(&here, &there).unwrap();
        let held = Arrival::hold(&here).unwrap().unwrap();
        let other = File::open(there.join(FILE)).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        other.try_lock().unwrap();
    }

    #[test]
    fn what_has_become_of_it_is_said_where_it_is_kept_too() {
        let folder = tempfile::tempdir().unwrap();
        let (here, there) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir(&here).unwrap();
        // Of nothing there is nothing to say.
        Arrival::mark(&here, Fate::Ran).unwrap();
        assert_eq!(fs::read_dir(&here).unwrap().count(), 0);
        arrival(&here).write(&here).unwrap();
        let fate = |folder: &Path| Arrival::hold(folder).unwrap().unwrap().fate;
        assert_eq!(fate(&here), Fate::Waits);
        Arrival::mark(&here, Fate::MayHaveRun).unwrap();
        assert_eq!(fate(&here), Fate::MayHaveRun);
        Arrival::mark(&here, Fate::Ran).unwrap();
        Arrival::keep(&here, &there).unwrap();
        assert_eq!(fate(&there), Fate::Ran);
        let held = Arrival::hold(&there).unwrap().unwrap();
        held.forget("web").unwrap();
        assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    }

    #[test]
    fn what_is_said_while_it_is_made_counts_and_may_be_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // Of nothing there is nothing to take back.
        Arrival::never_ran(folder).unwrap();
        arrival(folder).write(folder).unwrap();
        let held = Arrival::hold(folder).unwrap().unwrap();
        assert_eq!(held.fate_now(), Fate::Waits);
        Arrival::mark(folder, Fate::MayHaveRun).unwrap();
        assert_eq!(
            (held.fate, held.fate_now()),
            (Fate::Waits, Fate::MayHaveRun)
        );
        Arrival::never_ran(folder).unwrap();
        assert_eq!(held.fate_now(), Fate::Waits);
        Arrival::mark(folder, Fate::Ran).unwrap();
        // What has run has run.
        Arrival::mark(folder, Fate::MayHaveRun).unwrap();
        Arrival::never_ran(folder).unwrap();
        assert_eq!(held.fate_now(), Fate::Ran);
    }

    #[test]
    fn what_runs_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let arrival = arrival(folder.path());
        arrival.write(folder.path()).unwrap();
        fs::create_dir(&arrival.state).unwrap();
        let held = Arrival::hold(folder.path()).unwrap().unwrap();
        held.check_ended().unwrap();
        let own = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let start: u64 = stat
            .rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .nth(19)
            .unwrap()
            .parse()
            .unwrap();
        let write = |start: u64| {
            let text = format!(r#"{{"init_process_pid": {own}, "init_process_start": {start}}}"#);
            fs::write(arrival.state.join("state.json"), text).unwrap();
        };
        write(start);
        assert!(matches!(held.check_ended(), Err(ArrivalError::Lost { .. })));
        // Another process of the same number.
        write(start + 1);
        held.check_ended().unwrap();
    }
}
