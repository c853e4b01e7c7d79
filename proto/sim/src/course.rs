//! In which order rounds and attempts may come: what the source may send when, and what the target
//! may take in. The machines and the ledger keep count of that themselves; here it is counted once
//! more, from what is said and heard.

use super::driver::retry;
use super::node::Stream;
use super::oracle::Violation;
use super::world::World;
use pageferry_proto::id::{Generation, Round, SpaceId};
use pageferry_proto::migration::ledger::Ledger;
use pageferry_proto::migration::record::Entry;
use pageferry_proto::migration::source::SourceAction;
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::control::{SourceMessage, TargetMessage};

/// What the source has said and heard, all its daemons together.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// The last round that it heard to be held.
    held: Option<Round>,
    /// The last attempt at the final round that was begun.
    attempt: Option<Generation>,
    /// The attempt that `Final` was said of.
    last: Option<Generation>,
}

/// What the target was told, and whether more came than that.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// The attempt that it was told is the last.
    last: Option<Generation>,
    /// All of that attempt is there.
    pub(super) complete: bool,
    /// A stray stream has come before that.
    pub(super) strayed: Option<Strayed>,
}

/// A stray stream that the target must not pass over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strayed {
    /// It came before the final message.
    Before,
    /// It came after the final message, and before all that the message counts.
    After,
}

impl World {
    /// The source is about to begin this.
    pub(super) fn source_begins(&mut self, action: &SourceAction) -> Result<(), Violation> {
        match action {
            SourceAction::SendRound { round, folders, .. } => {
                self.demand(
                    self.may_freeze || !folders,
                    "folders travel in a round of a migration that is held",
                )?;
                self.check_round(*round)
            }
            SourceAction::Freeze { .. } => self.demand(
                self.may_freeze,
                "a migration that is held freezes without anybody's word",
            ),
            SourceAction::Finish {
                generation, round, ..
            } => {
                self.sent.attempt = Some(*generation);
                self.check_round(*round)
            }
            SourceAction::Journal(record) => match &record.entry {
                Entry::Commit { generation, .. } => self.demand(
                    self.sent.last == Some(*generation),
                    "the source commits another attempt than the final message was of",
                ),
                _ => Ok(()),
            },
            SourceAction::Send(message) => self.source_says(message),
            _ => Ok(()),
        }
    }

    fn check_round(&self, round: Round) -> Result<(), Violation> {
        self.demand(
            self.sent.last.is_none(),
            "the source sends a round after the final message",
        )?;
        let held = self.sent.held.map_or(Round::FIRST, Round::next);
        self.demand(
            round == held,
            "the source sends a round before the one before is held",
        )
    }

    fn source_says(&mut self, message: &SourceMessage) -> Result<(), Violation> {
        match message {
            SourceMessage::RoundEnd(_) => self.demand(
                self.sent.last.is_none(),
                "the source ends a round after the final message",
            ),
            SourceMessage::Final(last) => {
                let before = self.sent.last.replace(last.generation);
                self.demand(before.is_none(), "the source says final twice")?;
                self.demand(
                    self.sent.attempt == Some(last.generation),
                    "the final message is not of the attempt that was begun last",
                )
            }
            SourceMessage::Abort { .. }
            | SourceMessage::DrainLost { .. }
            | SourceMessage::Draining { .. }
            | SourceMessage::Go { .. }
            | SourceMessage::Offer(_)
            | SourceMessage::Query { .. }
            | SourceMessage::Settled { .. } => Ok(()),
        }
    }

    pub(super) fn source_hears(&mut self, message: &TargetMessage) {
        if let TargetMessage::RoundHeld { round } = message {
            self.sent.held = Some(*round);
        }
    }

    /// The attempt that the final message was of.
    pub(super) const fn final_generation(&self) -> Option<Generation> {
        self.sent.last
    }

    /// Reports that a freeze is given up of which `Final` was said.
    pub(super) fn retry_late(&mut self) {
        if self.sent.last.is_some() {
            self.at_source(retry(0, PageCount::ZERO));
        }
    }

    /// After the final message nothing is newer.
    pub(super) fn check_collected(&self) -> Result<(), Violation> {
        let last = self.target.taken.last;
        let collected = self.target.ledger.as_ref().map(Ledger::generation);
        self.demand(
            last.is_none() || collected.is_none() || collected == last,
            "the target collects another attempt than the final message is of",
        )
    }

    pub(super) fn check_final_held(&self) -> Result<(), Violation> {
        self.demand(
            self.target.taken.strayed.is_none(),
            "the target passes over a stream that cannot be",
        )
    }

    /// The first stray stream that the target took in before all of the final round was there.
    pub fn strayed(&self) -> Option<Strayed> {
        self.target.taken.strayed
    }

    /// The target hears which attempt is the last.
    pub(super) fn target_hears_final(&mut self, last: Generation) {
        self.target.taken.last = Some(last);
        if let Some(kind) = self.stray_next.take() {
            self.put_stray(kind);
        }
    }

    /// Puts a stray stream in flight, at once or when the target hears `Final`.
    pub(super) fn stray(&mut self, kind: u8) {
        if kind & 4 == 0 {
            self.put_stray(kind);
        } else if self.sent.last.is_none() {
            self.stray_next = Some(kind);
        }
    }

    /// It is of a round, or of an attempt, that no source ever comes to.
    fn put_stray(&mut self, kind: u8) {
        let (generation, space) = (Generation::LAST, SpaceId(1));
        self.put(match kind % 4 {
            0 => Stream::Digests {
                generation,
                space,
                pages: Vec::new(),
            },
            1 => Stream::Image {
                generation,
                name: 0,
            },
            2 => Stream::LiveSet {
                generation,
                space,
                live: PageSet::new(),
            },
            _ => Stream::Parcel {
                space,
                round: last_round(),
                pages: Vec::new(),
            },
        });
    }

    /// Notes a stray stream that arrives. Says whether it is to be taken in: once all of the final
    /// round is there, nothing is any more.
    pub(super) fn takes_in(&mut self, stream: &Stream) -> bool {
        let stray = match stream {
            Stream::AbsentSet { generation, .. }
            | Stream::Digests { generation, .. }
            | Stream::Image { generation, .. }
            | Stream::LiveSet { generation, .. } => *generation == Generation::LAST,
            Stream::Parcel { round, .. } => *round == last_round(),
            Stream::Fetched { .. } => false,
        };
        let taken = &mut self.target.taken;
        if stray && !taken.complete && self.target.ledger.is_some() {
            let when = match taken.last {
                Some(_) => Strayed::After,
                None => Strayed::Before,
            };
            taken.strayed.get_or_insert(when);
        }
        !stray || !taken.complete
    }
}

/// A round that no migration comes to.
fn last_round() -> Round {
    Round::new(u32::MAX).expect("it is not 0")
}
