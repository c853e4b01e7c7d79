//! What the target holds, and whether it is all that the source says.
//!
//! The ledger counts: parcels and pages of a round against the round's end, streams of the
//! final round against the final message, and held pages against live ones, per space. It knows
//! sets, not bytes; whoever decodes a parcel enters it here *after* its pages are in the store,
//! so the ledger only ever claims what is surely there.

use std::collections::BTreeMap;

use crate::id::{Round, SpaceId};
use crate::page::{PageCount, PageIndex};
use crate::set::PageSet;
use crate::wire::control::{Final, RoundEnd};

/// The ledger of one incoming migration.
#[derive(Clone, Debug)]
pub struct Ledger {
    held: BTreeMap<SpaceId, PageSet>,
    live: BTreeMap<SpaceId, PageSet>,
    open: Round,
    parcels: u32,
    pages: PageCount,
    images: u32,
    digests: u32,
    end: Option<RoundEnd>,
    last: Option<Final>,
}

/// Pages that the target holds and the workload no longer has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surplus {
    /// The space.
    pub space: SpaceId,
    /// The pages to drop.
    pub pages: PageSet,
}

/// Why what has arrived cannot be what the source sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A parcel or an end of a round that is not open.
    #[error("round {found} is not the open round {open}")]
    Round {
        /// The round that is open.
        open: Round,
        /// The round that was named.
        found: Round,
    },
    /// A second end of the open round.
    #[error("round {0} ends twice")]
    EndsTwice(Round),
    /// More parcels, pages or streams than the source says.
    #[error("{found} {what} have arrived, the source sent {sent}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many have arrived.
        found: u64,
        /// How many the source says.
        sent: u64,
    },
    /// As many parcels as the source says, with fewer pages.
    #[error("round {round} has {found} pages, the source sent {sent}")]
    Pages {
        /// The round.
        round: Round,
        /// How many have arrived.
        found: PageCount,
        /// How many the source says.
        sent: PageCount,
    },
    /// Two live sets of one space.
    #[error("space {0} has two live sets")]
    LiveTwice(SpaceId),
    /// Live pages that are not held.
    #[error("space {space} lacks {missing} live pages, the first is {first}")]
    Incomplete {
        /// The space.
        space: SpaceId,
        /// How many pages are missing.
        missing: PageCount,
        /// The first of them.
        first: PageIndex,
    },
    /// The final round has not ended.
    #[error("the final round has not arrived")]
    NotFinal,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// Nothing held, the first round open.
    pub const fn new() -> Self {
        Self {
            held: BTreeMap::new(),
            live: BTreeMap::new(),
            open: Round::FIRST,
            parcels: 0,
            pages: PageCount::ZERO,
            images: 0,
            digests: 0,
            end: None,
            last: None,
        }
    }

    /// The round whose parcels may arrive.
    pub const fn open(&self) -> Round {
        self.open
    }

    /// The pages held of a space.
    pub fn held(&self, space: SpaceId) -> Option<&PageSet> {
        self.held.get(&space)
    }

    /// The live pages of a space, once its live set has arrived.
    pub fn live(&self, space: SpaceId) -> Option<&PageSet> {
        self.live.get(&space)
    }

    /// A parcel is in the store.
    pub fn parcel(
        &mut self,
        space: SpaceId,
        round: Round,
        pages: &PageSet,
    ) -> Result<(), LedgerError> {
        self.expect_open(round)?;
        self.held.entry(space).or_default().union_with(pages);
        self.parcels = self.parcels.saturating_add(1);
        self.pages = PageCount(self.pages.0.saturating_add(pages.len().0));
        self.check_counts()
    }

    /// A live set has arrived.
    pub fn live_set(&mut self, space: SpaceId, live: PageSet) -> Result<(), LedgerError> {
        if self.live.insert(space, live).is_some() {
            return Err(LedgerError::LiveTwice(space));
        }
        self.check_counts()
    }

    /// An image file is complete.
    pub fn image(&mut self) -> Result<(), LedgerError> {
        self.images = self.images.saturating_add(1);
        self.check_counts()
    }

    /// A digests stream has been compared.
    pub fn digests(&mut self) -> Result<(), LedgerError> {
        self.digests = self.digests.saturating_add(1);
        self.check_counts()
    }

    /// The source has sent all of a round.
    pub fn round_end(&mut self, end: RoundEnd) -> Result<(), LedgerError> {
        self.expect_open(end.round)?;
        if self.end.replace(end).is_some() {
            return Err(LedgerError::EndsTwice(end.round));
        }
        self.check_counts()
    }

    /// The source has sent all of the final round.
    pub fn final_end(&mut self, last: Final) -> Result<(), LedgerError> {
        let Final {
            round,
            parcels,
            pages,
            ..
        } = last;
        self.last = Some(last);
        self.round_end(RoundEnd {
            round,
            parcels,
            pages,
        })
    }

    /// The open round, if it has ended and everything of it has arrived; the next one is open
    /// then. For the final round that includes live sets, images and digests.
    pub fn round_held(&mut self) -> Result<Option<Round>, LedgerError> {
        let Some(end) = self.end else { return Ok(None) };
        if self.parcels < end.parcels {
            return Ok(None);
        }
        if self.pages != end.pages {
            let (found, sent) = (self.pages, end.pages);
            return Err(LedgerError::Pages {
                round: end.round,
                found,
                sent,
            });
        }
        if let Some(last) = &self.last {
            let arrived = (self.live.len() as u64, self.images, self.digests);
            if arrived != (u64::from(last.live_sets), last.images, last.digests) {
                return Ok(None);
            }
        }
        self.end = None;
        self.parcels = 0;
        self.pages = PageCount::ZERO;
        self.open = end.round.next();
        Ok(Some(end.round))
    }

    /// After the final round: checks that every live page is held, and says what is held beyond
    /// that. The surplus is no longer held afterwards; the caller drops it from the store. A
    /// space without a live set is gone at the source, and all of it is surplus.
    pub fn settle(&mut self) -> Result<Vec<Surplus>, LedgerError> {
        if self.last.is_none() || self.end.is_some() {
            return Err(LedgerError::NotFinal);
        }
        let none = PageSet::new();
        for (&space, live) in &self.live {
            let missing = live.difference(self.held.get(&space).unwrap_or(&none));
            if let Some(first) = missing.runs().first() {
                let first = first.start();
                return Err(LedgerError::Incomplete {
                    space,
                    missing: missing.len(),
                    first,
                });
            }
        }
        let mut surplus = Vec::new();
        for (&space, held) in &mut self.held {
            let live = self.live.get(&space).unwrap_or(&none);
            let pages = held.difference(live);
            if !pages.is_empty() {
                held.clone_from(live);
                surplus.push(Surplus { space, pages });
            }
        }
        Ok(surplus)
    }

    fn expect_open(&self, found: Round) -> Result<(), LedgerError> {
        let open = self.open;
        if found != open {
            Err(LedgerError::Round { open, found })
        } else {
            Ok(())
        }
    }

    fn check_counts(&self) -> Result<(), LedgerError> {
        let check = |what, found: u64, sent: u64| {
            if sent < found {
                Err(LedgerError::TooMany { what, found, sent })
            } else {
                Ok(())
            }
        };
        if let Some(end) = &self.end {
            check("parcels", self.parcels.into(), end.parcels.into())?;
            check("pages", self.pages.0, end.pages.0)?;
        }
        if let Some(last) = &self.last {
            check("live sets", self.live.len() as u64, last.live_sets.into())?;
            check("images", self.images.into(), last.images.into())?;
            check("digests", self.digests.into(), last.digests.into())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Generation;
    use crate::page::PageRun;

    const SPACE: SpaceId = SpaceId(1);

    fn set(start: u64, count: u64) -> PageSet {
        PageSet::from(PageRun::new(PageIndex(start), PageCount(count)).unwrap())
    }

    fn end(round: Round, parcels: u32, pages: u64) -> RoundEnd {
        RoundEnd {
            round,
            parcels,
            pages: PageCount(pages),
        }
    }

    fn last(round: Round, parcels: u32, pages: u64) -> Final {
        Final {
            generation: Generation::FIRST,
            round,
            parcels,
            pages: PageCount(pages),
            live_sets: 1,
            images: 1,
            digests: 0,
            verify: false,
        }
    }

    // clause: R-3
    #[test]
    fn a_round_is_held_when_its_last_parcel_is_in() {
        let (mut ledger, round) = (Ledger::new(), Round::FIRST);
        ledger.parcel(SPACE, round, &set(0, 4)).unwrap();
        ledger.round_end(end(round, 2, 6)).unwrap();
        assert_eq!(ledger.round_held(), Ok(None));
        ledger.parcel(SPACE, round, &set(8, 2)).unwrap();
        assert_eq!(ledger.round_held(), Ok(Some(round)));
        assert_eq!(ledger.round_held(), Ok(None));
        assert_eq!(ledger.open(), round.next());
    }

    // clause: R-4
    #[test]
    fn only_the_open_round_takes_parcels() {
        let mut ledger = Ledger::new();
        let (open, found) = (Round::FIRST, Round::FIRST.next());
        let refused = Err(LedgerError::Round { open, found });
        assert_eq!(ledger.parcel(SPACE, found, &set(0, 1)), refused);
        assert_eq!(ledger.round_end(end(found, 0, 0)), refused);
        ledger.round_end(end(open, 1, 1)).unwrap();
        assert_eq!(
            ledger.round_end(end(open, 1, 1)),
            Err(LedgerError::EndsTwice(open))
        );
    }

    #[test]
    fn more_or_fewer_pages_than_sent_are_an_error() {
        let mut ledger = Ledger::new();
        ledger.round_end(end(Round::FIRST, 1, 3)).unwrap();
        let many = LedgerError::TooMany {
            what: "pages",
            found: 4,
            sent: 3,
        };
        assert_eq!(
            ledger.clone().parcel(SPACE, Round::FIRST, &set(0, 4)),
            Err(many)
        );
        ledger.parcel(SPACE, Round::FIRST, &set(0, 2)).unwrap();
        assert!(matches!(
            ledger.round_held(),
            Err(LedgerError::Pages { .. })
        ));
    }

    // clause: F-3
    #[test]
    fn every_live_page_must_be_held_and_the_rest_is_dropped() {
        let mut ledger = Ledger::new();
        ledger.parcel(SPACE, Round::FIRST, &set(0, 10)).unwrap();
        ledger.parcel(SpaceId(2), Round::FIRST, &set(5, 1)).unwrap();
        ledger.final_end(last(Round::FIRST, 2, 11)).unwrap();
        assert_eq!(ledger.settle(), Err(LedgerError::NotFinal));
        ledger.image().unwrap();
        assert_eq!(ledger.round_held(), Ok(None));
        let mut lacking = ledger.clone();
        lacking.live_set(SPACE, set(4, 8)).unwrap();
        assert_eq!(lacking.round_held(), Ok(Some(Round::FIRST)));
        let (missing, first) = (PageCount(2), PageIndex(10));
        let incomplete = LedgerError::Incomplete {
            space: SPACE,
            missing,
            first,
        };
        assert_eq!(lacking.settle(), Err(incomplete));
        ledger.live_set(SPACE, set(4, 2)).unwrap();
        assert_eq!(ledger.round_held(), Ok(Some(Round::FIRST)));
        let surplus = ledger.settle().unwrap();
        let pages = set(0, 4).union(&set(6, 4));
        assert_eq!(
            surplus,
            [
                Surplus {
                    space: SPACE,
                    pages
                },
                Surplus {
                    space: SpaceId(2),
                    pages: set(5, 1)
                },
            ]
        );
        assert_eq!(ledger.held(SPACE), Some(&set(4, 2)));
    }

    // clause: F-2
    #[test]
    fn a_space_has_one_live_set() {
        let mut ledger = Ledger::new();
        ledger.live_set(SPACE, set(0, 1)).unwrap();
        assert_eq!(
            ledger.live_set(SPACE, set(1, 1)),
            Err(LedgerError::LiveTwice(SPACE))
        );
    }
}
