//! Cutting hidden addresses out of what the kernel found, and filling in what is known of them.
//! Pure.

use crate::layout::Range;

/// `struct page_region` of `linux/fs.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// A scan's answer after cutting.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub regions: Vec<Region>,
    /// Where the scan must be taken up again, if not everything found could be told.
    pub walk_end: Option<u64>,
}

/// Takes `hidden` out of `found`; both are sorted and disjoint. A region with a hole in it becomes
/// two, so there may be more than `limit` of them: then the rest is left for the next scan.
///
/// `None` when there is no memory for it.
pub fn cut(found: &[Region], hidden: &[Range], limit: usize) -> Option<Answer> {
    let mut regions = Vec::new();
    // Every hidden range splits at most one region.
    regions
        .try_reserve_exact(found.len().checked_add(hidden.len())?)
        .ok()?;
    let mut next = 0;
    for region in found {
        let mut rest = *region;
        while hidden
            .get(next)
            .is_some_and(|range| range.end <= rest.start)
        {
            next += 1;
        }
        for range in hidden
            .get(next..)?
            .iter()
            .take_while(|range| range.start < rest.end)
        {
            if range.start > rest.start {
                regions.push(Region {
                    end: range.start,
                    ..rest
                });
            }
            rest.start = range.end.max(rest.start).min(rest.end);
        }
        if rest.start < rest.end {
            regions.push(rest);
        }
    }
    let walk_end = regions.get(limit).map(|region| region.start);
    regions.truncate(limit);
    Some(Answer { regions, walk_end })
}

/// `PAGE_IS_GUARD` of `linux/fs.h`.
pub const GUARD: u64 = 1 << 8;

/// Joins `guards`, which are all there are within `hidden`, with what `scan` finds in the gaps
/// between the hidden ranges of `wanted`. `scan` appends what it finds from the start of a gap on,
/// and says how far it came.
///
/// `None` when there is no memory for it, or the scan fails or makes no progress.
pub fn fill(
    wanted: Range,
    hidden: &[Range],
    guards: &[Range],
    limit: usize,
    mut scan: impl FnMut(Range, &mut Vec<Region>) -> Option<u64>,
) -> Option<Answer> {
    let mut regions = Vec::new();
    let mut guards = guards.iter().peekable();
    let mut at = wanted.start;
    let last = Range {
        start: wanted.end,
        end: wanted.end,
    };
    for range in hidden.iter().chain([&last]) {
        let gap_end = range.start.min(wanted.end);
        while at < gap_end && regions.len() <= limit {
            let gap = Range {
                start: at,
                end: gap_end,
            };
            let walked = scan(gap, &mut regions)?;
            if walked <= at || walked > gap_end {
                return None;
            }
            at = walked;
        }
        if regions.len() > limit {
            break;
        }
        while let Some(guard) = guards.next_if(|guard| guard.start < range.end) {
            regions.try_reserve(1).ok()?;
            regions.push(Region {
                start: guard.start.max(wanted.start),
                end: guard.end.min(wanted.end),
                categories: GUARD,
            });
        }
        at = at.max(range.end.min(wanted.end));
    }
    let walk_end = regions.get(limit).map(|region| region.start);
    regions.truncate(limit);
    Some(Answer { regions, walk_end })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region((start, end): (u64, u64)) -> Region {
        Region {
            start,
            end,
            categories: 8,
        }
    }

    fn check(
        found: &[(u64, u64)],
        hidden: &[(u64, u64)],
        limit: usize,
        expected: (&[(u64, u64)], Option<u64>),
    ) {
        let found: Vec<_> = found.iter().copied().map(region).collect();
        let hidden: Vec<_> = hidden
            .iter()
            .map(|&(start, end)| Range { start, end })
            .collect();
        let answer = cut(&found, &hidden, limit).expect("there is memory");
        let regions: Vec<_> = expected.0.iter().copied().map(region).collect();
        assert_eq!(
            answer,
            Answer {
                regions,
                walk_end: expected.1
            }
        );
    }

    #[test]
    fn hidden_addresses_are_cut_out_of_every_region() {
        check(&[(0, 10)], &[], 9, (&[(0, 10)], None));
        check(&[(0, 10)], &[(0, 10)], 9, (&[], None));
        check(&[(0, 10)], &[(2, 4)], 9, (&[(0, 2), (4, 10)], None));
        check(
            &[(2, 4), (6, 9)],
            &[(0, 3), (7, 20)],
            9,
            (&[(3, 4), (6, 7)], None),
        );
        check(
            &[(0, 10)],
            &[(0, 2), (4, 5), (9, 12)],
            9,
            (&[(2, 4), (5, 9)], None),
        );
        check(
            &[(0, 10), (20, 30)],
            &[(5, 25)],
            9,
            (&[(0, 5), (25, 30)], None),
        );
        check(
            &[(5, 6), (8, 9)],
            &[(0, 4), (6, 8)],
            9,
            (&[(5, 6), (8, 9)], None),
        );
    }

    #[test]
    fn what_does_not_fit_is_left_for_the_next_scan() {
        check(&[(0, 10)], &[(2, 4)], 1, (&[(0, 2)], Some(4)));
        check(
            &[(0, 10), (12, 13)],
            &[(2, 4), (6, 7)],
            3,
            (&[(0, 2), (4, 6), (7, 10)], Some(12)),
        );
        check(&[(0, 10)], &[(2, 4)], 2, (&[(0, 2), (4, 10)], None));
    }

    #[test]
    fn cutting_agrees_with_marking_single_addresses() {
        // All regions and hidden ranges over eight addresses, as bit sets.
        let runs = |bits: u32| -> Vec<(u64, u64)> {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for at in (0..8).filter(|at| bits & (1 << at) != 0) {
                match runs.last_mut() {
                    Some(run) if run.1 == at => run.1 += 1,
                    _ => runs.push((at, at + 1)),
                }
            }
            runs
        };
        for found in 0..256 {
            for hidden in 0..256 {
                let expected = runs(found & !hidden);
                check(&runs(found), &runs(hidden), 99, (&expected, None));
            }
        }
    }

    /// Guards in gaps, as a kernel would tell them: `step` regions at a time.
    fn gaps(
        all: &'static [(u64, u64)],
        step: usize,
    ) -> impl FnMut(Range, &mut Vec<Region>) -> Option<u64> {
        move |gap, into| {
            let inside = all
                .iter()
                .filter(|guard| guard.0 >= gap.start && guard.1 <= gap.end);
            let told: Vec<_> = inside.take(step).collect();
            into.extend(told.iter().map(|&&(start, end)| Region {
                start,
                end,
                categories: GUARD,
            }));
            let full = told.len() == step;
            Some(told.last().filter(|_| full).map_or(gap.end, |last| last.1))
        }
    }

    fn filled(limit: usize, step: usize) -> (Vec<(u64, u64)>, Option<u64>) {
        let range = |&(start, end): &(u64, u64)| Range { start, end };
        let hidden: Vec<_> = [(10, 20), (30, 40)].iter().map(range).collect();
        let guards: Vec<_> = [(10, 11), (19, 20), (35, 36)].iter().map(range).collect();
        let found = gaps(&[(2, 3), (4, 5), (25, 26), (50, 51)], step);
        let wanted = Range { start: 0, end: 60 };
        let answer = fill(wanted, &hidden, &guards, limit, found).expect("there is memory");
        let told = |region: &Region| (region.start, region.end);
        (answer.regions.iter().map(told).collect(), answer.walk_end)
    }

    #[test]
    fn guards_of_gaps_and_of_hidden_ranges_come_in_order() {
        let all = [
            (2, 3),
            (4, 5),
            (10, 11),
            (19, 20),
            (25, 26),
            (35, 36),
            (50, 51),
        ];
        for step in 1..4 {
            assert_eq!(filled(9, step), (all.to_vec(), None));
            // Taken up again where the last answer was full.
            for limit in 1..all.len() {
                let expected = (all[..limit].to_vec(), Some(all[limit].0));
                assert_eq!(filled(limit, step), expected);
            }
        }
    }

    #[test]
    fn a_kernel_that_fails_or_stands_still_is_not_covered_up() {
        let wanted = || Range { start: 0, end: 60 };
        assert_eq!(fill(wanted(), &[], &[], 9, |_, _| None), None);
        assert_eq!(fill(wanted(), &[], &[], 9, |gap, _| Some(gap.start)), None);
        assert_eq!(
            fill(wanted(), &[], &[], 9, |gap, _| Some(gap.end + 1)),
            None
        );
    }
}
