//! `series.json`: what a benchmark has measured. Its fields are described in bench/README.md.
//!
//! Additive: fields are added and never change their meaning; what was not measured is null or
//! absent. A reader of version N reads whatever begins with `pageferry-bench/N`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// A whole benchmark.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Series {
    pub schema: String,
    pub machine: Machine,
    /// Programs of the nodes, and what they say their versions are.
    pub versions: BTreeMap<String, String>,
    /// Of the sources, with `-dirty` behind it if those were changed.
    pub revision: String,
    /// Command lines that have added to it.
    pub commands: Vec<String>,
    /// What the order of the runs was made of, of each command.
    pub seeds: Vec<u64>,
    /// Seconds since 1970, at the beginning of each command.
    pub begun: Vec<u64>,
    /// What names mean: workloads, links and systems.
    pub legend: BTreeMap<String, String>,
    /// By workload, how many times smaller LZ4 makes its contents.
    pub compression: BTreeMap<String, f64>,
    pub cells: Vec<Cell>,
}

/// What it ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub processors: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    /// Both nodes and all clients are on this one machine.
    pub nodes_on_it: usize,
}

/// One workload over one link by one system.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cell {
    pub workload: String,
    pub link: String,
    pub system: String,
    /// Why nothing was run, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfit: Option<String>,
    pub runs: Vec<Run>,
}

/// One move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The how manieth of the whole series, as the shuffled order had it.
    pub number: u32,
    /// Why it counts as failed, if so: its other figures are then what was seen until there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// The longest time in which no client finished a request, of which a part lies between the
    /// order to move and the end of the move.
    pub gap_ms: Option<f64>,
    /// All of at least 5 ms from a second before the order on: beginning (after the order), length.
    #[serde(default)]
    pub gaps_ms: Vec<(f64, f64)>,
    /// From the beginning of the gap to the first 100 ms at 90 % of the final rate that holds 1 s.
    pub ttr90_ms: Option<f64>,
    /// As the mover says.
    pub downtime_ms: Option<f64>,
    #[serde(default)]
    pub downtime_parts_ms: BTreeMap<String, f64>,
    /// From the order until the workload runs at the target and needs its source no more.
    pub total_ms: Option<f64>,
    pub rounds: Option<u32>,
    /// In the memory of its root process at the order.
    pub memory_bytes: Option<u64>,
    /// IP bytes that both nodes sent themselves, until all was settled.
    pub wire_bytes: Option<u64>,
    pub calm: Option<Load>,
    /// From the order to the beginning of the gap.
    pub before_gap: Option<Load>,
    /// From the end of the gap until all was settled.
    pub after_gap: Option<Load>,
    #[serde(default)]
    pub reconnects: u32,
    /// CPU time of each node's processes beyond what they used in the undisturbed stretch.
    #[serde(default)]
    pub cpu_seconds: BTreeMap<String, f64>,
    /// Of each node, at most beyond what it took at the order.
    #[serde(default)]
    pub memory_peak_bytes: BTreeMap<String, u64>,
    /// Whether all contents were compared and right.
    pub verified: bool,
    /// Answers in each 100 ms, from the time that `timeline_from_ms` is after the order.
    #[serde(default)]
    pub timeline: Vec<u32>,
    #[serde(default)]
    pub timeline_from_ms: f64,
    /// What took how long within the downtime, and the fill behind it: of pageferry alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<Span>,
}

/// What took how long at one node, from when the freeze was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// `source` or `target`.
    pub role: String,
    /// As in the dictionary of ARCHITECTURE.md.
    pub name: String,
    #[serde(default)]
    pub detail: String,
    pub begin_ms: f64,
    pub took_ms: f64,
}

/// What clients had in a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    pub seconds: f64,
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

impl Series {
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let series: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no series", path.display()))?;
        ensure!(
            series.schema.starts_with(SCHEMA_MAJOR),
            "{} is a series of another kind: {}",
            path.display(),
            series.schema
        );
        Ok(series)
    }

    /// Written beside, then renamed: one that is there is whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).context("writing the series")?;
        let beside = path.with_extension("json.new");
        fs::write(&beside, text + "\n")
            .and_then(|()| fs::rename(&beside, path))
            .with_context(|| format!("writing {}", path.display()))
    }

    pub fn cell(&self, workload: &str, link: &str, system: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.is(workload, link, system))
    }

    /// The cell of these names, made if there is none.
    pub fn cell_mut(&mut self, workload: &str, link: &str, system: &str) -> &mut Cell {
        let found = self
            .cells
            .iter()
            .position(|cell| cell.is(workload, link, system));
        let index = found.unwrap_or_else(|| {
            self.cells.push(Cell {
                workload: workload.to_owned(),
                link: link.to_owned(),
                system: system.to_owned(),
                ..Cell::default()
            });
            self.cells.len() - 1
        });
        &mut self.cells[index]
    }

    /// How many moves there are.
    pub fn runs(&self) -> usize {
        self.cells.iter().map(|cell| cell.runs.len()).sum()
    }
}

impl Cell {
    fn is(&self, workload: &str, link: &str, system: &str) -> bool {
        self.workload == workload && self.link == link && self.system == system
    }

    /// Moves that count.
    pub fn good(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| run.failure.is_none())
    }

    /// A figure of the moves that count.
    pub fn values(&self, figure: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
        self.good().filter_map(figure).collect()
    }

    /// Median, least and most of them.
    pub fn summary(&self, figure: impl Fn(&Run) -> Option<f64>) -> Option<Summary> {
        Summary::of(&self.values(figure))
    }

    /// Why there is no figure, in a few words.
    pub fn absence(&self) -> Option<&str> {
        let failed = || {
            self.runs
                .iter()
                .rev()
                .find_map(|run| run.failure.as_deref())
        };
        match self.good().next() {
            Some(_) => None,
            None => self.unfit.as_deref().or_else(failed).or(Some("not run")),
        }
    }
}

impl Run {
    /// Times of 100 ms at least without an answer, as the viewer of a video notices them.
    pub fn stalls(&self) -> usize {
        let gaps = self.gaps_ms.iter();
        gaps.filter(|(_, length)| STALL_MS <= *length).count()
    }

    pub fn cpu_per_gib(&self) -> Option<f64> {
        let gib = self.memory_bytes? as f64 / GIB;
        let all: f64 = self.cpu_seconds.values().sum();
        (!self.cpu_seconds.is_empty()).then_some(all / gib)
    }

    /// The rate while it was copied, as a share of that of the undisturbed stretch. The copying
    /// must have lasted for a tenth of a second to be one.
    pub fn brownout(&self) -> Option<f64> {
        let (calm, copied) = (self.calm?, self.before_gap?);
        (BROWNOUT_SECONDS_MIN <= copied.seconds).then_some(copied.per_second / calm.per_second)
    }

    pub fn brownout_p99_ms(&self) -> Option<f64> {
        self.brownout()?;
        Some(self.before_gap?.p99_ms)
    }
}

/// A median, and how far the values lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub count: usize,
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Summary {
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let (half, count) = (sorted.len() / 2, sorted.len());
        let median = if count % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Self {
            count,
            median,
            least,
            most,
        })
    }
}

/// Major and minor: the minor one is raised when fields are added.
pub const SCHEMA: &str = "pageferry-bench/1.1";
const SCHEMA_MAJOR: &str = "pageferry-bench/1.";
pub const FILE: &str = "series.json";
/// Three frames of thirty a second.
const STALL_MS: f64 = 100.0;
const GIB: f64 = (1_u64 << 30) as f64;
const BROWNOUT_SECONDS_MIN: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_of_the_values_there_are() {
        assert_eq!(Summary::of(&[]), None);
        let one = Summary::of(&[3.0, 1.0, 2.0]).expect("values");
        assert_eq!(
            (one.count, one.median, one.least, one.most),
            (3, 2.0, 1.0, 3.0)
        );
        assert_eq!(Summary::of(&[1.0, 2.0]).map(|two| two.median), Some(1.5));
    }

    #[test]
    fn failed_moves_count_for_nothing_but_are_told() {
        let mut cell = Cell::default();
        assert_eq!(cell.absence(), Some("not run"));
        cell.runs.push(Run {
            failure: Some("criu-dump: no".to_owned()),
            gap_ms: Some(1.0),
            ..Run::default()
        });
        assert_eq!(cell.absence(), Some("criu-dump: no"));
        assert_eq!(cell.summary(|run| run.gap_ms), None);
        cell.runs.push(Run {
            gap_ms: Some(2.0),
            ..Run::default()
        });
        assert_eq!(cell.absence(), None);
        assert_eq!(
            cell.summary(|run| run.gap_ms).map(|one| one.median),
            Some(2.0)
        );
    }

    #[test]
    fn fields_of_a_later_version_do_not_disturb() {
        let text = r#"{"workload":"w","link":"l","system":"s","new":1,
            "runs":[{"number":1,"gap_ms":2.5,"verified":true,"newer":[]}]}"#;
        let cell: Cell = serde_json::from_str(text).expect("a cell");
        assert_eq!(cell.runs[0].gap_ms, Some(2.5));
        assert_eq!(cell.runs[0].calm, None);
    }
}
