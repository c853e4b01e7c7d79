//! What can happen next, and what can go wrong.

use super::node::Stream;
use super::world::World;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::status::Phase;

/// Something that is possible now and that nobody would call a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The driver of a side begins its next action.
    Begin(Side),
    /// An action of a side that is under way gets further: the one at this place.
    Advance(Side, usize),
    /// The control stream brings the next message to a side.
    Deliver(Side),
    /// A side learns that its connection is gone.
    Notice(Side),
    /// The target's driver asks for more of the pages that are missing.
    Ask,
    /// A data stream arrives: the one at this place.
    Stream(usize),
}

/// Something that is done to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// One of the possible steps: the one at this place, counted around.
    Step(u8),
    /// The workload writes a page: bits 0 to 2 are the page, bit 3 the space; with bit 4 it
    /// gives the page back instead.
    Write(u8),
    /// The operator aborts at a side.
    Abort(Side),
    /// The connection breaks.
    Break,
    /// The daemon of a side is killed. The bits say which unsynced records it finds again.
    Crash(Side, u8),
    /// The journal of a side that is finished, with nobody connected, is removed, but for what must
    /// be kept: other migrations have ended since.
    Expire(Side),
    /// The next action of a side that can fail does.
    Fail(Side),
    /// A process of the frozen copy dies, after the commit.
    DropCopy,
    /// What the target holds dies, and its pager knows that it never ran.
    DropHeld,
    /// Another gives back the locks of the workload that it took, once it has all of them.
    GiveLock,
    /// A side loses its power for good, and the operator tells the other side.
    Fence(Side),
    /// Time passes: so many eighths of a second, but not beyond the next timer.
    Pass(u8),
    /// The operator lets a migration that is held go on.
    Proceed,
    /// A side loses its power and comes back without what ran there.
    PowerLoss(Side, u8),
    /// A killed daemon is started again.
    Restart(Side),
    /// The next action of a side that works on the workload hangs until it is undone.
    Hang(Side),
    /// The next freeze is given up for another round: at once, or so many of its steps later.
    Retry(u8),
    /// The source's driver gives up a freeze that is over: what was undone may still report that.
    RetryLate,
    /// A stream is put in flight that no source sends: bits 0 and 1 say whether digests, an image,
    /// a live set or a parcel. With bit 2 it comes when the target hears `Final`, else at once.
    Stray(u8),
    /// Another takes a lock of the workload that nobody has.
    TakeLock,
    /// The workload at the target reads a page: bits as of `Write`; with bit 4 it writes it.
    Touch(u8),
    /// Time passes until the next timer.
    Tick,
}

impl World {
    /// What is possible now.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if !self.source.actions.is_empty() {
            steps.push(Step::Begin(Side::Source));
        }
        if !self.target.actions.is_empty() {
            steps.push(Step::Begin(Side::Target));
        }
        let source = self.source_jobs().into_iter();
        steps.extend(source.map(|place| Step::Advance(Side::Source, place)));
        let target = self.target_jobs().into_iter();
        steps.extend(target.map(|place| Step::Advance(Side::Target, place)));
        if !self.link.to_source.is_empty() {
            steps.push(Step::Deliver(Side::Source));
        }
        if !self.link.to_target.is_empty() {
            steps.push(Step::Deliver(Side::Target));
        }
        if self.link.source_thinks && !self.link.up && self.source.machine.is_some() {
            steps.push(Step::Notice(Side::Source));
        }
        if self.link.target_thinks && !self.link.up && self.target.machine.is_some() {
            steps.push(Step::Notice(Side::Target));
        }
        if self.can_ask() {
            steps.push(Step::Ask);
        }
        let (parcels, others): (Vec<usize>, Vec<usize>) =
            (0..self.streams.len()).partition(|place| {
                let stream = &self.streams[*place];
                matches!(stream, Stream::Parcel { .. } | Stream::Fetched { .. })
            });
        steps.extend(parcels.into_iter().take(STREAMS_MAX).map(Step::Stream));
        // What is of a given up attempt stays in flight until the next one, as long as anything
        // else is possible: otherwise nothing would ever be late.
        let phase = self.status(Side::Source).map(|status| status.phase);
        let late = matches!(phase, Some(Phase::Copying | Phase::Freezing));
        if !late || steps.is_empty() {
            let newest = others.iter().rev().take(LATE_STREAMS_MAX);
            steps.extend(newest.map(|place| Step::Stream(*place)));
        }
        steps
    }
}

/// How many of the streams in flight may be the next to arrive: enough for any reordering that
/// matters, few enough to choose from.
const STREAMS_MAX: usize = 4;

/// The same for the streams of attempts, counted from the newest.
const LATE_STREAMS_MAX: usize = 8;
