//! What containerd has yet to hear of containers at their source: it may be away when one has left,
//! or stays after all.
//!
//! Invariants: nothing is done to a container that does not have the label of one that leaves;
//! nothing that is owed of an earlier move is done from when another one begins ([`forget`]). The
//! files do not outlive a boot: a container that has left stays listed then, and is not started.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pageferry_containerd::{Client, ClientError, SOCKET, labels, leave};
use pageferry_oci::Orders;

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// It stays, and is started again as before.
    Back,
    /// It has left, and its entries go.
    Gone,
}

/// Held by whoever tells something.
static TELLING: Mutex<()> = Mutex::new(());

/// How long containerd may take to answer.
const BACK_MAX: Duration = Duration::from_secs(10);

/// How long it may take to delete what has moved away.
const GONE_MAX: Duration = Duration::from_secs(20);

impl Owed {
    const ALL: [Self; 2] = [Self::Back, Self::Gone];

    const fn name(self) -> &'static str {
        match self {
            Self::Back => "back",
            Self::Gone => "gone",
        }
    }

    fn tell(self, (namespace, id): (&str, &str)) -> Result<(), ClientError> {
        let limit = match self {
            Self::Back => BACK_MAX,
            Self::Gone => GONE_MAX,
        };
        let work = async |client: Client| {
            let container = client.container(id).await?;
            match self {
                _ if !container.as_ref().is_some_and(labels::leaves) => Ok(()),
                Self::Back => labels::put_back(&client, id).await,
                Self::Gone => leave::remove(&client, id).await,
            }
        };
        pageferry_containerd::with((SOCKET.as_ref(), namespace), limit, work)
    }
}

/// Tells containerd, now or when it can be told. Blocks.
pub fn tell(owed: Owed, (namespace, id): (&str, &str)) {
    let _telling = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
    let Err(error) = owed.tell((namespace, id)) else {
        return;
    };
    tracing::warn!(container = id, namespace, %error, what = owed.name(),
        "containerd is told later of a container that has left, or stays");
    let file = file(namespace, id);
    let folder = file.parent().map_or(Ok(()), fs::create_dir_all);
    if let Err(error) = folder.and_then(|()| fs::write(&file, owed.name())) {
        tracing::error!(%error, "what containerd is to be told cannot be kept in {}",
            file.display());
    }
}

/// Nothing is owed any more of the container of this name: it is about to leave. Blocks.
pub fn forget(namespace: &str, id: &str) -> io::Result<()> {
    let _telling = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
    match fs::remove_file(file(namespace, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Tries again what [`tell`] has left. Blocks.
pub fn settle_left() {
    for namespace in fs::read_dir(folder()).into_iter().flatten().flatten() {
        for entry in fs::read_dir(namespace.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let _telling = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
            let names = (namespace.file_name(), entry.file_name());
            let (Some(space), Some(id)) = (names.0.to_str(), names.1.to_str()) else {
                continue;
            };
            let said = fs::read_to_string(entry.path()).unwrap_or_default();
            let Some(owed) = Owed::ALL.into_iter().find(|owed| owed.name() == said) else {
                continue;
            };
            match owed.tell((space, id)) {
                Ok(()) => drop(fs::remove_file(entry.path())),
                Err(error) => tracing::debug!(container = id, %error, "not yet"),
            }
        }
    }
}

fn folder() -> PathBuf {
    Orders::of_node().folder().join("owed")
}

fn file(namespace: &str, id: &str) -> PathBuf {
    folder().join(namespace).join(id)
}
