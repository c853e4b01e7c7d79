//! What is printed: JSON for programs, a few lines for people.
//!
//! The JSON is stable: fields are added, never renamed or removed. Times are in milliseconds, sizes
//! in bytes; what was not measured is null.

use pageferry_api::{Failure, ListReply, Parts, Refusal, Side, Status};
use serde::Serialize;

use super::client::CallError;
use crate::config::units::Bytes;

/// One end of a migration, as `list`, `show` and `watch` print it.
#[derive(Debug, Serialize)]
pub struct Known<'a> {
    id: &'a str,
    workload: &'a str,
    role: &'static str,
    node: &'a str,
    peer: &'a str,
    phase: &'a str,
    r#final: bool,
    moved: bool,
    round: Option<u32>,
    retries: u32,
    memory_bytes: Option<u64>,
    sent_bytes: Option<u64>,
    wire_bytes: Option<u64>,
    dirty_pages_per_second: Option<u64>,
    predicted_downtime_ms: Option<f64>,
    downtime_ms: Option<f64>,
    parts_ms: PartsMs,
    frozen_ms: Option<f64>,
    sync_ms: Option<f64>,
    pauses: Option<u32>,
    longest_pause_ms: Option<f64>,
    final_pages: Option<u64>,
    pid_at_target: Option<i32>,
    frozen_max_ms: Option<f64>,
    total_ms: Option<f64>,
    fence_wanted: bool,
    unsettled: bool,
    holding: bool,
    waiting: bool,
    drains: bool,
    missing_bytes: Option<u64>,
    waited: Option<Waits>,
    error: Option<ErrorObject>,
}

/// How long threads waited for pages that had not come.
#[derive(Debug, Serialize)]
struct Waits {
    faults: u64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

/// What `list` prints.
#[derive(Debug, Serialize)]
pub struct Listed<'a> {
    migrations: Vec<Known<'a>>,
    refusals: Vec<Refused<'a>>,
    answers_kept: u64,
}

/// An attempt that was refused before it began.
#[derive(Debug, Serialize)]
pub struct Refused<'a> {
    at_unix_ms: u64,
    workload: &'a str,
    to: &'a str,
    error: ErrorObject,
}

/// A whole move, as `migrate` prints it.
#[derive(Debug, Default, Serialize)]
pub struct Moved {
    id: Option<String>,
    workload: String,
    mode: String,
    from: String,
    to: String,
    rounds: Option<u32>,
    memory_bytes: Option<u64>,
    wire_bytes: Option<u64>,
    downtime_ms: Option<f64>,
    parts_ms: PartsMs,
    frozen_ms: Option<f64>,
    sync_ms: Option<f64>,
    restore_ms: Option<f64>,
    /// Only clients can know the longest gap they saw.
    blackout_ms: Option<f64>,
    total_ms: Option<f64>,
    final_pages: Option<u64>,
    dirty_pages_per_second: Option<u64>,
    pid_at_target: Option<i32>,
    /// Freezes that were given up before the one that counts.
    retries: u32,
    /// How often it stood still for a scan, before it was frozen.
    pauses: Option<u32>,
    longest_pause_ms: Option<f64>,
    /// What the move takes from the workload's clients.
    notes: Vec<String>,
    ok: bool,
    error: Option<ErrorObject>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct PartsMs {
    freeze: Option<f64>,
    final_round: Option<f64>,
    restore: Option<f64>,
    commit: Option<f64>,
    handoff: Option<f64>,
}

#[derive(Debug, Serialize)]
struct ErrorObject {
    code: String,
    text: String,
}

impl<'a> Known<'a> {
    /// What `status` says.
    pub fn of(status: &'a Status) -> Self {
        Self {
            id: &status.id,
            workload: &status.workload,
            role: role(status),
            node: &status.node,
            peer: &status.peer,
            phase: &status.phase,
            r#final: status.r#final,
            moved: status.moved,
            round: rounds(status),
            retries: status.retries,
            memory_bytes: status.memory_bytes,
            sent_bytes: status.sent_bytes,
            wire_bytes: status.wire_bytes,
            dirty_pages_per_second: status.dirty_pages_per_second,
            predicted_downtime_ms: status.predicted_downtime_us.map(millis),
            downtime_ms: status.downtime_us.map(millis),
            parts_ms: parts(status.parts.as_ref()),
            frozen_ms: status.frozen_us.map(millis),
            sync_ms: status.synced_us.map(millis),
            pauses: status.pauses,
            longest_pause_ms: status.longest_pause_us.map(millis),
            final_pages: status.final_pages,
            pid_at_target: status.pid_at_target,
            frozen_max_ms: status.frozen_max_us.map(millis),
            total_ms: status.elapsed_us.map(millis),
            fence_wanted: status.fence_wanted,
            unsettled: status.unsettled,
            holding: status.holding,
            waiting: status.waiting,
            drains: status.drains,
            missing_bytes: status.missing_bytes,
            waited: status.waited.map(|waited| Waits {
                faults: waited.faults,
                p50_ms: millis(waited.p50_us),
                p99_ms: millis(waited.p99_us),
                max_ms: millis(waited.max_us),
            }),
            error: error(status),
        }
    }
}

impl<'a> Listed<'a> {
    /// What the daemon said.
    pub fn of(reply: &'a ListReply) -> Self {
        let refused = |refusal: &'a Refusal| Refused {
            at_unix_ms: refusal.at_unix_ms,
            workload: &refusal.workload,
            to: &refusal.to,
            error: refusal.failure.as_ref().map_or_else(
                || ErrorObject {
                    code: "unknown".to_owned(),
                    text: String::new(),
                },
                |failure| ErrorObject {
                    code: failure.code.clone(),
                    text: failure.text.clone(),
                },
            ),
        };
        Self {
            migrations: reply.migrations.iter().map(Known::of).collect(),
            refusals: reply.refusals.iter().map(refused).collect(),
            answers_kept: reply.answers_kept,
        }
    }
}

impl Moved {
    /// How the migration with this last status ended; `status` is the source's.
    pub fn of(status: &Status) -> Self {
        let parts_ms = parts(status.parts.as_ref());
        Self {
            id: Some(status.id.clone()),
            workload: status.workload.clone(),
            mode: status.mode.clone().unwrap_or_else(|| PRECOPY.to_owned()),
            from: status.node.clone(),
            to: status.peer.clone(),
            rounds: rounds(status),
            memory_bytes: status.memory_bytes,
            wire_bytes: status.wire_bytes,
            downtime_ms: status.downtime_us.map(millis),
            parts_ms,
            frozen_ms: status.frozen_us.map(millis),
            sync_ms: status.synced_us.map(millis),
            restore_ms: parts_ms.restore,
            blackout_ms: None,
            total_ms: status.elapsed_us.map(millis),
            final_pages: status.final_pages,
            dirty_pages_per_second: status.dirty_pages_per_second,
            pid_at_target: status.pid_at_target,
            retries: status.retries,
            pauses: status.pauses,
            longest_pause_ms: status.longest_pause_us.map(millis),
            notes: status.notes.clone(),
            ok: status.moved,
            error: if status.moved { None } else { error(status) },
        }
    }

    /// A move that a call ended: it was refused, or the daemon is gone.
    pub fn failed(id: Option<String>, workload: String, to: String, error: &CallError) -> Self {
        let error = ErrorObject {
            code: error.code().to_owned(),
            text: error.text(),
        };
        Self {
            id,
            workload,
            to,
            mode: PRECOPY.to_owned(),
            error: Some(error),
            ..Self::default()
        }
    }
}

/// How a migration ended, in a few lines.
pub fn summary(status: &Status) -> String {
    let Status {
        workload,
        node,
        peer,
        ..
    } = status;
    if !status.moved {
        let why = match &status.failure {
            Some(failure) => format!("{}: {}", failure.code, failure.text),
            None => "no reason was given".to_owned(),
        };
        let is_lost = |failure: &Failure| failure.code == "lost-in-drain";
        if status.failure.as_ref().is_some_and(is_lost) {
            return format!(
                "{workload} is lost: it ran at {peer}, without all its memory\n  {why}"
            );
        }
        return format!("{workload} runs on at {node}, it has not moved to {peer}\n  {why}");
    }
    let mut text = format!("{workload} moved from {node} to {peer}");
    if let Some(elapsed) = status.elapsed_us {
        text += &format!(" in {:.2} s", millis(elapsed) / 1000.0);
    }
    match (status.memory_bytes, status.wire_bytes) {
        (Some(memory), Some(wire)) => {
            text += &format!(
                "\n  {} rounds, {} of memory, {} on the wire",
                status.round,
                Bytes(memory).rounded(),
                Bytes(wire).rounded(),
            );
        }
        _ => text += "\n  the daemon was restarted since: what it had counted is lost",
    }
    if let Some(pages) = status.final_pages {
        text += &format!(", {pages} pages in the final round");
    }
    if let Some(followed) = status.followed_bytes.filter(|bytes| *bytes > 0) {
        text += &format!("\n  {} followed it", Bytes(followed).rounded());
    }
    if status.retries > 0 {
        text += &format!("\n  freezes given up before: {}", status.retries);
    }
    if let Some(downtime) = status.downtime_us {
        text += &format!("\n  downtime {:.1} ms", millis(downtime));
        let parts = named_parts(parts(status.parts.as_ref()));
        let known = parts
            .into_iter()
            .filter_map(|(name, part)| Some(format!("{name} {:.1}", part?)));
        text += &format!(": {}", known.collect::<Vec<_>>().join(", "));
    }
    if let Some(frozen) = status.frozen_us {
        text += &format!("\n  frozen inside CRIU {:.1} ms", millis(frozen));
    }
    if let Some(synced) = status.synced_us {
        text += &format!("\n  shared storage synced in {:.1} ms", millis(synced));
    }
    text += &paused(status, "\n  ");
    for note in &status.notes {
        text += &format!("\n  {note}");
    }
    // Only a workload with a pid namespace of its own is called something else there.
    if let Some(pid) = status.pid_at_target
        && *workload != format!("process/{pid}")
    {
        text += &format!("\n  at {peer} it is process/{pid}");
    }
    text
}

/// What `list` says: every migration in a line, under a heading, and what never became one.
pub fn list(reply: &ListReply) -> String {
    let mut text = table(&reply.migrations);
    if !reply.refusals.is_empty() {
        text += "\n\nRefused before they began, newest first:";
        for refusal in &reply.refusals {
            text += &format!("\n  {}", refused(refusal));
        }
    }
    let unlisted = usize::try_from(reply.answers_kept).unwrap_or(usize::MAX);
    let listed = reply.migrations.iter().filter(|status| status.unsettled);
    if 0 < unlisted && listed.count() < unlisted {
        text += &format!(
            "\n\nOf {unlisted} old ones a source may still ask how they ended: \
             `pageferry list --all`"
        );
    }
    text
}

fn refused(refusal: &Refusal) -> String {
    let Refusal {
        at_unix_ms,
        workload,
        to,
        failure,
    } = refusal;
    let nanos = i128::from(*at_unix_ms) * 1_000_000;
    let at = time::OffsetDateTime::from_unix_timestamp_nanos(nanos);
    let at = at.map_or_else(
        |_| "at an unknown time".to_owned(),
        |at| {
            format!(
                "{} {:02}:{:02}:{:02} UTC",
                at.date(),
                at.hour(),
                at.minute(),
                at.second()
            )
        },
    );
    let (code, text) = failure
        .as_ref()
        .map_or(("unknown", ""), |failure| (&failure.code, &failure.text));
    format!("{at}  {workload} to {to}  {code}: {text}")
}

/// Every status in a line, under a heading.
fn table(statuses: &[Status]) -> String {
    let heading = [
        "ID", "WORKLOAD", "ROLE", "PEER", "PHASE", "ROUND", "ON WIRE", "DOWNTIME",
    ]
    .map(str::to_owned);
    let rows: Vec<[String; 8]> = std::iter::once(heading)
        .chain(statuses.iter().map(row))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..8).map(width).collect();
    let line = |row: &[String; 8]| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A status in one line, for those who watch without a terminal.
pub fn line(status: &Status) -> String {
    let mut text = format!("{} {}", status.workload, status.phase);
    if status.round > 0 {
        text += &format!(", round {}", status.round);
    }
    if status.retries > 0 {
        text += &format!(", freezes given up: {}", status.retries);
    }
    if let Some(sent) = status.sent_bytes.filter(|sent| *sent > 0) {
        text += &format!(", {} of pages sent", Bytes(sent).rounded());
    }
    if let Some(rate) = status.dirty_pages_per_second {
        text += &format!(", {rate} dirtied pages/s");
    }
    if let Some(predicted) = status.predicted_downtime_us {
        text += &format!(", predicted downtime {:.0} ms", millis(predicted));
    }
    text += &paused(status, ", ");
    if let Some(failure) = &status.failure {
        text += &format!(", {}: {}", failure.code, failure.text);
    }
    if status.role() == Side::Target
        && let Some(pid) = status.pid_at_target
        && status.workload != format!("process/{pid}")
    {
        text += &format!(", here process/{pid}");
    }
    if status.holding {
        text += ", held until `pageferry proceed`";
    }
    if status.waiting {
        text += ", its container waits";
    }
    if let Some(missing) = status.missing_bytes.filter(|bytes| *bytes > 0) {
        text += &format!(", {} to come", Bytes(missing).rounded());
    }
    if status.drains {
        text += ", lost if either node dies now";
    }
    if status.fence_wanted {
        text += ", the peer is gone: bring it back, or see `pageferry resolve --help`";
    }
    text
}

/// How often it stood still before it was frozen, and how long, after these words; nothing if it
/// did not.
pub fn paused(status: &Status, before: &str) -> String {
    let longest = status.longest_pause_us.map(millis);
    longest.map_or_else(String::new, |longest| {
        let pauses = status.pauses.unwrap_or(0);
        format!("{before}paused for scans: {pauses}, longest {longest:.1} ms")
    })
}

/// Rounds, as far as they are known: a daemon that was restarted has lost count.
fn rounds(status: &Status) -> Option<u32> {
    (status.round > 0 || status.memory_bytes.is_some()).then_some(status.round)
}

/// The side a status is of.
pub fn role(status: &Status) -> &'static str {
    match status.role() {
        Side::Source => "source",
        Side::Target => "target",
        Side::Unspecified => "unknown",
    }
}

/// Microseconds as milliseconds.
pub fn millis(micros: u64) -> f64 {
    // Exact up to 2^53 microseconds, which is 285 years.
    micros as f64 / 1000.0
}

fn row(status: &Status) -> [String; 8] {
    [
        status.id.clone(),
        status.workload.clone(),
        role(status).to_owned(),
        status.peer.clone(),
        status.phase.clone(),
        rounds(status).map_or("-".to_owned(), |round| round.to_string()),
        status
            .wire_bytes
            .map_or("-".to_owned(), |wire| Bytes(wire).rounded()),
        status.downtime_us.map_or("-".to_owned(), |downtime| {
            format!("{:.1} ms", millis(downtime))
        }),
    ]
}

fn parts(parts: Option<&Parts>) -> PartsMs {
    let Some(parts) = parts else {
        return PartsMs::default();
    };
    PartsMs {
        freeze: parts.freeze_us.map(millis),
        final_round: parts.final_round_us.map(millis),
        restore: parts.restore_us.map(millis),
        commit: parts.commit_us.map(millis),
        handoff: parts.handoff_us.map(millis),
    }
}

fn named_parts(parts: PartsMs) -> [(&'static str, Option<f64>); 5] {
    [
        ("freeze", parts.freeze),
        ("final_round", parts.final_round),
        ("restore", parts.restore),
        ("commit", parts.commit),
        ("handoff", parts.handoff),
    ]
}

fn error(status: &Status) -> Option<ErrorObject> {
    let failure = status.failure.as_ref()?;
    Some(ErrorObject {
        code: failure.code.clone(),
        text: failure.text.clone(),
    })
}

/// How memory travels: copied in rounds before the freeze.
const PRECOPY: &str = "precopy";

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
