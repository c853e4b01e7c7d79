//! With `--verify`: whether what is held is what the source has.

use std::time::Instant;

use pageferry_proto::id::SpaceId;
use pageferry_proto::page::PageCount;
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::Shared;
use crate::migration::text::internal;

impl Shared {
    /// Compares the digests of the source with those of the store: all of it is in memory, so this
    /// takes a few nanoseconds for each page. That there is one of each live page the ledger has
    /// said.
    pub(super) fn verify(&self) -> Result<(), Failure> {
        let began = Instant::now();
        let books = self.lock();
        let mut compared = PageCount::ZERO;
        for (id, pages, theirs) in &books.attempt.digests {
            let space = self.receiver.store().space(*id);
            let space = space.map_err(|error| internal(&error))?;
            if let Some(page) = space.first_difference(pages, theirs) {
                let text = format!("space {id}: the page at {:#x} differs", page.address());
                return Err(Failure::new(ErrorCode::VerifyMismatch, text));
            }
            compared.0 += pages.len().0;
        }
        for id in books.ledger.live().keys() {
            self.weigh(*id)?;
        }
        let took = began.elapsed();
        tracing::info!(pages = %compared, ?took, "every live page is the same on both sides");
        Ok(())
    }

    /// Checks that the file of a space still has as many pages as were written to it: digests are
    /// not made again, so that a page that was lost since would not be missed.
    fn weigh(&self, id: SpaceId) -> Result<(), Failure> {
        let space = self.receiver.store().space(id);
        let space = space.map_err(|error| internal(&error))?;
        let (written, _) = space.held_pages();
        let bytes = space.resident_bytes().map_err(|error| internal(&error))?;
        if written.bytes() <= bytes {
            return Ok(());
        }
        let text = format!("space {id}: {written} pages take {bytes} bytes of the store");
        Err(Failure::new(ErrorCode::VerifyMismatch, text))
    }
}
