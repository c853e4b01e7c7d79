//! Freezing a workload at a moment at which it can be dumped.
//!
//! ```text
//! look ── running, ports open: a few looks, until no passing state is seen; the first one at the
//!         end of a round, before the freeze is asked for
//! close ─ nothing new arrives
//! look ── running: what the workload ends by itself gets some milliseconds;
//!         what needs the other side of a connection gets the ports back, and all begins anew
//! freeze
//! shut ── loopback: what the kernel sends from one to the other waits
//! look ── exact: nothing changes any more, and CRIU has not been let in
//! ```
//!
//! If a state is left, the freeze is given up: the machine thaws and tries again after a pause that
//! grows, and is random, so that it does not meet a client that tries again at fixed times. How
//! often, the machine decides.
//!
//! Invariant: a look changes nothing. Of a frozen workload it costs one dump of sockets per family.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use pageferry_proto::migration::source::{SourceEvent, Wait};
use pageferry_proto::migration::timeline::{LOOK, PORTS};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::task::block_in_place;

use super::failure::freeze_failed;
use super::member::Trees;
use super::network::{Network, Sockets};
use super::sending::Sums;
use super::waits::Waits;
use crate::migration::timeline::Open;
use crate::runtime::passing::{self, Passing, Sleepers, State};

/// Closes the ports and freezes the cgroups, each of them before anything is dumped, or says which
/// passing state stands against it. The thaw that follows opens the ports.
pub(super) async fn freeze(
    trees: Trees<'_>,
    network: &mut Network,
    glance: Glance,
    waits: &Waits,
) -> Result<Option<Passing>, Failure> {
    let began = Instant::now();
    if let Some(passing) = close_calmly(trees, network, glance, waits).await? {
        return Ok(Some(passing));
    }
    let freezing = Instant::now();
    let cut = waits.begin(Wait::Cgroup);
    let end = || cut.is_cut() || FREEZE_MAX < freezing.elapsed();
    let mut is_frozen = true;
    for tree in trees.iter() {
        let frozen = block_in_place(|| tree.freezer.freeze_unless(end));
        is_frozen = frozen.map_err(|error| freeze_failed(&error))?;
        cut.check()?;
        if !is_frozen {
            break;
        }
    }
    drop(cut);
    if !is_frozen {
        // A task that cannot be interrupted when it is thawed was not so because of the freeze.
        trees.let_run()?;
        let pids = trees.pids()?;
        let sleeper = block_in_place(|| passing::uninterruptible(&pids));
        return Ok(Some(sleeper.unwrap_or_else(|| Passing {
            state: State::Uninterruptible,
            holder: format!("a task of {} processes", pids.len()),
        })));
    }
    let frozen = Instant::now();
    let _looking = look(waits);
    // Before anything is looked at: kernels send for those that are frozen, too.
    network.lo.shut()?;
    network.parking.shut()?;
    let found = network.sockets.look(trees)?;
    if found.is_none() {
        network.parking.keep_unread(&trees.pids()?);
    }
    tracing::debug!(took = ?began.elapsed(), looked = ?frozen.elapsed(), "frozen");
    Ok(found)
}

fn look(waits: &Waits) -> Option<Open> {
    waits.timeline().begin_in_freeze(LOOK)
}

/// When a running workload was last seen in no passing state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Glance(Option<Instant>);

impl Glance {
    /// One look. What it finds, and what is wrong with it, the freeze will find again.
    pub(super) fn now(trees: Trees<'_>, sockets: &mut Sockets) -> Self {
        let at = Instant::now();
        let is_calm = matches!(sockets.look(trees), Ok(None))
            && trees
                .pids()
                .is_ok_and(|pids| Sleepers::default().look(&pids).is_none());
        Self(is_calm.then_some(at))
    }

    fn is_old(self) -> bool {
        self.0.is_none_or(|at| GLANCE_MAX < at.elapsed())
    }
}

/// Closes the ports at a moment without a passing state, or says which does not pass.
async fn close_calmly(
    trees: Trees<'_>,
    network: &mut Network,
    glance: Glance,
    waits: &Waits,
) -> Result<Option<Passing>, Failure> {
    let Network {
        ports,
        sockets,
        parking,
        ..
    } = network;
    let gate = ports.gate(parking)?;
    for closing in 1..=CLOSINGS_MAX {
        // Closing the ports would not end it, and would hold up what does.
        if (1 < closing || glance.is_old())
            && let Some(open) = wait_open(trees, sockets, waits).await?
            && !open.state.passes_alone()
        {
            return Ok(Some(open));
        }
        if let Some(gate) = &gate {
            // Also where what comes is only diverted.
            let _closing = waits.timeline().begin_in_freeze(PORTS);
            gate.close(waits).await?;
        }
        let closed = Instant::now();
        let looking = look(waits);
        let left = wait_closed(trees, sockets).await?;
        drop(looking);
        tracing::debug!(closing, ?left, waited = ?closed.elapsed(), "ports closed");
        match left {
            None => break,
            Some(left) if left.state.passes_alone() || closing == CLOSINGS_MAX => {
                return Ok(Some(left));
            }
            Some(_) => {}
        }
        if let Some(gate) = &gate {
            gate.reopen(waits).await?;
        }
        tokio::time::sleep(PAUSE_OPEN).await;
    }
    Ok(None)
}

/// Gives a busy server some moments to be in no passing state. Returns what was seen last. Of tasks
/// in uninterruptible sleep only those count that stay in one: whether the others freeze the freeze
/// itself tells.
async fn wait_open(
    trees: Trees<'_>,
    sockets: &mut Sockets,
    waits: &Waits,
) -> Result<Option<Passing>, Failure> {
    let _looking = look(waits);
    let began = Instant::now();
    let mut sleepers = Sleepers::default();
    loop {
        let mut found = sockets.look(trees)?;
        if found.is_none() {
            let pids = trees.pids()?;
            found = block_in_place(|| sleepers.look(&pids));
        }
        let patience = match &found {
            None => return Ok(None),
            Some(passing) if passing.state.passes_alone() => PATIENCE_ALONE,
            Some(_) => PATIENCE_OTHERS,
        };
        if patience < began.elapsed() {
            return Ok(found);
        }
        waits.check(Wait::Cgroup)?;
        tokio::time::sleep(PAUSE_OPEN).await;
    }
}

/// With closed ports, lets the workload end what it ends by itself. Returns what is left.
async fn wait_closed(trees: Trees<'_>, sockets: &mut Sockets) -> Result<Option<Passing>, Failure> {
    let mut left = None;
    for look in 0..LOOKS_CLOSED {
        if 0 < look {
            tokio::time::sleep(PAUSE_CLOSED).await;
        }
        left = sockets.look(trees)?;
        if left.as_ref().is_none_or(|left| !left.state.passes_alone()) {
            break;
        }
    }
    Ok(left)
}

/// Freezes that were given up for a state that passes.
#[derive(Debug, Default)]
pub(super) struct Tries(u32);

impl Tries {
    /// Another one is, with so much of it on its way: `what` names the state, its process, and what
    /// to do.
    pub(super) fn give_up(&mut self, what: &str, sent: &Sums) -> Result<SourceEvent, Failure> {
        self.0 += 1;
        let tries = self.0;
        let pause = pause(tries, RandomState::new().build_hasher().finish());
        tracing::info!(tries, ?pause, "the freeze is given up: {what}");
        let text = if tries == 1 {
            format!("the freeze was given up: {what}")
        } else {
            format!("{tries} freezes were given up, the last because {what}")
        };
        sent.given_up(Failure::new(ErrorCode::PassingState, text), pause)
    }
}

/// How long the workload runs after freeze number `tries` was given up: doubled each time up to a
/// limit, and between half and one and a half of that.
fn pause(tries: u32, random: u64) -> Duration {
    let doubled = PAUSE_FIRST.saturating_mul(1 << (tries - 1).min(16));
    let full = doubled.min(PAUSE_MAX);
    let permille = 500 + u32::try_from(random % 1001).unwrap_or_default();
    full * permille / 1000
}

/// How often the ports are closed in one attempt.
const CLOSINGS_MAX: u32 = 4;

/// How long a busy server gets before the ports are closed, for what it ends by itself: what lasts
/// longer is no accident of the moment.
const PATIENCE_ALONE: Duration = Duration::from_millis(16);

/// The same for what needs others, above all an answer to a packet that met closed ports: the
/// shortest retransmission timeout is 200 ms.
const PATIENCE_OTHERS: Duration = Duration::from_millis(250);

/// How old a glance may be: it spares the downtime the look that comes first (0.5 ms), and is no
/// more than a hint, which the looks after it do not rest on.
const GLANCE_MAX: Duration = Duration::from_millis(20);

/// Between two looks while the ports are open.
const PAUSE_OPEN: Duration = Duration::from_millis(2);

/// How often it is looked with closed ports, when every moment is one without an answer: a server
/// that waits for connections accepts one within a fraction of a millisecond.
const LOOKS_CLOSED: u32 = 30;
const PAUSE_CLOSED: Duration = Duration::from_micros(500);

/// How long a freeze may take before it is given up: it takes 0.1–2 ms unless a task is in
/// uninterruptible sleep.
const FREEZE_MAX: Duration = Duration::from_millis(500);

/// The first pause after a freeze that was given up, and the longest: the tries together last some
/// seconds.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_glance_counts_for_a_moment_and_only_if_nothing_was_seen() {
        let before = |age| Glance(Instant::now().checked_sub(age));
        assert!(!before(Duration::ZERO).is_old());
        assert!(before(2 * GLANCE_MAX).is_old());
        assert!(Glance::default().is_old());
    }

    #[test]
    fn pauses_grow_to_a_limit_and_are_spread_around_it() {
        assert_eq!(pause(1, 0), Duration::from_millis(5));
        assert_eq!(pause(1, 1000), Duration::from_millis(15));
        assert_eq!(pause(4, 500), Duration::from_millis(80));
        assert_eq!(pause(10, 500), PAUSE_MAX);
        assert_eq!(pause(33, 500), PAUSE_MAX);
        assert_eq!(pause(u32::MAX, 1000), PAUSE_MAX * 3 / 2);
    }
}
