//! Cutting hidden addresses out of what the kernel found. Pure.

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
}
