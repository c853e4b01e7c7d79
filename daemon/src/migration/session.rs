//! The control side of a connection, the same for both roles: messages go out in order by a task of
//! their own, what comes in is handed on, and the loss of a lane is the loss of the connection.

use std::time::Duration;

use pageferry_proto::wire::code::ErrorCode;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};

use super::text::chain;
use crate::net::control::{ControlReceiver, ControlSender, ReceiveError, Role};
use crate::net::lanes::Lanes;

/// Control messages that may wait for a slow peer; the protocol has at most a few unanswered.
const MESSAGES_MAX: usize = 16;

/// How long the last messages of a migration may take to leave.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection's control stream, sending messages of type `M`. Dropping it closes the connection.
#[derive(Debug)]
pub struct Session<M> {
    messages: mpsc::Sender<M>,
    sending: Option<JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
}

impl<M: Role + Send + 'static> Session<M> {
    /// Takes over a connection. `heard` gets each message and, once, the reason of the loss; it
    /// answers whether anybody listens.
    pub fn open<N, Heard, Listening>(
        mut sender: ControlSender<M>,
        mut receiver: ControlReceiver<N>,
        lanes: Lanes,
        heard: Heard,
    ) -> Self
    where
        N: Role + Send + 'static,
        Heard: Fn(Result<N, ErrorCode>) -> Listening + Send + 'static,
        Listening: Future<Output = bool> + Send,
    {
        let (messages, mut queue) = mpsc::channel(MESSAGES_MAX);
        let sending = tokio::spawn(async move {
            while let Some(message) = queue.recv().await {
                if let Err(error) = sender.send(message).await {
                    tracing::debug!("control stream: {}", chain(&error));
                    return;
                }
            }
            // What was said last should arrive before the connection goes.
            drop(sender.finish().await);
        });
        let receiving = tokio::spawn(async move {
            loop {
                let said = tokio::select! {
                    said = receiver.next() => match said {
                        Ok(Some(said)) => Ok(said),
                        Ok(None) => Err(ErrorCode::PeerLost),
                        Err(error) => {
                            match error {
                                // Every migration ends so; whether it was over the machine knows.
                                ReceiveError::Read(_) => {
                                    tracing::debug!("control stream: {}", chain(&error));
                                }
                                _ => tracing::warn!("control stream: {}", chain(&error)),
                            }
                            Err(error.closed_by_peer().unwrap_or(ErrorCode::PeerLost))
                        }
                    },
                    code = lanes.lost() => {
                        tracing::debug!(%code, "connection lost");
                        Err(code)
                    }
                };
                let lost = said.is_err();
                if !heard(said).await || lost {
                    return;
                }
            }
        });
        Self {
            messages,
            sending: Some(sending),
            tasks: vec![receiving],
        }
    }

    /// Adds tasks that end with the connection.
    pub fn own(&mut self, tasks: impl IntoIterator<Item = JoinHandle<()>>) {
        self.tasks.extend(tasks);
    }

    /// For whoever has messages of their own, and waits until they are taken. They end with this.
    pub fn messages(&self) -> mpsc::Sender<M> {
        self.messages.clone()
    }

    /// Queues a message; false when the peer takes none any more.
    pub fn say(&self, message: M) -> bool {
        self.messages.try_send(message).is_ok()
    }

    /// Lets the last messages go out, then closes the connection.
    pub async fn close(mut self) {
        let (nobody, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.messages, nobody));
        if let Some(sending) = self.sending.take() {
            drop(tokio::time::timeout(CLOSE_TIMEOUT, sending).await);
        }
    }
}

impl<M> Drop for Session<M> {
    fn drop(&mut self) {
        for task in self.tasks.iter().chain(&self.sending) {
            task.abort();
        }
    }
}

/// Waits for an operation to end; for ever without one.
pub async fn ended<T>(operation: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match operation {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}
