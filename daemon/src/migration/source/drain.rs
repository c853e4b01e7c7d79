//! Pages of a frozen tree that were not sent, for a target that asks for them.
//!
//! ```text
//! Fetch ─► urgent ──► read ─► encode ─► the urgent lane
//!      └─► others ──► read ─► encode ─► the other lanes
//! ```
//!
//! What is missing the target knows. Here is no state but the processes: what was asked for on a
//! connection that is lost is asked for again on the next, of the next daemon, too.
//!
//! Invariants: only a frozen tree is read; a page that cannot be read is never taken for zero, but
//! said to be lost; urgent requests wait for none that is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pageferry_pages::read::{Misses, Reader};
use pageferry_pages::send::{RoundSent, SendError, Sender};
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::Fetch;
use pageferry_sys::ptrace;
use tokio::sync::{Semaphore, watch};

use super::sending::Fetched;
use super::sent::Sent;
use super::workload::Workload;
use crate::migration::text::chain;
use crate::net::stream::{DataSender, SendStreamError};

/// Requests that may wait to be answered: more than a target has under way.
const REQUESTS_MAX: usize = 256;

/// Urgent requests that are answered at the same time.
const URGENT_MAX: usize = 4;

/// How the spaces of the frozen tree are read.
pub(super) type Readers = BTreeMap<SpaceId, Arc<Reader>>;

/// Answers requests. Clones are of the same.
#[derive(Clone, Debug)]
pub struct Drain(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stage: watch::Sender<Stage>,
    fill: Lane,
    urgent: Lane,
    sent: Arc<Sent>,
    waiting: AtomicUsize,
}

/// What may be read.
#[derive(Clone, Debug, Default)]
enum Stage {
    /// The tree is not frozen, or was not found yet.
    #[default]
    NotYet,
    Frozen(Arc<Readers>),
    /// It may run again, or is no more.
    Over,
}

#[derive(Debug)]
struct Lane {
    sender: Sender,
    places: Semaphore,
}

impl Lane {
    fn new(threads: usize) -> Self {
        Self {
            sender: Sender::new(threads),
            places: Semaphore::new(threads),
        }
    }
}

impl Drain {
    /// One that reads and encodes what is not urgent on so many threads.
    pub(super) fn new(workers: usize, sent: Arc<Sent>) -> Self {
        let shared = Shared {
            stage: watch::Sender::default(),
            // One reads while another one waits for the network.
            fill: Lane::new(workers.max(1) + 1),
            urgent: Lane::new(URGENT_MAX),
            sent,
            waiting: AtomicUsize::new(0),
        };
        Self(Arc::new(shared))
    }

    /// From here on the tree is frozen, and may be read.
    pub(super) fn begin(&self, readers: Readers) {
        let frozen = Stage::Frozen(Arc::new(readers));
        self.0.stage.send_replace(frozen);
    }

    /// Whether it is read already.
    pub(super) fn has_begun(&self) -> bool {
        matches!(*self.0.stage.borrow(), Stage::Frozen(_))
    }

    /// The tree may run, or is no more.
    pub(super) fn end(&self) {
        self.0.stage.send_replace(Stage::Over);
    }

    /// Answers a request over this connection, in the background. `lost` hears of what can never be
    /// answered.
    pub(super) fn answer(
        &self,
        fetch: Fetch,
        data: DataSender,
        lost: impl FnOnce(Failure) + Send + 'static,
    ) {
        if REQUESTS_MAX <= self.0.waiting.fetch_add(1, Ordering::Relaxed) {
            self.0.waiting.fetch_sub(1, Ordering::Relaxed);
            // It does not hear of them on this connection, and asks on the next.
            tracing::warn!("a target asks for more than it says");
            return;
        }
        let drain = self.clone();
        tokio::spawn(async move {
            let answered = drain.0.answered(&fetch, &data).await;
            drain.0.waiting.fetch_sub(1, Ordering::Relaxed);
            if let Err(failure) = answered {
                lost(failure);
            }
        });
    }
}

impl Shared {
    /// An error is one for good. What the connection did not take is asked for again.
    async fn answered(&self, fetch: &Fetch, data: &DataSender) -> Result<(), Failure> {
        let lane = if fetch.urgent {
            &self.urgent
        } else {
            &self.fill
        };
        let Ok(_place) = lane.places.acquire().await else {
            return Ok(());
        };
        // A daemon that was restarted may be asked before it has found the tree.
        let mut stage = self.stage.subscribe();
        let known = stage.wait_for(|stage| !matches!(stage, Stage::NotYet));
        let readers = match known.await.map(|stage| stage.clone()) {
            Ok(Stage::Frozen(readers)) => readers,
            Ok(Stage::NotYet | Stage::Over) | Err(_) => return Ok(()),
        };
        let Some(reader) = readers.get(&fetch.space) else {
            let text = format!("process {} of the frozen workload is gone", fetch.space);
            return Err(Failure::new(ErrorCode::WorkloadGone, text));
        };
        let data = if fetch.urgent {
            data.urgent()
        } else {
            data.clone()
        };
        let sink = Fetched(&data, &self.sent);
        let how = (reader, Misses::Settle);
        let sent = lane
            .sender
            .round(fetch.space, how, &fetch.pages, Round::FIRST, &sink);
        judge(fetch.space, sent.await)
    }
}

/// What a round of pages that were asked for has come to.
fn judge(
    space: SpaceId,
    sent: Result<RoundSent, SendError<SendStreamError>>,
) -> Result<(), Failure> {
    match sent {
        Ok(sent) => match sent.unread.runs().first() {
            None => Ok(()),
            Some(first) => {
                let (count, at) = (sent.unread.len(), first.address());
                let text = format!(
                    "{count} pages of process {space} of the frozen workload cannot be read, the \
                     first at {at:#x}"
                );
                Err(Failure::new(ErrorCode::Untrackable, text))
            }
        },
        Err(error @ SendError::Read { .. }) => {
            let code = match &error {
                SendError::Read { source, .. } => source.code(),
                SendError::Send { .. } | SendError::Cut => ErrorCode::Internal,
            };
            Err(Failure::new(code, chain(&error)))
        }
        Err(error @ (SendError::Send { .. } | SendError::Cut)) => {
            tracing::debug!("pages that were asked for: {}", chain(&error));
            Ok(())
        }
    }
}

/// How the spaces of a frozen tree are read that a daemon before this one has dumped.
pub(super) fn open_readers(workload: &Workload) -> Result<Readers, Failure> {
    let tree = workload.tree()?;
    let mut readers = Readers::new();
    for space in &tree.spaces {
        let reader = ptrace::pidfd_open(space.leader).and_then(|fd| Reader::open(space.leader, fd));
        let reader = reader.map_err(|error| {
            let text = format!("process {} of the frozen workload: {error}", space.leader);
            Failure::new(ErrorCode::WorkloadGone, text)
        })?;
        readers.insert(space.id, Arc::new(reader));
    }
    workload.check_root()?;
    Ok(readers)
}

#[cfg(test)]
mod tests {
    use pageferry_proto::page::{PageCount, PageIndex, PageRun};
    use pageferry_proto::set::PageSet;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_lost_and_what_cannot_be_sent_is_not() {
        let sent = RoundSent::default();
        assert_eq!(judge(SpaceId(7), Ok(sent.clone())), Ok(()));
        let run = PageRun::new(PageIndex(5), PageCount(2)).unwrap();
        let unread = PageSet::from(run);
        let failure = judge(SpaceId(7), Ok(RoundSent { unread, ..sent })).unwrap_err();
        let text =
            "2 pages of process 7 of the frozen workload cannot be read, the first at 0x5000";
        assert_eq!(failure.text(), text);
        assert_eq!(judge(SpaceId(7), Err(SendError::Cut)), Ok(()));
    }
}
