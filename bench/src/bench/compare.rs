//! Ours beside the best peer, for each workload and link.

use super::series::{Cell, Run, Series, Summary};
use super::table::{cells_of, groups};

/// Ours and a peer's in one figure, of which less is better.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    pub ours: Summary,
    /// Whoever has the least of the peers.
    pub peer: Summary,
    pub peer_name: &'a str,
}

impl Pair<'_> {
    /// How many times ours the peer's is.
    pub fn ratio(&self) -> f64 {
        self.peer.median / self.ours.median.max(f64::MIN_POSITIVE)
    }
}

/// One workload over one link.
#[derive(Clone, Debug)]
pub struct Comparison<'a> {
    pub workload: String,
    pub link: String,
    pub gap: Option<Pair<'a>>,
    pub total: Option<Pair<'a>>,
    pub wire: Option<Pair<'a>>,
    pub cpu: Option<Pair<'a>>,
    /// Peers that have no figures, and why.
    pub absent: Vec<(&'a str, &'a str)>,
}

/// A row for each workload and link that pageferry has moved.
pub fn comparisons(series: &Series) -> Vec<Comparison<'_>> {
    let rows = groups(series).into_iter().filter_map(|(workload, link)| {
        let cells = cells_of(series, &workload, &link);
        let ours = *cells.iter().find(|cell| cell.system == OURS)?;
        ours.good().next()?;
        let peers: Vec<&Cell> = cells.into_iter().filter(|cell| is_peer(cell)).collect();
        let absent = peers
            .iter()
            .filter_map(|cell| Some((&*cell.system, cell.absence()?)));
        Some(Comparison {
            gap: pair(ours, &peers, |run| run.gap_ms),
            total: pair(ours, &peers, |run| run.total_ms),
            wire: pair(ours, &peers, |run| run.wire_bytes.map(|bytes| bytes as f64)),
            cpu: pair(ours, &peers, Run::cpu_per_gib),
            absent: absent.collect(),
            workload,
            link,
        })
    });
    rows.collect()
}

/// Everybody but pageferry in any of its forms.
pub fn is_peer(cell: &Cell) -> bool {
    !cell.system.starts_with(OURS)
}

fn pair<'a>(
    ours: &Cell,
    peers: &[&'a Cell],
    figure: impl Fn(&Run) -> Option<f64> + Copy,
) -> Option<Pair<'a>> {
    let ours = ours.summary(figure)?;
    let peers = peers
        .iter()
        .filter_map(|cell| Some((cell.summary(figure)?, &*cell.system)));
    let (peer, peer_name) = peers.min_by(|a, b| a.0.median.total_cmp(&b.0.median))?;
    Some(Pair {
        ours,
        peer,
        peer_name,
    })
}

impl Comparison<'_> {
    /// In what ours is not ahead as far as it should be, in words.
    pub fn shortfalls(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(gap) = self.gap
            && gap.ratio() < GAP_LEAD
        {
            found.push(format!("gap only {:.1} times shorter", gap.ratio()));
        }
        let others = [
            ("total", self.total),
            ("wire", self.wire),
            ("CPU", self.cpu),
        ];
        for (what, pair) in others {
            if let Some(pair) = pair
                && pair.ratio() < 1.0
            {
                let times = 1.0 / pair.ratio();
                found.push(format!(
                    "{what} {times:.1} times that of {}",
                    pair.peer_name
                ));
            }
        }
        found
    }
}

/// Of a bare tree, as those of most peers.
pub const OURS: &str = "pageferry";
const GAP_LEAD: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(system: &str, gap_ms: f64, total_ms: f64) -> Cell {
        Cell {
            workload: "w".to_owned(),
            link: "l".to_owned(),
            system: system.to_owned(),
            unfit: None,
            runs: vec![Run {
                gap_ms: Some(gap_ms),
                total_ms: Some(total_ms),
                ..Run::default()
            }],
        }
    }

    #[test]
    fn the_best_peer_is_another_for_each_figure_and_never_ours() {
        let series = Series {
            cells: vec![
                cell("pageferry", 50.0, 900.0),
                cell("pageferry-runc", 1.0, 1.0),
                cell("one", 200.0, 2000.0),
                cell("two", 300.0, 600.0),
            ],
            ..Series::default()
        };
        let all = comparisons(&series);
        let [row] = &all[..] else { panic!("{all:?}") };
        let (gap, total) = (row.gap.expect("a gap"), row.total.expect("a total"));
        assert_eq!((gap.peer_name, gap.ratio()), ("one", 4.0));
        assert_eq!(total.peer_name, "two");
        let shortfalls = row.shortfalls();
        assert_eq!(
            shortfalls,
            ["gap only 4.0 times shorter", "total 1.5 times that of two"]
        );
    }
}
