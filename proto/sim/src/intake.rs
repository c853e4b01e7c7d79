//! What the target does with streams.

use super::node::Stream;
use super::world::World;
use pageferry_proto::id::SpaceId;
use pageferry_proto::migration::ledger::{Account, Arrival, LedgerError};
use pageferry_proto::migration::target::TargetEvent;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::node::TargetJob;

impl World {
    /// A data stream arrives. Its pages are in the store before the ledger knows of them.
    pub(super) fn stream(&mut self, place: usize) {
        let stream = self.streams.remove(place);
        if let Stream::Fetched { space, pages } = &stream {
            return self.fetched(*space, pages);
        }
        if !self.takes_in(&stream) {
            return;
        }
        let Some(ledger) = &mut self.target.ledger else {
            return;
        };
        let attempt = &mut self.target.attempt;
        let entered = match stream {
            Stream::AbsentSet {
                generation,
                space,
                absent,
            } => ledger.absent_set(generation, space, absent).map(drop),
            Stream::Fetched { .. } => Ok(()),
            Stream::Digests {
                generation,
                space,
                pages,
            } => ledger
                .digests(generation, space, set_of(&pages))
                .map(|arrival| {
                    attempt.belong_to(ledger.generation());
                    if arrival == Arrival::Kept {
                        attempt.digests.push((space, pages));
                    }
                }),
            Stream::Image { generation, name } => ledger.image(generation).map(|arrival| {
                attempt.belong_to(ledger.generation());
                if arrival == Arrival::Kept {
                    attempt.images.insert(name, generation);
                }
            }),
            Stream::LiveSet {
                generation,
                space,
                live,
            } => ledger.live_set(generation, space, live).map(drop),
            Stream::Parcel {
                space,
                round,
                pages,
            } => match ledger.admit(round) {
                Ok(admitted) => {
                    let count = PageCount(pages.len() as u64);
                    for (page, version) in pages {
                        self.target.store.insert(space, page, version);
                    }
                    ledger.parcel(admitted, space, count)
                }
                Err(error) => Err(error),
            },
        };
        self.enter(entered);
    }

    /// After every entry in the ledger: is the open round complete?
    pub(super) fn enter(&mut self, entered: Result<(), LedgerError>) {
        let Some(ledger) = &mut self.target.ledger else {
            return;
        };
        self.target.attempt.belong_to(ledger.generation());
        let event = match entered.and_then(|()| ledger.round_held()) {
            Ok(None) => return,
            Ok(Some(round)) => match ledger.settle(&self.target.store.held()) {
                Ok(accounts) => {
                    self.target.taken.complete = true;
                    self.keep(&accounts);
                    self.verified()
                }
                Err(LedgerError::NotFinal) => TargetEvent::RoundStored { round },
                Err(error) => ledger_failure(&error),
            },
            Err(error) => {
                // Nothing more is taken in.
                self.target.ledger = None;
                ledger_failure(&error)
            }
        };
        self.target.jobs.push(TargetJob::Stored(event));
    }

    /// Drops what is not to be, and remembers what is still to come.
    fn keep(&mut self, accounts: &[Account]) {
        self.expect(accounts);
        for account in accounts {
            let surplus = self.sabotaged_surplus(account);
            self.target.store.remove(account.space, &surplus);
        }
    }

    /// Whether each digest is that of the page in the store.
    fn verified(&self) -> TargetEvent {
        let store = &self.target.store;
        let equal = |(space, pages): &(SpaceId, Vec<(u64, u32)>)| {
            store.read(*space, &set_of(pages)) == *pages
        };
        if self.target.attempt.digests.iter().all(equal) {
            TargetEvent::FinalStored
        } else {
            let text = "the digests are not those of the store";
            TargetEvent::Failure(Failure::new(ErrorCode::VerifyMismatch, text))
        }
    }
}

pub(super) fn set_of(pages: &[(u64, u32)]) -> PageSet {
    let run = |(page, _): &(u64, u32)| PageRun::new(PageIndex(*page), PageCount(1));
    let set = pages.iter().map(run).collect::<Result<PageSet, _>>();
    set.expect("small page numbers")
}

fn ledger_failure(error: &LedgerError) -> TargetEvent {
    TargetEvent::Failure(Failure::new(error.code(), error.to_string()))
}
