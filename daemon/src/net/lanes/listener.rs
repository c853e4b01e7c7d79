//! The target's end of the lanes: what is dialled is greeted and becomes part of a session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pageferry_proto::id::{MigrationId, NodeName};
use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{Hello, Message, Welcome};
use pageferry_proto::wire::version::Version;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{DataReceiver, GreetingError, Lanes, Shared, TargetSession, watch_lane};
use crate::net::control::{Greeting, greeting};
use crate::net::endpoint::{Connection, Endpoint, HANDSHAKE_TIME_MAX};
use crate::net::stream::{DataStream, ReadStreamError};

/// Greets the lanes that peers dial, and makes sessions of them.
#[derive(Debug)]
pub struct Listener {
    sessions: mpsc::Receiver<TargetSession>,
    greeter: JoinHandle<()>,
}

impl Listener {
    /// Begins to greet what connects to the endpoint. Must be called within a tokio runtime.
    pub fn start(endpoint: Arc<Endpoint>) -> Self {
        let (sender, sessions) = mpsc::channel(SESSIONS_WAITING_MAX);
        let greeter = tokio::spawn(async move {
            let known = Arc::new(Sessions::default());
            while let Some(connection) = endpoint.accept().await {
                let known = Arc::clone(&known);
                let sender = sender.clone();
                // As many at once as the endpoint lets connections in.
                tokio::spawn(async move { known.admit(connection, &sender).await });
            }
        });
        Self { sessions, greeter }
    }

    /// The next session that a source has opened; `None` when the endpoint is closed.
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<TargetSession> {
        self.sessions.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.greeter.abort();
    }
}

/// The sessions that are alive, for further lanes to find.
#[derive(Debug, Default)]
struct Sessions {
    by_migration: Mutex<HashMap<MigrationId, Entry>>,
}

#[derive(Clone, Debug)]
struct Entry {
    shared: Weak<Shared>,
    streams: mpsc::WeakSender<DataStream>,
}

impl Sessions {
    /// Greets a connection and gives it its place; closes it if it has none.
    async fn admit(&self, connection: Connection, sessions: &mpsc::Sender<TargetSession>) {
        let greeted = timeout(HANDSHAKE_TIME_MAX, hear_hello(&connection)).await;
        let placed = match greeted {
            Err(_) => {
                tracing::warn!(peer = %connection.peer(), "dropped a lane that said nothing");
                return connection.close(ErrorCode::Timeout);
            }
            Ok(Err(error)) => Err(error),
            Ok(Ok((streams, hello))) => self.place(&connection, streams, &hello).await,
        };
        match placed {
            Err(error) => {
                tracing::warn!(peer = %connection.peer(), "refused a lane: {error}");
                connection.close(error.code());
            }
            Ok(Place::Joined {
                shared,
                streams,
                lane,
                migration,
            }) => {
                serve_lane(shared, streams, connection, lane, migration);
            }
            Ok(Place::Opened { session, streams }) => {
                let migration = session.migration;
                let shared = Arc::clone(&session.lanes.shared);
                serve_lane(shared, streams, connection, 0, migration);
                // Fails only when nobody listens any more; dropping the session closes it.
                drop(sessions.send(*session).await);
            }
        }
    }

    async fn place(
        &self,
        connection: &Connection,
        (mut sender, receiver): Greeting,
        hello: &Hello,
    ) -> Result<Place, GreetingError> {
        let version = Version::agreed(hello.version).map_err(GreetingError::Version)?;
        let joined = match hello.lane {
            0 => None,
            1.. => Some(self.join(connection.peer(), hello)?),
        };
        let welcome = Message::Welcome(Welcome { version });
        if let Some((shared, streams)) = joined {
            sender.send(welcome).await.map_err(GreetingError::Send)?;
            return Ok(Place::Joined {
                shared,
                streams,
                lane: hello.lane,
                migration: hello.migration,
            });
        }
        let peer = connection.peer().clone();
        let shared = Arc::new(Shared::new(peer.clone(), hello.lanes));
        let (streams, data) = mpsc::channel(STREAMS_WAITING_MAX);
        // Before the welcome: the source dials the next lane as soon as it has it.
        self.open(hello.migration, &shared, &streams)?;
        sender.send(welcome).await.map_err(GreetingError::Send)?;
        let session = Box::new(TargetSession {
            peer,
            migration: hello.migration,
            version,
            sender: sender.into_role(),
            receiver: receiver.into_role(),
            data: DataReceiver { streams: data },
            lanes: Lanes { shared },
        });
        Ok(Place::Opened { session, streams })
    }

    /// The session that a further lane belongs to.
    fn join(&self, peer: &NodeName, hello: &Hello) -> Result<Joined, GreetingError> {
        let unknown = GreetingError::Unknown(hello.migration);
        let known = self.lock();
        let entry = known.get(&hello.migration);
        let alive =
            entry.and_then(|entry| Some((entry.shared.upgrade()?, entry.streams.upgrade()?)));
        let Some((shared, streams)) = alive.filter(|(shared, _)| &shared.peer == peer) else {
            return Err(unknown);
        };
        if shared.lanes != hello.lanes || shared.has(hello.lane) {
            return Err(GreetingError::Place {
                migration: hello.migration,
                lane: hello.lane,
                lanes: hello.lanes,
            });
        }
        Ok((shared, streams))
    }

    /// Makes a session findable, in place of an older one of the same node.
    fn open(
        &self,
        migration: MigrationId,
        shared: &Arc<Shared>,
        streams: &mpsc::Sender<DataStream>,
    ) -> Result<(), GreetingError> {
        let mut known = self.lock();
        known.retain(|_, entry| 0 < entry.shared.strong_count());
        let entry = Entry {
            shared: Arc::downgrade(shared),
            streams: streams.downgrade(),
        };
        if let Some(older) = known
            .get(&migration)
            .and_then(|entry| entry.shared.upgrade())
        {
            if older.peer != shared.peer {
                return Err(GreetingError::Unknown(migration));
            }
            older.end(ErrorCode::Superseded);
        }
        known.insert(migration, entry);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Entry>> {
        // A map of weak handles is whole after every statement, whoever panicked.
        self.by_migration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

type Joined = (Arc<Shared>, mpsc::Sender<DataStream>);

enum Place {
    Joined {
        shared: Arc<Shared>,
        streams: mpsc::Sender<DataStream>,
        lane: u32,
        migration: MigrationId,
    },
    Opened {
        session: Box<TargetSession>,
        streams: mpsc::Sender<DataStream>,
    },
}

async fn hear_hello(connection: &Connection) -> Result<(Greeting, Hello), GreetingError> {
    let (sender, receiver) = connection
        .inner
        .accept_bi()
        .await
        .map_err(GreetingError::Stream)?;
    let (sender, mut receiver) = greeting(sender, receiver);
    match receiver.next().await.map_err(GreetingError::Receive)? {
        Some(Message::Hello(hello)) => Ok(((sender, receiver), hello)),
        Some(Message::Welcome(_) | Message::Source(_) | Message::Target(_)) | None => {
            Err(GreetingError::Missing)
        }
    }
}

/// Takes a lane into its session and hands on its data streams until it breaks.
fn serve_lane(
    shared: Arc<Shared>,
    streams: mpsc::Sender<DataStream>,
    connection: Connection,
    lane: u32,
    migration: MigrationId,
) {
    let inner = connection.inner.clone();
    shared.add(lane, connection);
    tokio::spawn(watch_lane(Arc::clone(&shared), inner.clone()));
    tokio::spawn(async move {
        if let Err(error) = forward_streams(&inner, &streams, migration).await {
            tracing::warn!(%migration, lane, "closing the session: {error}");
            shared.end(ErrorCode::Malformed);
        }
    });
}

async fn forward_streams(
    connection: &quinn::Connection,
    streams: &mpsc::Sender<DataStream>,
    migration: MigrationId,
) -> Result<(), ReadStreamError> {
    // That the lane broke is for its watcher to tell.
    while let Ok(stream) = connection.accept_uni().await {
        match DataStream::open(stream, migration).await {
            Ok(stream) => {
                if streams.send(stream).await.is_err() {
                    return Ok(());
                }
            }
            // A sender that gave up before it began; what is missing is sent again.
            Err(ReadStreamError::Read(_) | ReadStreamError::Early(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Sessions that nobody has asked for yet. Their lanes wait, and cost a window each at most.
const SESSIONS_WAITING_MAX: usize = 8;

/// Streams of a session that nobody has asked for yet. They stay in the lanes' windows.
const STREAMS_WAITING_MAX: usize = 16;
