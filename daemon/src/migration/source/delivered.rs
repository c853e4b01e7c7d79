//! What the target has of each space in its present version, as far as the source knows: what was
//! sent, less what was written since.
//!
//! The target can say whether it holds every live page, but not whether it is the last version of
//! it: a page that a dead program of the same number has left there would pass. So before the final
//! message the source asks here, too. Nothing else depends on it.

use std::collections::BTreeMap;

use pageferry_proto::id::SpaceId;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};

/// Pages that were sent and not written since, per space.
#[derive(Debug, Default)]
pub struct Delivered(BTreeMap<SpaceId, PageSet>);

impl Delivered {
    /// A space begins, or a number names another one now: nothing of it is there.
    pub(super) fn begin(&mut self, space: SpaceId) {
        self.0.insert(space, PageSet::new());
    }

    /// Pages have been sent, but for those that could not be read.
    pub(super) fn sent(&mut self, space: SpaceId, pages: &PageSet, unread: &PageSet) {
        let delivered = self.0.entry(space).or_default();
        if unread.is_empty() {
            delivered.union_with(pages);
        } else {
            delivered.union_with(&pages.difference(unread));
        }
    }

    /// Pages were found written since the last scan.
    pub(super) fn written(&mut self, space: SpaceId, dirty: &PageSet) {
        if let Some(delivered) = self.0.get_mut(&space) {
            delivered.difference_with(dirty);
        }
    }

    /// Which of the live pages of a space were not sent in their present version.
    pub(super) fn lacks(&self, space: SpaceId, live: &PageSet) -> PageSet {
        let none = PageSet::new();
        live.difference(self.0.get(&space).unwrap_or(&none))
    }

    /// Whether every live page of a space has been sent in its present version.
    pub(super) fn check(&self, space: SpaceId, live: &PageSet) -> Result<(), Failure> {
        let missing = self.lacks(space, live);
        let Some(first) = missing.runs().first() else {
            return Ok(());
        };
        let text = format!(
            "{} of {} live pages of space {space} were not sent as they are now, \
                     the first at {:#x}",
            missing.len(),
            live.len(),
            first.address()
        );
        Err(Failure::new(ErrorCode::LedgerIncomplete, text))
    }
}

#[cfg(test)]
mod tests {
    use pageferry_proto::page::{PageCount, PageIndex, PageRun};

    use super::*;

    const SPACE: SpaceId = SpaceId(7);

    fn set(start: u64, count: u64) -> PageSet {
        PageSet::from(PageRun::new(PageIndex(start), PageCount(count)).unwrap())
    }

    fn delivered() -> Delivered {
        let mut delivered = Delivered::default();
        delivered.begin(SPACE);
        delivered.sent(SPACE, &set(0, 10), &PageSet::new());
        delivered
    }

    fn lacks(delivered: &Delivered, live: &PageSet, text: &str) {
        let failure = delivered.check(SPACE, live).unwrap_err();
        assert_eq!(failure.code(), ErrorCode::LedgerIncomplete);
        assert_eq!(failure.text(), text);
    }

    #[test]
    fn pages_that_were_sent_and_not_written_since_are_there() {
        let mut delivered = delivered();
        delivered.check(SPACE, &set(0, 10)).unwrap();
        delivered.written(SPACE, &set(3, 2));
        delivered.check(SPACE, &set(5, 5)).unwrap();
        let text =
            "2 of 10 live pages of space 7 were not sent as they are now, the first at 0x3000";
        lacks(&delivered, &set(0, 10), text);
        delivered.sent(SPACE, &set(3, 2), &PageSet::new());
        delivered.check(SPACE, &set(0, 10)).unwrap();
    }

    #[test]
    fn a_page_that_could_not_be_read_is_not_there() {
        let mut delivered = delivered();
        delivered.sent(SPACE, &set(10, 5), &set(12, 1));
        let text =
            "1 of 15 live pages of space 7 were not sent as they are now, the first at 0xc000";
        lacks(&delivered, &set(0, 15), text);
    }

    #[test]
    fn what_a_program_of_the_same_number_has_left_does_not_count() {
        let mut delivered = delivered();
        delivered.begin(SPACE);
        let text = "1 of 1 live pages of space 7 were not sent as they are now, the first at 0x0";
        lacks(&delivered, &set(0, 1), text);
    }
}
