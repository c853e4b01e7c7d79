//! The timeline of a migration as it is printed: drawn for people, JSON for programs.
//!
//! What is drawn has one scale before the freeze, one within the downtime and one after it: a round
//! takes seconds, and what a freeze is made of takes milliseconds. A span is within another one of
//! its node if it begins and ends in it. The JSON is stable, as in [`super::output`].

pub mod chrome;

use pageferry_api::{Side, Span, TimelineReply};
use pageferry_proto::migration::timeline::{FINAL_HELD, FREEZE, LET_GO, PARTS};
use serde::Serialize;

use super::output::{self, millis};

/// Columns of a terminal that does not say how many it has.
pub const COLUMNS: usize = 100;

/// Columns of a bar, at least.
const BAR_COLUMNS_MIN: usize = 16;

/// What only sums up others, or waits for what the other node does: no reason by itself.
const SUMS: [&str; 2] = [LET_GO, FINAL_HELD];

/// How many of the longest spans are named.
const LONGEST: usize = 3;

/// A timeline for programs.
#[derive(Debug, Serialize)]
pub struct Timeline<'a> {
    id: &'a str,
    workload: &'a str,
    source: &'a str,
    target: &'a str,
    downtime_ms: Option<f64>,
    one_clock: bool,
    /// How far the other node's clock is ahead, and how wrong that may be.
    clock_ahead_ms: Option<f64>,
    clock_uncertainty_ms: Option<f64>,
    dropped: u64,
    whole: bool,
    spans: Vec<Entry<'a>>,
}

/// A span for programs.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    role: &'static str,
    node: &'a str,
    name: &'a str,
    detail: &'a str,
    begin_ms: f64,
    took_ms: f64,
}

/// A span with its node's name and its depth among those of its node.
#[derive(Clone, Debug)]
struct Row<'a> {
    node: &'a str,
    span: &'a Span,
    depth: usize,
}

/// Both nodes' names: the source's first.
fn nodes(reply: &TimelineReply) -> (&str, &str) {
    let Some(status) = &reply.status else {
        return ("", "");
    };
    match status.role() {
        Side::Target => (&status.peer, &status.node),
        Side::Source | Side::Unspecified => (&status.node, &status.peer),
    }
}

impl<'a> Timeline<'a> {
    /// What the daemon said.
    pub fn of(reply: &'a TimelineReply) -> Self {
        let status = reply.status.as_ref();
        let (source, target) = nodes(reply);
        let entry = |span: &'a Span| Entry {
            role: role(span),
            node: if span.node() == Side::Target {
                target
            } else {
                source
            },
            name: &span.name,
            detail: &span.detail,
            begin_ms: nanos(span.begin_ns),
            took_ms: nanos(took(span)),
        };
        Self {
            id: status.map_or("", |status| &status.id),
            workload: status.map_or("", |status| &status.workload),
            source,
            target,
            downtime_ms: status.and_then(|status| status.downtime_us).map(millis),
            one_clock: reply.one_clock,
            clock_ahead_ms: reply.clock_ahead_ns.map(nanos),
            clock_uncertainty_ms: reply
                .clock_uncertainty_ns
                .map(|wrong| nanos(i64::try_from(wrong).unwrap_or(i64::MAX))),
            dropped: reply.dropped,
            whole: reply.whole,
            spans: reply.spans.iter().map(entry).collect(),
        }
    }
}

fn role(span: &Span) -> &'static str {
    match span.node() {
        Side::Target => "target",
        Side::Source | Side::Unspecified => "source",
    }
}

fn took(span: &Span) -> i64 {
    i64::try_from(span.duration_ns).unwrap_or(i64::MAX)
}

fn end(span: &Span) -> i64 {
    span.begin_ns.saturating_add(took(span))
}

/// Nanoseconds as milliseconds.
fn nanos(nanos: i64) -> f64 {
    // Exact up to 2^53 nanoseconds, which is 104 days; beyond, to a microsecond.
    nanos as f64 / 1e6
}

/// The timeline as a drawing so many columns wide.
pub fn draw(reply: &TimelineReply, columns: usize) -> String {
    let rows = rows(reply);
    if rows.is_empty() {
        return "nothing is known of what took how long: it is lost with the daemon, and when a \
                migration is listed no more"
            .to_owned();
    }
    let downtime = downtime(&rows);
    let mut text = heading(reply);
    let (begin, finish) = downtime.unwrap_or((i64::MAX, i64::MAX));
    let before = |row: &&Row<'_>| row.span.begin_ns < begin && end(row.span) <= begin;
    let after = |row: &&Row<'_>| finish <= row.span.begin_ns;
    let all = || rows.iter();
    let groups: [(&str, Vec<&Row<'_>>); 3] = [
        ("before the freeze", all().filter(before).collect()),
        (
            "in the downtime",
            all().filter(|row| !before(row) && !after(row)).collect(),
        ),
        ("after it", all().filter(after).collect()),
    ];
    for (title, rows) in groups {
        let title = match (downtime, title) {
            // Nothing was frozen, as far as this node knows.
            (None, "before the freeze") => "all that is known",
            (_, title) => title,
        };
        if !rows.is_empty() {
            text += &format!("\n\n{title}\n{}", group(&rows, columns));
        }
    }
    let longest = longest(&rows, downtime);
    if !longest.is_empty() {
        text += &format!("\n\nlongest in the downtime: {}", longest.join(", "));
    }
    text
}

/// What moved, and what is known of the clocks.
fn heading(reply: &TimelineReply) -> String {
    let (source, target) = nodes(reply);
    let Some(status) = &reply.status else {
        return String::new();
    };
    let mut text = format!(
        "{} from {source} to {target}, {}",
        status.workload, status.phase
    );
    if let Some(downtime) = status.downtime_us {
        text += &format!(", downtime {:.1} ms", millis(downtime));
    }
    let other = &status.peer;
    text += &match (
        reply.one_clock,
        reply.clock_ahead_ns,
        reply.clock_uncertainty_ns,
    ) {
        (true, ..) => "\nboth nodes have one clock".to_owned(),
        (false, Some(ahead), Some(wrong)) => format!(
            "\nthe clock of {other} is {:.3} ms ahead, \u{b1} {:.3} ms",
            nanos(ahead),
            nanos(i64::try_from(wrong).unwrap_or(i64::MAX)),
        ),
        _ if status.role() == Side::Target => format!("\nof {other} nothing is known here"),
        _ => format!("\n{other} has not told of its spans"),
    };
    let has_told = reply.one_clock || reply.clock_ahead_ns.is_some();
    if has_told && !reply.whole {
        text += &format!(", and {other} has not told of its fill");
    }
    if 0 < reply.dropped {
        text += &format!("\n{} older spans were not kept", reply.dropped);
    }
    text
}

/// From when to when it stood still: the parts of the last freeze.
fn downtime(rows: &[Row<'_>]) -> Option<(i64, i64)> {
    let is_of_source = |row: &&Row<'_>| row.span.node() == Side::Source;
    let of_source = || rows.iter().filter(is_of_source);
    let begin = of_source()
        .filter(|row| row.span.name == FREEZE)
        .map(|row| row.span.begin_ns)
        .max()?;
    let parts = of_source()
        .filter(|row| PARTS.contains(&row.span.name.as_str()) && begin <= row.span.begin_ns);
    Some((begin, parts.map(|row| end(row.span)).max()?))
}

/// All spans, each behind those that it is within.
fn rows(reply: &TimelineReply) -> Vec<Row<'_>> {
    let (source, target) = nodes(reply);
    let mut spans: Vec<&Span> = reply.spans.iter().collect();
    spans.sort_by_key(|span| (span.begin_ns, std::cmp::Reverse(end(span))));
    let mut rows: Vec<Row<'_>> = Vec::with_capacity(spans.len());
    // By node: the rows that are open, the outermost first.
    let mut open: [Vec<usize>; 2] = [Vec::new(), Vec::new()];
    for span in spans {
        let (node, open) = match span.node() {
            Side::Target => (target, &mut open[1]),
            Side::Source | Side::Unspecified => (source, &mut open[0]),
        };
        open.retain(|outer| end(span) <= end(rows[*outer].span));
        let depth = open.len();
        open.push(rows.len());
        rows.push(Row { node, span, depth });
    }
    rows
}

/// Rows on one scale, with its ends above.
fn group(rows: &[&Row<'_>], columns: usize) -> String {
    let begin = rows.iter().map(|row| row.span.begin_ns).min().unwrap_or(0);
    let finish = rows.iter().map(|row| end(row.span)).max().unwrap_or(0);
    let label = |row: &Row<'_>| {
        let Row { span, depth, .. } = row;
        let space = if span.detail.is_empty() { "" } else { " " };
        format!("{}{}{space}{}", "  ".repeat(*depth), span.name, span.detail)
    };
    let width = |text: &dyn Fn(&Row<'_>) -> usize| rows.iter().map(|row| text(row)).max();
    let node_width = width(&|row| row.node.len()).unwrap_or(0);
    let label_width = width(&|row| label(row).len()).unwrap_or(0);
    let used = 2 + node_width + 2 + label_width + 2 + 10 + 2 + 10 + 2;
    let bar_width = columns.saturating_sub(used).max(BAR_COLUMNS_MIN);
    let mut text = format!(
        "  {:node_width$}  {:label_width$}  {:>10}  {:>10}  {}",
        "",
        "",
        "at ms",
        "took ms",
        scale(begin, finish, bar_width)
    );
    for row in rows {
        let line = format!(
            "  {:node_width$}  {:label_width$}  {:>10.2}  {:>10.2}  {}",
            row.node,
            label(row),
            nanos(row.span.begin_ns),
            nanos(took(row.span)),
            bar(row.span, (begin, finish), bar_width),
        );
        text += &format!("\n{line}");
    }
    text
}

/// Where a scale begins and ends.
fn scale(begin: i64, finish: i64, width: usize) -> String {
    let (left, right) = (
        format!("|{:.1}", nanos(begin)),
        format!("{:.1}|", nanos(finish)),
    );
    let gap = width.saturating_sub(left.len() + right.len());
    format!("{left}{}{right}", " ".repeat(gap))
}

/// A bar on its scale: at least half a column.
fn bar(span: &Span, (begin, finish): (i64, i64), width: usize) -> String {
    let range = i128::from(finish).saturating_sub(begin.into()).max(1);
    // In half columns.
    let place = |at: i64| {
        let since = (i128::from(at) - i128::from(begin)).clamp(0, range);
        usize::try_from(since * 2 * width as i128 / range).unwrap_or(0)
    };
    let (from, to) = (place(span.begin_ns), place(end(span)));
    let first = (from / 2).min(width - 1);
    let last = to.div_ceil(2).clamp(first + 1, width);
    let body = match to - from {
        0 => "\u{258c}".to_owned(),
        _ => "\u{2588}".repeat(last - first),
    };
    format!("{}{body}", " ".repeat(first))
}

/// The longest of what does not only sum up others, with its node. What goes on beside something
/// else is named too: one of the two is waited for.
fn longest(rows: &[Row<'_>], downtime: Option<(i64, i64)>) -> Vec<String> {
    let Some((begin, finish)) = downtime else {
        return Vec::new();
    };
    let is_within = |row: &&Row<'_>| begin <= row.span.begin_ns && end(row.span) <= finish;
    let is_sum = |name: &str| PARTS.contains(&name) || SUMS.contains(&name);
    let within = rows.iter().filter(is_within);
    let mut leaves: Vec<&Row<'_>> = within.filter(|row| !is_sum(&row.span.name)).collect();
    leaves.sort_by_key(|row| std::cmp::Reverse(row.span.duration_ns));
    let named = leaves.iter().take(LONGEST).map(|row| {
        let took = nanos(took(row.span));
        format!("{} {} {took:.1} ms", row.node, row.span.name)
    });
    named.collect()
}

/// What to say of a timeline: JSON, or a drawing as wide as the terminal.
pub fn text(reply: &TimelineReply, json: bool) -> String {
    if json {
        return output::json(&Timeline::of(reply));
    }
    let columns = std::env::var("COLUMNS").ok();
    let columns = columns.and_then(|columns| columns.parse().ok());
    draw(reply, columns.unwrap_or(COLUMNS).clamp(60, 400))
}

#[cfg(test)]
#[path = "timeline_tests.rs"]
mod tests;
