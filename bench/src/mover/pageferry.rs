//! The command line of the product, as the lab uses it: by its binary and its JSON.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::outcome::Outcome;
use super::{MoveOptions, Mover, Order};
use crate::lab::Lab;
use crate::lab::node::Node;

/// Moves by `pageferry migrate`.
#[derive(Clone, Copy, Debug)]
pub struct Pageferry;

impl Mover for Pageferry {
    fn name(&self) -> &'static str {
        "pageferry"
    }

    fn needs_daemons(&self) -> bool {
        true
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let source = lab.node(order.from)?;
        Migration::start(source, &order.workload.name(), order.to, order.options)?.finish()
    }

    fn wait_settled(&self, lab: &Lab, time_max: Duration) -> Result<()> {
        wait_settled(lab, time_max)
    }
}

/// A migration that is under way.
#[derive(Debug)]
pub struct Migration {
    child: Child,
}

impl Migration {
    /// Starts `pageferry migrate` at the source.
    pub fn start(source: &Node, workload: &str, to: &str, flags: &MoveOptions) -> Result<Self> {
        let mut command = source.command("pageferry")?;
        command = command.args(["migrate", workload, "--to", to, "--json"]);
        if let Some(id) = &flags.id {
            command = command.args(["--id", id]);
        }
        if flags.hold {
            command = command.arg("--hold");
        }
        if flags.verify {
            command = command.arg("--verify");
        }
        if flags.force_eager {
            command = command.arg("--force-eager");
        }
        if flags.force_ipc {
            command = command.arg("--force-ipc");
        }
        if let Some(mode) = &flags.mode {
            command = command.args(["--mode", mode]);
        }
        if let Some(timeout) = &flags.timeout {
            command = command.args(["--timeout", timeout]);
        }
        if let Some(downtime) = &flags.downtime_max {
            command = command.args(["--downtime-max", downtime]);
        }
        if let Some(frozen) = &flags.frozen_max {
            command = command.args(["--frozen-max", frozen]);
        }
        for path in &flags.copied {
            command = command.args(["--copy", path]);
        }
        for path in &flags.shared {
            command = command.args(["--shared", path]);
        }
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(Self {
            child: command.spawn()?,
        })
    }

    /// Whether it is over.
    pub fn has_ended(&mut self) -> Result<bool> {
        let ended = self.child.try_wait();
        Ok(ended.context("asking for pageferry migrate")?.is_some())
    }

    /// Waits for its end.
    pub fn finish(self) -> Result<Outcome> {
        let output = self
            .child
            .wait_with_output()
            .context("waiting for pageferry migrate")?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        Ok(outcome(
            &printed,
            complaint.trim_end(),
            output.status.success(),
        ))
    }
}

fn outcome(printed: &str, complaint: &str, success: bool) -> Outcome {
    let object = last_object(printed);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let mut outcome = Outcome {
        id: text(&object["id"]),
        object: object.clone(),
        ..Outcome::default()
    };
    if success {
        match serde_json::from_value(object) {
            Ok(moved) => outcome.moved = Some(moved),
            Err(error) => {
                let said = format!("its JSON is not a move ({error}): {printed}{complaint}");
                outcome.error = Some(("lab-bad-json".to_owned(), said));
            }
        }
        return outcome;
    }
    let code = text(&object["error"]["code"]).unwrap_or_else(|| "lab-no-code".to_owned());
    let said = text(&object["error"]["text"]).unwrap_or_else(|| format!("{printed}{complaint}"));
    outcome.error = Some((code, said));
    outcome
}

/// The last line that is a JSON object, or the whole text if it is one; null otherwise.
fn last_object(printed: &str) -> Value {
    if let Ok(object) = serde_json::from_str(printed) {
        return object;
    }
    let mut lines = printed.lines().rev();
    lines
        .find_map(|line| serde_json::from_str(line).ok())
        .unwrap_or(Value::Null)
}

/// What a node says of all its migrations.
pub fn list(node: &Node) -> Result<Vec<Value>> {
    let printed = node.command("pageferry")?.args(["list", "--json"]).run()?;
    match last_object(&printed) {
        Value::Array(all) => Ok(all),
        Value::Object(mut one) => match one.remove("migrations") {
            Some(Value::Array(all)) => Ok(all),
            _ => Ok(vec![Value::Object(one)]),
        },
        _ => Ok(printed
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()),
    }
}

/// What a node says of one migration; null when it knows none by this id.
pub fn show(node: &Node, id: &str) -> Result<Value> {
    let output = node
        .command("pageferry")?
        .args(["show", id, "--json"])
        .output()?;
    Ok(last_object(&String::from_utf8_lossy(&output.stdout)))
}

/// Where a migration of a workload that is not over yet stands: its id and phase.
pub fn under_way(node: &Node, workload: &str) -> Option<(String, String)> {
    list(node).ok()?.into_iter().find_map(|one| {
        let phase = one["phase"].as_str()?;
        let over = FINAL_PHASES.contains(&phase);
        (one["workload"] == workload && !over)
            .then(|| Some((one["id"].as_str()?.to_owned(), phase.to_owned())))?
    })
}

/// Waits until no migration of any node is under way: fills are over, journals closed.
pub fn wait_settled(lab: &Lab, time_max: Duration) -> Result<()> {
    let deadline = Instant::now() + time_max;
    for node in &lab.nodes {
        loop {
            let all = list(node)?;
            let open = all.iter().find(|one| {
                one["phase"]
                    .as_str()
                    .is_some_and(|phase| !FINAL_PHASES.contains(&phase))
            });
            let Some(open) = open else { break };
            ensure!(
                Instant::now() < deadline,
                "node {} still has a migration under way: {open}",
                node.name()
            );
            std::thread::sleep(POLL);
        }
    }
    Ok(())
}

/// Starts to ask for an abort: a daemon that is stopped answers only when it goes on.
pub fn abort(node: &Node, id: &str) -> Result<Child> {
    let command = node.command("pageferry")?.args(["abort", id]);
    command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// How long everything may take to settle: a fill of 1 GiB takes seconds.
pub const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
const FINAL_PHASES: [&str; 2] = ["done", "aborted"];
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_code() {
        let printed = r#"{"ok":false,"id":"ab","error":{"code":"hugetlb","text":"no"}}"#;
        let outcome = outcome(printed, "", false);
        assert_eq!(outcome.error, Some(("hugetlb".to_owned(), "no".to_owned())));
        assert!(outcome.moved.is_none());
    }

    #[test]
    fn a_move_is_read_with_whatever_else_is_printed() {
        let printed = r#"{"workload":"process/1","mode":"precopy","from":"a","to":"b","rounds":3,
            "memory_bytes":1,"wire_bytes":2,"downtime_ms":9.5,
            "parts_ms":{"freeze":1,"final_round":2,"restore":3,"commit":1,"handoff":2.5},
            "frozen_ms":4,"restore_ms":null,"blackout_ms":null,"total_ms":100,"ok":true,"id":"ab",
            "error":null}"#;
        let moved = outcome(printed, "", true).moved.expect("a move");
        assert_eq!((moved.rounds, moved.downtime_ms), (3, 9.5));
    }
}
