//! Pages of the final round that could not be read: the target holds older ones, or none.
//!
//! In a round such pages stay dirty and the next one sends them. After the final round there is no
//! next one, so that the freeze must not go on: it is tried once more, since what failed may have
//! been memory that was short for a moment, and then the migration ends.

use std::collections::BTreeMap;

use pageferry_pages::track::FinalScan;
use pageferry_proto::id::SpaceId;
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};

/// What of a round was not sent.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    /// Pages that could not be read, with the process they are of.
    pub(super) unread: BTreeMap<SpaceId, (i32, PageSet)>,
    /// Processes that ended meanwhile.
    pub(super) ended: Vec<i32>,
}

/// What the final round found unreadable, of all freezes so far.
#[derive(Debug, Default)]
pub(super) struct Unreadable(BTreeMap<SpaceId, PageSet>);

/// Why the freeze cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may be different the next time.
    Again(Failure),
    /// It was so before.
    Never(Failure),
}

impl Unsent {
    /// Forgets pages that the workload has no more.
    pub(super) fn keep(&mut self, scans: &BTreeMap<SpaceId, FinalScan>) {
        self.unread.retain(|id, (_, pages)| {
            *pages = scans
                .get(id)
                .map_or_else(PageSet::new, |scan| pages.intersection(&scan.live));
            !pages.is_empty()
        });
    }

    /// Whether the target gets all.
    pub(super) fn is_empty(&self) -> bool {
        self.unread.is_empty() && self.ended.is_empty()
    }
}

impl Unreadable {
    /// What becomes of a final round of which `unsent` is missing, for a tree below `root`; none if
    /// that is nothing.
    pub(super) fn judge(&mut self, unsent: &Unsent, root: i32) -> Option<Verdict> {
        if let Some(pid) = unsent.ended.first() {
            let text = format!("process {pid} has ended while the tree was frozen");
            let failure = Failure::new(ErrorCode::WorkloadGone, text);
            let never = unsent.ended.contains(&root);
            return Some(if never {
                Verdict::Never(failure)
            } else {
                Verdict::Again(failure)
            });
        }
        let mut found = None;
        let mut before = false;
        for (id, (pid, pages)) in &unsent.unread {
            let known = self.0.entry(*id).or_default();
            before |= !known.intersection(pages).is_empty();
            known.union_with(pages);
            found.get_or_insert((*pid, pages));
        }
        let (pid, pages) = found?;
        let failure = pages_unread(pid, pages);
        Some(if before {
            Verdict::Never(failure)
        } else {
            Verdict::Again(failure)
        })
    }
}

/// Says which live pages cannot be read.
pub(super) fn pages_unread(pid: i32, pages: &PageSet) -> Failure {
    let first = pages.runs().first().map_or(0, |run| run.address());
    let text = format!(
        "{} live pages of process {pid} cannot be read, the first at {first:#x}: the kernel's log \
         may say more of memory or swap that fails",
        pages.len()
    );
    Failure::new(ErrorCode::PagesUnread, text)
}

#[cfg(test)]
mod tests {
    use pageferry_proto::page::{PageCount, PageIndex, PageRun};

    use super::*;

    fn unread(pages: &[(u64, u64)]) -> Unsent {
        let runs = pages.iter();
        let runs = runs.map(|(at, count)| PageRun::new(PageIndex(*at), PageCount(*count)).unwrap());
        let pages = (9, PageSet::from_runs(runs));
        Unsent {
            unread: BTreeMap::from([(SpaceId(1), pages)]),
            ended: Vec::new(),
        }
    }

    #[test]
    fn pages_that_cannot_be_read_again_end_what_others_only_delay() {
        let mut misses = Unreadable::default();
        assert_eq!(misses.judge(&Unsent::default(), 9), None);
        let first = misses.judge(&unread(&[(0x10, 2)]), 9);
        let Some(Verdict::Again(failure)) = first else {
            panic!("{first:?}");
        };
        assert_eq!(failure.code(), ErrorCode::PagesUnread);
        let text = "2 live pages of process 9 cannot be read, the first at 0x10000:";
        assert!(failure.text().starts_with(text), "{failure}");
        let other = misses.judge(&unread(&[(0x20, 2)]), 9);
        assert!(matches!(other, Some(Verdict::Again(_))), "{other:?}");
        assert_eq!(misses.judge(&Unsent::default(), 9), None);
        let known = misses.judge(&unread(&[(0x11, 1), (0x30, 4)]), 9);
        assert!(matches!(known, Some(Verdict::Never(_))), "{known:?}");
    }

    #[test]
    fn a_process_that_ends_in_the_freeze_delays_it_unless_it_is_the_root() {
        let judge = |pids: &[i32]| {
            let ended = pids.to_vec();
            Unreadable::default().judge(
                &Unsent {
                    ended,
                    ..unread(&[(1, 1)])
                },
                9,
            )
        };
        assert!(matches!(judge(&[12]), Some(Verdict::Again(_))));
        assert!(matches!(judge(&[12, 9]), Some(Verdict::Never(_))));
    }
}
