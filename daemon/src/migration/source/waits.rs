//! Waiting while a workload stands still: each wait has a name, and ends at once when it is cut.
//!
//! The machine bounds the freeze and cuts what is under way by asking for a thaw; it is told what
//! is waited for, so that the failure says it. Nothing here has a deadline of its own.
//!
//! Invariant: a wait that is cut has done no more than what the thaw undoes. What is waited for
//! therefore stays where the thaw finds it, and only the waiting ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pageferry_proto::migration::source::{Wait, Waiting};
use pageferry_proto::migration::timeline as names;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::watch;

use crate::migration::timeline::{Open, Timeline};

/// What the operation under way waits for. Clones are of the same.
#[derive(Clone, Debug)]
pub struct Waits {
    cut: watch::Receiver<bool>,
    open: Arc<Mutex<Vec<(Wait, Instant)>>>,
    timeline: Timeline,
}

/// A wait, until this is dropped.
#[derive(Debug)]
pub(super) struct Begun<'a> {
    waits: &'a Waits,
    wait: (Wait, Instant),
    _span: Option<Open>,
}

impl Waits {
    /// Waits that are cut when this turns true.
    pub(super) fn new(cut: watch::Receiver<bool>) -> Self {
        Self {
            cut,
            open: Arc::default(),
            timeline: Timeline::default(),
        }
    }

    /// Where what takes long is noted.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// What is waited for now, and since when.
    pub(super) fn list(&self) -> Vec<Waiting> {
        let waiting = |&(what, since): &(Wait, Instant)| Waiting {
            what,
            duration: since.elapsed(),
        };
        self.open().iter().map(waiting).collect()
    }

    /// Waits for `future`, which is dropped when the wait is cut.
    pub(super) async fn on<T>(
        &self,
        what: Wait,
        future: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let _begun = self.begin(what);
        let mut cut = self.cut.clone();
        tokio::select! {
            // What was cut is not begun.
            biased;
            _ = cut.wait_for(|cut| *cut) => Err(was_cut(what)),
            done = future => Ok(done),
        }
    }

    /// Turns true when waits are cut.
    pub(super) fn cut(&self) -> watch::Receiver<bool> {
        self.cut.clone()
    }

    /// For what blocks its thread, and asks by itself whether it is cut.
    pub(super) fn begin(&self, what: Wait) -> Begun<'_> {
        let wait = (what, Instant::now());
        self.open().push(wait);
        let span = span_of(what).and_then(|name| self.timeline.begin_in_freeze(name));
        Begun {
            waits: self,
            wait,
            _span: span,
        }
    }

    /// An error once what would be waited for is cut.
    pub(super) fn check(&self, what: Wait) -> Result<(), Failure> {
        match *self.cut.borrow() {
            true => Err(was_cut(what)),
            false => Ok(()),
        }
    }

    fn open(&self) -> MutexGuard<'_, Vec<(Wait, Instant)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Begun<'_> {
    /// Whether to end early.
    pub(super) fn is_cut(&self) -> bool {
        *self.waits.cut.borrow()
    }

    /// An error once it is to end early.
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.waits.check(self.wait.0)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut open = self.waits.open();
        if let Some(place) = open.iter().position(|wait| *wait == self.wait) {
            open.swap_remove(place);
        }
    }
}

/// What a wait is called in the timeline. What the target is waited for has other spans.
const fn span_of(what: Wait) -> Option<&'static str> {
    Some(match what {
        Wait::Prepared => names::PREPARED,
        Wait::Ports => names::PORTS,
        Wait::Cgroup => names::CGROUP,
        Wait::Scan => names::SCAN,
        Wait::Dump => names::DUMP,
        Wait::Pages => names::PAGES,
        Wait::LiveSets => names::LIVE_SETS,
        Wait::Digests => names::DIGESTS,
        Wait::Images => names::IMAGES,
        Wait::Files => names::FILES,
        Wait::Storage => names::STORAGE,
        Wait::Smaps => names::SMAPS,
        Wait::Held | Wait::Ready => return None,
    })
}

/// The machine has asked for a thaw meanwhile, and knows why: nobody reads this.
fn was_cut(what: Wait) -> Failure {
    let text = format!("waiting for {} was cut short", what.name());
    Failure::new(ErrorCode::Aborted, text)
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::time::Duration;

    use super::*;

    fn names(waits: &Waits) -> Vec<Wait> {
        waits.list().iter().map(|waiting| waiting.what).collect()
    }

    #[tokio::test]
    async fn a_wait_is_listed_until_it_ends_and_ends_when_it_is_cut() {
        let (cut, cancelled) = watch::channel(false);
        let waits = Waits::new(cancelled);
        assert_eq!(waits.on(Wait::Scan, ready(7)).await, Ok(7));
        let both = tokio::spawn({
            let waits = waits.clone();
            async move {
                let dump = waits.on(Wait::Dump, pending::<()>());
                tokio::join!(dump, waits.on(Wait::Pages, pending::<()>()))
            }
        });
        while names(&waits).len() < 2 {
            tokio::task::yield_now().await;
        }
        let blocked = waits.begin(Wait::Cgroup);
        assert!(!blocked.is_cut() && blocked.check().is_ok());
        assert_eq!(names(&waits), [Wait::Dump, Wait::Pages, Wait::Cgroup]);
        cut.send_replace(true);
        let both = tokio::time::timeout(Duration::from_secs(20), both).await;
        let (dump, pages) = both.expect("both are cut").unwrap();
        assert_eq!(dump.unwrap_err().code(), ErrorCode::Aborted);
        assert!(pages.is_err() && blocked.is_cut() && blocked.check().is_err());
        drop(blocked);
        assert_eq!(names(&waits), []);
        // Nothing is begun any more.
        assert!(waits.on(Wait::Scan, ready(7)).await.is_err());
    }
}
