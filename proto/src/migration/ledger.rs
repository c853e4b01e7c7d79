//! What the target holds, and whether it is all that the source says.
//!
//! The ledger counts: parcels and pages of a round against the round's end, streams of the
//! final round against the final message, and held pages against live ones, per space. It knows
//! sets, not bytes, and not what is held: that only the store knows, which says so once, at the end
//! ([`Ledger::settle`]). Whoever takes in a parcel asks [`Ledger::admit`] before its pages go to
//! the store, and enters it here *after* they are in it, so the ledger only ever claims what is
//! surely there.
//!
//! Live sets, images and digests belong to an attempt at the final round. The ledger collects
//! those of the newest generation it has heard of: what is older was given up by the source, and
//! may still be on its way.

mod error;

use std::collections::BTreeMap;

use crate::id::{Generation, Round, SpaceId};
use crate::page::{PageCount, PageIndex};
use crate::set::PageSet;
use crate::wire::control::{Final, RoundEnd};
pub use error::LedgerError;

/// The ledger of one incoming migration.
#[derive(Clone, Debug)]
pub struct Ledger {
    open: Round,
    /// Parcels of the open round that may go to the store, or are in it.
    admitted: u32,
    /// Those that are in it.
    parcels: u32,
    pages: PageCount,
    /// Differences of the open round that are applied.
    files: u32,
    end: Option<RoundEnd>,
    last: Option<Final>,
    /// Pages in all parcels of a space, each as often as it came.
    received: BTreeMap<SpaceId, PageCount>,
    /// The newest attempt that anything arrived of; the rest is of it alone.
    generation: Generation,
    live: BTreeMap<SpaceId, PageSet>,
    /// Live pages that are not sent, or not in their last version.
    absent: BTreeMap<SpaceId, PageSet>,
    images: u32,
    digests: u32,
    /// The pages of every digests stream.
    digested: BTreeMap<SpaceId, Vec<PageSet>>,
}

/// A parcel that may go to the store, and is not in it yet. Its round stays open until it is.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its round is not held before it is entered"]
pub struct Admitted(Round);

/// What becomes of a stream that belongs to an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Arrival {
    /// It is of the attempt that is collected.
    Kept,
    /// It is of an attempt that was given up: to be dropped.
    Late,
}

/// What a store holds of a space, each page as the parcel that came last has left it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldPages {
    /// Pages with contents.
    pub data: PageSet,
    /// Pages that are zero.
    pub zero: PageSet,
}

impl HeldPages {
    /// All of them.
    pub fn pages(&self) -> PageSet {
        self.data.union(&self.zero)
    }
}

/// By which path the live pages of a space came, once they are complete: `data`, `zero` and
/// `absent` add up to `live`; `data`, `zero`, `surplus` and `replaced` to `received`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The space.
    pub space: SpaceId,
    /// Pages of its live set; none without one.
    pub live: PageCount,
    /// Live pages whose last version came with contents.
    pub data: PageCount,
    /// Live pages whose last version is zero.
    pub zero: PageCount,
    /// Live pages that are still to come.
    pub absent: PageSet,
    /// Pages that are held and not to be: the workload has given them back, or they are absent.
    pub surplus: PageSet,
    /// Pages of which a newer version came.
    pub replaced: PageCount,
    /// Pages in all parcels.
    pub received: PageCount,
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
            open: Round::FIRST,
            admitted: 0,
            parcels: 0,
            pages: PageCount::ZERO,
            files: 0,
            end: None,
            last: None,
            received: BTreeMap::new(),
            generation: Generation::FIRST,
            live: BTreeMap::new(),
            absent: BTreeMap::new(),
            images: 0,
            digests: 0,
            digested: BTreeMap::new(),
        }
    }

    /// The round whose parcels may arrive.
    pub const fn open(&self) -> Round {
        self.open
    }

    /// The attempt that is collected.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The live sets that have arrived of the attempt that is collected.
    pub const fn live(&self) -> &BTreeMap<SpaceId, PageSet> {
        &self.live
    }

    /// The absent sets that have arrived of the attempt that is collected.
    pub const fn absent(&self) -> &BTreeMap<SpaceId, PageSet> {
        &self.absent
    }

    /// Whether a parcel of this round may go to the store: its round is open, and it is not one
    /// more than the source says. To be asked before its pages take the place of others.
    pub fn admit(&mut self, round: Round) -> Result<Admitted, LedgerError> {
        self.expect_open(round)?;
        self.admitted = self.admitted.saturating_add(1);
        self.check_counts()?;
        Ok(Admitted(round))
    }

    /// An admitted parcel, of so many pages of a space, is in the store.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "what was admitted once is entered once"
    )]
    pub fn parcel(
        &mut self,
        admitted: Admitted,
        space: SpaceId,
        pages: PageCount,
    ) -> Result<(), LedgerError> {
        self.expect_open(admitted.0)?;
        let received = self.received.entry(space).or_default();
        received.0 = received.0.saturating_add(pages.0);
        self.parcels = self.parcels.saturating_add(1);
        self.pages = PageCount(self.pages.0.saturating_add(pages.0));
        self.check_counts()
    }

    /// Whether a difference of this round may be applied. To be asked before anything of it is.
    pub fn admit_files(&self, round: Round) -> Result<(), LedgerError> {
        self.expect_open(round)
    }

    /// A difference of this round is applied, and what it was applied to is proven.
    pub fn files(&mut self, round: Round) -> Result<(), LedgerError> {
        self.expect_open(round)?;
        self.files = self.files.saturating_add(1);
        self.check_counts()
    }

    /// Something of an attempt is arriving. Of a newer attempt than any before, it ends the
    /// collection of the older one: whoever stores what the ledger counts drops that then.
    pub fn collect(&mut self, generation: Generation) -> Result<Arrival, LedgerError> {
        let last = self.last.as_ref().map(|last| last.generation);
        if let Some(last) = last.filter(|last| *last < generation) {
            let found = generation;
            return Err(LedgerError::Generation { last, found });
        }
        if generation < self.generation {
            return Ok(Arrival::Late);
        }
        self.advance(generation);
        Ok(Arrival::Kept)
    }

    /// A live set has arrived.
    pub fn live_set(
        &mut self,
        generation: Generation,
        space: SpaceId,
        live: PageSet,
    ) -> Result<Arrival, LedgerError> {
        if self.collect(generation)? == Arrival::Late {
            return Ok(Arrival::Late);
        }
        if self.live.insert(space, live).is_some() {
            return Err(LedgerError::LiveTwice(space));
        }
        self.check_counts().map(|()| Arrival::Kept)
    }

    /// A set of live pages has arrived that are not sent, or not in their last version.
    pub fn absent_set(
        &mut self,
        generation: Generation,
        space: SpaceId,
        absent: PageSet,
    ) -> Result<Arrival, LedgerError> {
        if self.collect(generation)? == Arrival::Late {
            return Ok(Arrival::Late);
        }
        if self.absent.insert(space, absent).is_some() {
            return Err(LedgerError::AbsentTwice(space));
        }
        self.check_counts().map(|()| Arrival::Kept)
    }

    /// An image file is complete.
    pub fn image(&mut self, generation: Generation) -> Result<Arrival, LedgerError> {
        if self.collect(generation)? == Arrival::Late {
            return Ok(Arrival::Late);
        }
        self.images = self.images.saturating_add(1);
        self.check_counts().map(|()| Arrival::Kept)
    }

    /// A stream has arrived with a digest of each of these pages.
    pub fn digests(
        &mut self,
        generation: Generation,
        space: SpaceId,
        pages: PageSet,
    ) -> Result<Arrival, LedgerError> {
        if self.collect(generation)? == Arrival::Late {
            return Ok(Arrival::Late);
        }
        self.digested.entry(space).or_default().push(pages);
        self.digests = self.digests.saturating_add(1);
        self.check_counts().map(|()| Arrival::Kept)
    }

    fn advance(&mut self, generation: Generation) {
        if self.generation < generation {
            self.generation = generation;
            self.live.clear();
            self.absent.clear();
            self.digested.clear();
            (self.images, self.digests) = (0, 0);
        }
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
            generation,
            round,
            parcels,
            pages,
            files,
            ..
        } = last;
        self.expect_open(round)?;
        if generation < self.generation {
            let (last, found) = (generation, self.generation);
            return Err(LedgerError::Generation { last, found });
        }
        self.advance(generation);
        self.last = Some(last);
        self.round_end(RoundEnd {
            round,
            parcels,
            pages,
            files,
        })
    }

    /// The open round, if it has ended and everything of it has arrived; the next one is open
    /// then, if there is one. For the final round that includes live sets, images and digests.
    pub fn round_held(&mut self) -> Result<Option<Round>, LedgerError> {
        let Some(end) = self.end else { return Ok(None) };
        if self.parcels < end.parcels.max(self.admitted) || self.files < end.files {
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
            let sets = (self.live.len() as u64, self.absent.len() as u64);
            let arrived = (sets, self.images, self.digests);
            let sets = (last.live_sets.into(), last.absent_sets.into());
            if arrived != (sets, last.images, last.digests) {
                return Ok(None);
            }
            let (found, sent) = (self.absent_pages(), last.absent_pages);
            if found != sent {
                return Err(LedgerError::AbsentPages { found, sent });
            }
        }
        self.end = None;
        (self.admitted, self.parcels) = (0, 0);
        (self.pages, self.files) = (PageCount::ZERO, 0);
        self.open = end.round.next();
        Ok(Some(end.round))
    }

    /// After the final round: checks that every live page is held or absent, and digested if the
    /// final message says so, and accounts for every page that came. The caller then drops the
    /// surplus from the store: also what is held of absent pages, which is outdated. A space
    /// without a live set is gone at the source, and all of it is surplus.
    pub fn settle(&self, held: &BTreeMap<SpaceId, HeldPages>) -> Result<Vec<Account>, LedgerError> {
        let last = match &self.last {
            Some(last) if self.end.is_none() => last,
            Some(_) | None => return Err(LedgerError::NotFinal),
        };
        let (none, nothing) = (PageSet::new(), HeldPages::default());
        let named = self.live.keys().chain(self.absent.keys());
        let mut spaces: Vec<SpaceId> = named.chain(held.keys()).copied().collect();
        spaces.sort_unstable();
        spaces.dedup();
        let account = |space| {
            let live = self.live.get(&space).unwrap_or(&none);
            self.account(space, live, held.get(&space).unwrap_or(&nothing))
        };
        let accounts = spaces.into_iter().map(account).collect();
        if last.verify {
            self.check_digests()?;
        }
        accounts
    }

    fn account(
        &self,
        space: SpaceId,
        live: &PageSet,
        held: &HeldPages,
    ) -> Result<Account, LedgerError> {
        let received = self.received.get(&space).copied().unwrap_or_default();
        let (data, zero) = (held.data.len(), held.zero.len());
        let both = held.data.intersection(&held.zero).len();
        let replaced = received.0.checked_sub(data.0.saturating_add(zero.0));
        let (Some(replaced), PageCount::ZERO) = (replaced, both) else {
            return Err(LedgerError::Count {
                space,
                data,
                zero,
                both,
                received,
            });
        };
        let absent = self.absent_of(space, live)?;
        let present = live.difference(&absent);
        let (live_data, live_zero) = (
            held.data.intersection(&present),
            held.zero.intersection(&present),
        );
        let (live_pages, data, zero) = (live.len(), live_data.len(), live_zero.len());
        if data.0 + zero.0 != present.len().0 {
            let missing = present.difference(&live_data.union(&live_zero));
            let first = missing.runs().first().map(|run| run.start());
            return Err(LedgerError::Incomplete {
                space,
                live: live_pages,
                data,
                zero,
                missing: missing.len(),
                first: first.unwrap_or(PageIndex(0)),
            });
        }
        let surplus = held.pages().difference(&present);
        Ok(Account {
            space,
            live: live_pages,
            data,
            zero,
            absent,
            surplus,
            replaced: PageCount(replaced),
            received,
        })
    }

    fn absent_of(&self, space: SpaceId, live: &PageSet) -> Result<PageSet, LedgerError> {
        let absent = self.absent.get(&space).cloned().unwrap_or_default();
        let strange = absent.difference(live).len();
        if strange != PageCount::ZERO {
            return Err(LedgerError::AbsentNotLive {
                space,
                live: live.len(),
                absent: absent.len(),
                strange,
            });
        }
        Ok(absent)
    }

    fn absent_pages(&self) -> PageCount {
        self.absent.values().map(PageSet::len).sum()
    }

    /// Whether every live page has exactly one digest, and no other page has any.
    fn check_digests(&self) -> Result<(), LedgerError> {
        let none = PageSet::new();
        for &space in self.live.keys().chain(self.digested.keys()) {
            let live = self.live.get(&space).unwrap_or(&none);
            let sets = self.digested.get(&space).map_or(&[][..], Vec::as_slice);
            let digests = sets.iter().map(PageSet::len).sum();
            let runs = sets.iter().flat_map(|pages| pages.runs());
            if digests != live.len() || PageSet::from_runs(runs.copied()) != *live {
                let live = live.len();
                return Err(LedgerError::Digests {
                    space,
                    digests,
                    live,
                });
            }
        }
        Ok(())
    }

    fn expect_open(&self, found: Round) -> Result<(), LedgerError> {
        let open = self.open;
        match &self.last {
            Some(last) if last.round != open => {
                let last = last.round;
                Err(LedgerError::Over { last, found })
            }
            _ if found != open => Err(LedgerError::Round { open, found }),
            Some(_) | None => Ok(()),
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
            check("parcels", self.admitted.into(), end.parcels.into())?;
            check("pages", self.pages.0, end.pages.0)?;
            check(
                "differences of folders",
                self.files.into(),
                end.files.into(),
            )?;
        }
        if let Some(last) = &self.last {
            check("live sets", self.live.len() as u64, last.live_sets.into())?;
            let absent_sets = self.absent.len() as u64;
            check("absent sets", absent_sets, last.absent_sets.into())?;
            check("images", self.images.into(), last.images.into())?;
            check("digests", self.digests.into(), last.digests.into())?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
