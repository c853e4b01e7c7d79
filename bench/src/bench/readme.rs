//! The table in README.md, made of a series that is kept beside it.

use std::fmt::Write as _;

use super::compare::{Pair, comparisons};
use super::series::Series;
use super::table::{millis, spread};

/// The table, with where its figures are from.
pub fn section(series: &Series) -> String {
    let mut text = String::new();
    let mut commands = series.commands.clone();
    commands.dedup();
    let _ = writeln!(
        text,
        "{} moves, {} × {}, Linux {}, revision {}; `{}`:\n",
        series.runs(),
        series.machine.processors,
        series.machine.processor,
        series.machine.kernel,
        series.revision,
        commands.join("`, `"),
    );
    text += "| workload | link | gap | best peer's gap | peer / ours: gap | total | wire |\n";
    text += "|---|---|---|---|---|---|---|\n";
    let all = comparisons(series);
    let ratio = |pair: Option<Pair<'_>>| {
        pair.map_or("–".to_owned(), |pair| format!("{:.1}", pair.ratio()))
    };
    for row in &all {
        let (ours, peer) = row.gap.map_or(("–".to_owned(), "–".to_owned()), |gap| {
            let peer = format!("{} ({})", spread(&gap.peer, millis), gap.peer_name);
            (spread(&gap.ours, millis), peer)
        });
        let (workload, link) = (&row.workload, &row.link);
        let [gap, total, wire] = [row.gap, row.total, row.wire].map(ratio);
        let _ = writeln!(
            text,
            "| `{workload}` | {link} | {ours} | {peer} | {gap} | {total} | {wire} |"
        );
    }
    let mut absent: Vec<_> = all.iter().flat_map(|row| row.absent.iter()).collect();
    absent.sort_unstable();
    absent.dedup();
    for (system, why) in absent {
        let _ = writeln!(text, "\nNot among the peers: `{system}` ({why}).");
    }
    text
}

/// What stands between the marks in a text.
pub fn marked(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once(BEGIN)?;
    let (inside, _) = rest.split_once(END)?;
    Some(inside.trim_matches('\n'))
}

/// A series without what only drawings need: small enough to be kept with the sources.
pub fn slim(series: &Series) -> Series {
    let mut slim = series.clone();
    for run in slim.cells.iter_mut().flat_map(|cell| &mut cell.runs) {
        run.timeline.clear();
        run.spans.clear();
        run.gaps_ms.clear();
    }
    slim
}

pub const BEGIN: &str = "<!-- benchmark: lab bench --readme -->\n";
pub const END: &str = "<!-- end of the benchmark -->";

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Whatever README says of the benchmark is what the series says that is kept with it.
    #[test]
    fn figures_in_readme_are_those_of_the_series_beside_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let readme = std::fs::read_to_string(root.join("../README.md")).expect("README.md");
        let series = Series::read(&root.join("series/readme.json")).expect("a series");
        let inside = marked(&readme).expect("README.md has the marks");
        assert_eq!(
            inside,
            section(&series).trim_matches('\n'),
            "README.md is not what `lab bench --readme --out bench/series` prints"
        );
    }
}
