//! How a move ended: what the mover measured, or its refusal.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a move ended, as its mover says.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What the mover calls it, if it has a name.
    pub id: Option<String>,
    /// The move, when it succeeded.
    pub moved: Option<Move>,
    /// Code and text, when it did not.
    pub error: Option<(String, String)>,
    /// All that the mover printed, for figures that not every one prints; null if nothing.
    pub object: Value,
}

/// One move, as `pageferry migrate --json` prints it too.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Move {
    pub workload: String,
    pub mode: String,
    pub from: String,
    pub to: String,
    pub rounds: u32,
    pub memory_bytes: u64,
    pub wire_bytes: u64,
    pub downtime_ms: f64,
    pub parts_ms: Parts,
    pub frozen_ms: Option<f64>,
    pub restore_ms: Option<f64>,
    pub blackout_ms: Option<f64>,
    /// How often it stood still for a scan before it was frozen, and for how long at most.
    #[serde(default)]
    pub pauses: Option<u32>,
    #[serde(default)]
    pub longest_pause_ms: Option<f64>,
    pub total_ms: f64,
}

/// The consecutive intervals of the downtime.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Parts {
    pub freeze: f64,
    pub final_round: f64,
    pub restore: f64,
    pub commit: f64,
    pub handoff: f64,
}

impl Outcome {
    pub fn moved(one: Move) -> Self {
        Self {
            moved: Some(one),
            ..Self::default()
        }
    }

    pub fn refused(code: &str, text: String) -> Self {
        Self {
            error: Some((code.to_owned(), text)),
            ..Self::default()
        }
    }

    /// What the workload's root is called at the target; as before, unless it has a pid namespace
    /// of its own.
    pub fn pid_at_target(&self) -> Option<i32> {
        self.object["pid_at_target"].as_i64()?.try_into().ok()
    }
}

impl Move {
    /// Lines for people; `number` is the move's in its scenario.
    pub fn line(&self, number: usize) -> String {
        let optional = |name: &str, value: Option<f64>| match value {
            Some(value) => format!(", {name} {value:.1} ms"),
            None => String::new(),
        };
        let parts = &self.parts_ms;
        format!(
            "move {number}: {} {} {} -> {}: {} rounds, {} in memory, {} on the wire, \
             total {:.1} s\n  downtime {:.1} ms = freeze {:.1} + final round {:.1} + restore {:.1} \
             + commit {:.1} + hand-off {:.1}{}{}{}",
            self.workload,
            self.mode,
            self.from,
            self.to,
            self.rounds,
            bytes_text(self.memory_bytes),
            bytes_text(self.wire_bytes),
            self.total_ms / 1e3,
            self.downtime_ms,
            parts.freeze,
            parts.final_round,
            parts.restore,
            parts.commit,
            parts.handoff,
            optional("inside CRIU", self.frozen_ms),
            optional("CRIU's restore", self.restore_ms),
            optional("blackout", self.blackout_ms),
        )
    }
}

fn bytes_text(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// In milliseconds, to the microsecond.
pub fn millis(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}

/// To three decimals: what is behind them is noise.
pub fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
