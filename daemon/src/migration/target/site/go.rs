//! How a held workload is let go: all its members or none.
//!
//! ```text
//! how does each stand? ─► all are held, or run ─► the network is attached ─► Go to each
//! one is dead, none has run    ─► never ran
//! one is dead, another has run ─► lost: what runs is frozen for good
//! ```
//!
//! Invariants: no member is let go before each is held, and while one may be dying none is; that
//! nothing ran is said only when no member has run, and each pager that is not there any more, or
//! its watcher, has said so of its own; the network is attached only for trees that their pagers
//! hold. A pager takes `Go` twice, so a restarted daemon asks each again, and hears how it stands.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pageferry_pager::client::{ClientError, PagerClient, Remains};
use pageferry_pager::message::State as PagerState;
use pageferry_proto::migration::timeline as names;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::seat::Seat;
use super::{Site, no_pager, pager_failed};
use crate::migration::text::internal;
use crate::runtime::kind::{self, about_to_run, lose, runs, runs_around};

/// How long a pager may take to let a tree go, or to undo it instead: five seconds for CRIU to give
/// up, ten for its tasks to die, and then it says that they do not.
pub(super) const GO_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a workload does not run that was let go.
#[derive(Debug)]
pub enum LetGoError {
    /// It died before its first instruction, and nothing of it is left that could run.
    NeverRan(Failure),
    /// It may have run, and nothing of it runs or ever will: what is left of it has no memory, or
    /// is without others that it needs, and is frozen for good.
    Lost(Failure),
    /// It may run, or may yet.
    Unclear(Failure),
}

/// How a member stands that is to run, or what became of it.
#[derive(Debug)]
enum Standing {
    /// It waits.
    Held,
    /// It is being undone, and says so when it is.
    Dying,
    /// It was let go.
    Went,
    /// It never ran, and never will.
    Dead(Failure),
    /// It may have run, and never will again.
    Lost(Failure),
    /// That is not known.
    Unclear(Failure),
}

impl Site {
    /// Attaches the network and lets the workload run. Only when `Running` is durable; doing it
    /// again does no harm.
    pub async fn let_go(&mut self) -> Result<(), LetGoError> {
        // A daemon before this one may have come as far as that.
        self.may_have_run = true;
        block_in_place(|| {
            let mut folders = self.seats.iter().map(|seat| &seat.directory);
            folders.try_for_each(|folder| about_to_run(folder))
        })?;
        let went = self.go().await;
        match &went {
            Err(LetGoError::NeverRan(_)) => self.intake.parking().close(),
            // Also if it is not known whether it runs: nobody else would let anything pass.
            Ok(()) | Err(_) => self.deliver_frames(),
        }
        let folders = self.seats.iter().map(|seat| &seat.directory);
        block_in_place(|| match &went {
            // An engine's container is not ours to remove any more.
            Ok(()) => {
                folders.for_each(|folder| runs(folder));
                runs_around(&self.directory);
            }
            Err(LetGoError::NeverRan(_)) => {
                self.may_have_run = false;
                folders.for_each(|folder| kind::never_ran(folder));
            }
            Err(LetGoError::Lost(failure)) => {
                folders.for_each(|folder| lose(folder, failure.text()));
            }
            Err(LetGoError::Unclear(_)) => {}
        });
        went
    }

    async fn go(&mut self) -> Result<(), LetGoError> {
        let began = Instant::now();
        let is_of_another_boot = self.is_of_another_boot;
        let standing = self.timeline.begin(names::STANDING);
        let seats = self.seats.iter();
        let mut standings = join_all(seats.map(|seat| seat.standing(is_of_another_boot))).await;
        // Where a tree is dying the kernel would answer for it, with resets.
        for (seat, standing) in self.seats.iter().zip(&mut standings) {
            if matches!(standing, Standing::Dying) {
                *standing = seat.go(is_of_another_boot).await;
            }
        }
        self.judged(judge(standings))?;
        drop(standing);
        if self.seats.iter().all(|seat| seat.pager.is_none()) {
            self.settle_folders();
            return Ok(());
        }
        let attaching = self.timeline.begin(names::NETWORK);
        self.attach().await?;
        block_in_place(|| self.intake.folders().hand_over())?;
        drop(attaching);
        let attached = began.elapsed();
        let going = self.timeline.begin(names::GO);
        let seats = self.seats.iter();
        let went = join_all(seats.map(|seat| seat.go(is_of_another_boot))).await;
        drop(going);
        let judged = judge(went);
        if let Err(LetGoError::NeverRan(_)) = &judged {
            self.detach().await;
        }
        self.judged(judged)?;
        tracing::debug!(migration = %self.id, ?attached, resumed = ?began.elapsed(), "let go");
        self.announce_again();
        self.settle_folders();
        Ok(())
    }

    /// What is left of a workload that is lost must not run: its members need each other.
    fn judged(&mut self, judged: Result<(), LetGoError>) -> Result<(), LetGoError> {
        if let Err(LetGoError::Lost(_)) = &judged {
            let is_party = 1 < self.seats.len();
            for seat in &mut self.seats {
                seat.is_lost = true;
                if is_party && !seat.freezer.is_empty() {
                    // It is tried again.
                    block_in_place(|| seat.freezer.freeze()).map_err(|error| internal(&error))?;
                }
            }
        }
        judged
    }
}

impl Seat {
    /// How it stands, before anybody is let go.
    async fn standing(&self, is_of_another_boot: bool) -> Standing {
        let Some(pager) = &self.pager else {
            return self.without_pager(is_of_another_boot);
        };
        match never_ran(&pager.client).await {
            Ok(PagerState::Discarding) => Standing::Dying,
            Ok(PagerState::Resuming | PagerState::Running | PagerState::Filled) => Standing::Went,
            // One that has failed by now has been let go before.
            Ok(PagerState::Failed) => Standing::Went,
            Ok(PagerState::Idle | PagerState::Restoring | PagerState::Held) => Standing::Held,
            Err(standing) => standing,
        }
    }

    /// Lets it go, and says what became of it.
    async fn go(&self, is_of_another_boot: bool) -> Standing {
        let Some(pager) = &self.pager else {
            return self.without_pager(is_of_another_boot);
        };
        let went = tokio::time::timeout(GO_TIMEOUT, pager.client.go()).await;
        match went.unwrap_or(Err(ClientError::Silent(GO_TIMEOUT))) {
            Ok(()) => Standing::Went,
            // It may run, so it keeps its network.
            Err(error @ ClientError::Failed { after_go: true, .. }) => {
                Standing::Unclear(pager_failed(error))
            }
            // What it has left was written before the connection closed.
            Err(ClientError::Lost) => self.without_pager(is_of_another_boot),
            Err(error) => match never_ran(&pager.client).await {
                Err(standing) => standing,
                Ok(_) => Standing::Unclear(pager_failed(error)),
            },
        }
    }

    /// What an ended pager has left says whether its tree runs.
    fn without_pager(&self, is_of_another_boot: bool) -> Standing {
        match Remains::read(&self.directory) {
            Ok(Remains::Filled(_)) => Standing::Went,
            Ok(Remains::FillLost(line)) => Standing::Lost(Failure::new(ErrorCode::FillLost, line)),
            Ok(Remains::RestoreLost(line)) => {
                Standing::Dead(Failure::new(ErrorCode::CriuFailed, line))
            }
            Ok(Remains::Nothing) if is_of_another_boot => Standing::Lost(restarted()),
            Ok(Remains::Nothing) => Standing::Unclear(no_pager()),
            Err(error) => Standing::Unclear(internal(&error)),
        }
    }

    /// Whether it has all its memory, though its pager is gone; else why it never will.
    pub(super) fn was_filled(&self, is_of_another_boot: bool) -> Result<(), Failure> {
        judge(vec![self.without_pager(is_of_another_boot)]).map_err(LetGoError::failure)
    }
}

/// What becomes of a workload whose members stand so. One whose memory was lost when it ran is as
/// good as one that has ended: the others go on without it.
fn judge(standings: Vec<Standing>) -> Result<(), LetGoError> {
    let (mut dead, mut lost, mut unclear) = (None, None, None);
    let (mut waits, mut went) = (false, false);
    for (number, standing) in standings.into_iter().enumerate() {
        match standing {
            Standing::Held | Standing::Dying => waits = true,
            Standing::Went => went = true,
            Standing::Dead(failure) => {
                dead.get_or_insert((number, failure));
            }
            Standing::Lost(failure) => {
                lost.get_or_insert(failure);
            }
            Standing::Unclear(failure) => {
                unclear.get_or_insert(failure);
            }
        }
    }
    match (dead, lost, unclear) {
        // Until it is known of each, nothing is said of all.
        (_, _, Some(failure)) => Err(LetGoError::Unclear(failure)),
        (Some((_, failure)), None, None) if !went => Err(LetGoError::NeverRan(failure)),
        (Some((number, failure)), _, None) => Err(LetGoError::Lost(Failure::new(
            ErrorCode::FillLost,
            format!(
                "member {number} has died before it ran, and others had been let go: they are \
                 frozen for good ({failure})"
            ),
        ))),
        (None, Some(failure), None) if !waits && !went => Err(LetGoError::Lost(failure)),
        (None, _, None) => Ok(()),
    }
}

impl LetGoError {
    pub(super) fn failure(self) -> Failure {
        match self {
            Self::NeverRan(failure) | Self::Lost(failure) | Self::Unclear(failure) => failure,
        }
    }
}

impl From<Failure> for LetGoError {
    fn from(failure: Failure) -> Self {
        Self::Unclear(failure)
    }
}

fn restarted() -> Failure {
    Failure::new(
        ErrorCode::FillLost,
        "this node was restarted after it was told to run the workload: whether it ran is not \
         known, and nothing of it is left here",
    )
}

/// Fails if the pager says that its tree died before it was let go, which it says only when nothing
/// of the tree is left; else says how things stand. A pager that does not answer proves nothing,
/// but its tree may be dying, and its network must not be attached.
async fn never_ran(pager: &PagerClient) -> Result<PagerState, Standing> {
    let status = tokio::time::timeout(GO_TIMEOUT, pager.status()).await;
    let status = status.unwrap_or(Err(ClientError::Silent(GO_TIMEOUT)));
    let status = status.map_err(|error| Standing::Unclear(pager_failed(error)))?;
    match status.failure {
        Some(fault) if status.state == PagerState::Failed && !fault.after_go => {
            Err(Standing::Dead(fault.failure()))
        }
        Some(_) | None => Ok(status.state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(text: &str) -> Failure {
        Failure::new(ErrorCode::CriuFailed, text)
    }

    fn dead() -> Standing {
        Standing::Dead(failure("dead"))
    }

    fn said(standings: Vec<Standing>) -> &'static str {
        match judge(standings) {
            Ok(()) => "go",
            Err(LetGoError::NeverRan(_)) => "never ran",
            Err(LetGoError::Lost(_)) => "lost",
            Err(LetGoError::Unclear(_)) => "unclear",
        }
    }

    #[test]
    fn that_nothing_ran_is_said_only_when_no_member_has() {
        use Standing::{Dying, Held, Lost, Unclear, Went};
        let lost = || Lost(failure("lost"));
        let unclear = || Unclear(failure("unclear"));
        assert_eq!(said(vec![Held]), "go");
        assert_eq!(said(vec![Held, Went, Held]), "go");
        assert_eq!(said(vec![Held, Dying]), "go");
        assert_eq!(said(vec![dead()]), "never ran");
        assert_eq!(said(vec![Held, dead(), Held]), "never ran");
        assert_eq!(said(vec![dead(), Went]), "lost");
        assert_eq!(said(vec![dead(), lost()]), "lost");
        assert_eq!(said(vec![lost(), lost()]), "lost");
        assert_eq!(said(vec![lost()]), "lost");
        assert_eq!(said(vec![Went, lost()]), "go");
        assert_eq!(said(vec![Held, lost()]), "go");
        for other in [Held, Went, dead(), lost()] {
            assert_eq!(said(vec![other, unclear()]), "unclear");
        }
    }

    #[test]
    fn whoever_is_without_others_is_told_who_has_died() {
        let Err(LetGoError::Lost(failure)) = judge(vec![Standing::Went, dead()]) else {
            panic!("it is lost");
        };
        assert!(failure.text().contains("member 1"), "{failure}");
    }
}
