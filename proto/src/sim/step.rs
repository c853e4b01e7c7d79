//! What can happen next, and what can go wrong.

use crate::migration::handoff::Side;

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
    /// The next action of a side that can fail does.
    Fail(Side),
    /// What the target holds dies, and its pager knows that it never ran.
    DropHeld,
    /// A side loses its power for good, and the operator tells the other side.
    Fence(Side),
    /// Time passes: so many eighths of a second, but not beyond the next timer.
    Pass(u8),
    /// A side loses its power and comes back without what ran there.
    PowerLoss(Side, u8),
    /// A killed daemon is started again.
    Restart(Side),
    /// The next action of a side that works on the workload hangs until it is undone.
    Hang(Side),
    /// The next freeze or final round wants another round first.
    Retry,
    /// Time passes until the next timer.
    Tick,
}
