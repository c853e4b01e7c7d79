//! What a restore waits for, besides what CRIU says: decisions, and locks.
//! Cancelling any of these waits loses nothing.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::message::Fault;

/// What is decided about a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It runs.
    Go,
    /// It is undone.
    Discard,
    /// It gets its file locks, and is held on.
    Lock,
}

/// What came of taking locks, if they are being taken.
pub async fn locked(locking: &mut Option<JoinHandle<Result<(), Fault>>>) -> Result<(), Fault> {
    match locking {
        Some(taking) => taking.await.expect("taking locks does not panic"),
        None => std::future::pending().await,
    }
}

/// Waits for the decision to undo. Nothing else can be decided while CRIU is at work.
pub async fn discarded(decisions: &mut mpsc::UnboundedReceiver<Decision>) {
    loop {
        match decisions.recv().await {
            Some(Decision::Discard) => return,
            Some(Decision::Go | Decision::Lock) => {}
            None => std::future::pending().await,
        }
    }
}
