//! What a scenario reports: a JSON object for programs, lines for people.
//!
//! The object's fields are stable; a figure that a scenario does not have is null or absent, never
//! made up.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lab::state::RunFolder;
use crate::measure::Usage;
use crate::mover::outcome::{Move, round};

/// The object of `lab run --json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub scenario: String,
    pub ok: bool,
    pub moves: Vec<Move>,
    pub lost_acks: u64,
    pub broken_connections: u64,
    /// Null when no workload of the scenario has contents that nobody writes.
    pub digest_equal: Option<bool>,
    pub failures: Vec<String>,
    /// What clients of real applications saw, by move.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apps: Vec<AppMove>,
    /// Further figures by name, with the unit in the name: printed, and in a file beside the logs.
    #[serde(skip)]
    figures: serde_json::Map<String, Value>,
    /// Figures of parts that are over, by their headings.
    #[serde(skip)]
    parts: serde_json::Map<String, Value>,
}

/// A move of a real application, which may have been refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AppMove {
    pub app: String,
    pub from: String,
    pub to: String,
    /// `moved`, or `refused: CODE`.
    pub outcome: String,
    /// Null when it was refused.
    pub downtime_ms: Option<f64>,
    /// The longest time in which no client had an answer.
    pub blackout_ms: f64,
    /// The longest time for which a client waited.
    pub pause_ms: f64,
}

impl AppMove {
    /// A line of the table.
    pub fn line(&self) -> String {
        let downtime = match self.downtime_ms {
            Some(downtime) => format!("{downtime:.1} ms"),
            None => "-".to_owned(),
        };
        let [blackout, pause] = [self.blackout_ms, self.pause_ms].map(|ms| format!("{ms:.1} ms"));
        let way = format!("{} -> {}", self.from, self.to);
        format!(
            "{:<12} {way:<7} {downtime:>10} {blackout:>10} {pause:>14}  {}",
            self.app, self.outcome
        )
    }
}

impl Report {
    pub fn new(scenario: &str) -> Self {
        Self {
            scenario: scenario.to_owned(),
            ok: true,
            moves: Vec::new(),
            lost_acks: 0,
            broken_connections: 0,
            digest_equal: None,
            failures: Vec::new(),
            apps: Vec::new(),
            figures: serde_json::Map::new(),
            parts: serde_json::Map::new(),
        }
    }

    /// Takes a move in, and prints it.
    pub fn push(&mut self, one: Move) {
        println!("{}", one.line(self.moves.len() + 1));
        self.moves.push(one);
    }

    pub fn fail(&mut self, what: impl Into<String>) {
        self.ok = false;
        self.failures.push(what.into());
    }

    pub fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// One more value of a figure that each move has.
    pub fn figure_series(&mut self, name: &str, value: impl Into<Value>) {
        let series = self
            .figures
            .entry(name)
            .or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(values) = series {
            values.push(value.into());
        }
    }

    /// Percentiles of the downtime (and the longest blackout) of some of the moves.
    pub fn figure_downtimes(&mut self, group: &str, moves: &[Move]) {
        let downtimes: Vec<f64> = moves.iter().map(|one| one.downtime_ms).collect();
        for percent in [50, 99] {
            let name = format!("{group}: downtime p{percent} ms");
            self.figure(&name, percentile(&downtimes, percent));
        }
        let blackouts: Vec<f64> = moves.iter().filter_map(|one| one.blackout_ms).collect();
        self.figure(
            &format!("{group}: blackout p99 ms"),
            percentile(&blackouts, 99),
        );
        self.figure(&format!("{group}: moves"), moves.len());
    }

    /// What processes used, by "node/command".
    pub fn figure_usage(&mut self, usage: &BTreeMap<String, Usage>) {
        for (name, usage) in usage {
            self.figure(&format!("{name} CPU s"), round(usage.cpu_seconds));
            let mebibytes = usage.private_bytes_peak as f64 / f64::from(1 << 20);
            self.figure(&format!("{name} private MiB"), round(mebibytes));
        }
    }

    /// Whether contents that nobody wrote were still the same: one that differs is a failure.
    pub fn note_contents(&mut self, equal: bool) {
        self.digest_equal = Some(self.digest_equal.unwrap_or(true) && equal);
        self.ok &= equal;
    }

    pub fn ok(&self) -> bool {
        self.ok
    }

    /// Prints the figures gathered so far under a heading, and puts them away: the next part of the
    /// scenario has its own.
    pub fn print_figures(&mut self, heading: &str) {
        println!("{heading}:");
        self.print_lines();
        let figures = std::mem::take(&mut self.figures);
        self.parts
            .insert(heading.to_owned(), Value::Object(figures));
    }

    fn print_lines(&self) {
        for (name, value) in &self.figures {
            println!("  {name}: {value}");
        }
    }

    /// Puts the figures beside the logs, for programs.
    pub fn write_figures(&self) -> Result<()> {
        let path = RunFolder::new().logs().join("figures.json");
        let mut all = self.parts.clone();
        all.extend(self.figures.clone());
        let text = serde_json::to_string_pretty(&all).context("writing figures")?;
        fs::write(&path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("writing the report")?;
        fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }

    /// The end of the report for people, on standard output.
    pub fn print(&self) {
        self.print_lines();
        // Zeros of what never ran would be taken for a result.
        if self.moves.is_empty() && !self.ok {
            println!("no move is on record");
        } else {
            println!(
                "acknowledged writes lost {}, connections broken {}, untouched contents {}",
                self.lost_acks,
                self.broken_connections,
                match self.digest_equal {
                    Some(true) => "equal",
                    Some(false) => "DIFFERENT",
                    None => "not measured",
                }
            );
        }
        for failure in &self.failures {
            println!("FAILURE: {failure}");
        }
        let logs = RunFolder::new().logs();
        if self.ok {
            println!("{}: ok", self.scenario);
        } else {
            println!("{}: failed; logs are in {}", self.scenario, logs.display());
        }
    }
}

/// The smallest value that at least `percent` of the values do not exceed. 0 for no values.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(percentile(&values, 50), 10.0);
        assert_eq!(percentile(&values, 99), 20.0);
        assert_eq!(percentile(&[7.0], 50), 7.0);
        assert_eq!(percentile(&[], 50), 0.0);
    }
}
