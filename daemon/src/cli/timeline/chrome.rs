//! A timeline as a trace event file, as Chrome and Perfetto open it: each node is a process, and
//! spans that overlap without one being within the other are on threads of their own.

use std::fs;
use std::io;
use std::path::Path;

use pageferry_api::{Side, Span, TimelineReply};
use serde::Serialize;

use super::{end, nodes, role, took};

/// The file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace<'a> {
    trace_events: Vec<Event<'a>>,
    display_time_unit: &'static str,
    other_data: Other<'a>,
}

/// What there is besides.
#[derive(Debug, Serialize)]
struct Other<'a> {
    migration: &'a str,
    workload: &'a str,
    one_clock: bool,
    clock_uncertainty_us: Option<f64>,
}

/// One event: a name of a process, or a span.
#[derive(Debug, Serialize)]
struct Event<'a> {
    name: &'a str,
    cat: &'static str,
    ph: &'static str,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: usize,
    args: Arguments<'a>,
}

#[derive(Debug, Serialize)]
struct Arguments<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
}

impl<'a> Trace<'a> {
    /// Of what the daemon said. Times count from the first span.
    pub fn of(reply: &'a TimelineReply) -> Self {
        let status = reply.status.as_ref();
        let (source, target) = nodes(reply);
        let mut events: Vec<Event<'_>> = [(1, source, "source"), (2, target, "target")]
            .map(|(pid, node, role)| named(pid, format!("{node} ({role})")))
            .into();
        let first = reply.spans.iter().map(|span| span.begin_ns).min();
        for side in [Side::Source, Side::Target] {
            let mut spans: Vec<&Span> = reply
                .spans
                .iter()
                .filter(|span| (span.node() == Side::Target) == (side == Side::Target))
                .collect();
            spans.sort_by_key(|span| (span.begin_ns, std::cmp::Reverse(end(span))));
            let mut threads = Vec::new();
            for span in spans {
                events.push(event(span, thread(&mut threads, span), first.unwrap_or(0)));
            }
        }
        Self {
            trace_events: events,
            display_time_unit: "ms",
            other_data: Other {
                migration: status.map_or("", |status| &status.id),
                workload: status.map_or("", |status| &status.workload),
                one_clock: reply.one_clock,
                clock_uncertainty_us: reply
                    .clock_uncertainty_ns
                    .map(|nanos| nanos as f64 / 1000.0),
            },
        }
    }

    /// Writes it to a file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        fs::write(path, bytes)
    }
}

fn named(pid: u32, name: String) -> Event<'static> {
    Event {
        name: "process_name",
        cat: "__metadata",
        ph: "M",
        ts: 0.0,
        dur: None,
        pid,
        tid: 0,
        args: Arguments {
            name: Some(name),
            detail: "",
        },
    }
}

fn event(span: &Span, tid: usize, first: i64) -> Event<'_> {
    let micros = |nanos: i64| nanos as f64 / 1000.0;
    Event {
        name: &span.name,
        cat: role(span),
        ph: "X",
        ts: micros(span.begin_ns.saturating_sub(first)),
        dur: Some(micros(took(span))),
        pid: if span.node() == Side::Target { 2 } else { 1 },
        tid,
        args: Arguments {
            name: None,
            detail: &span.detail,
        },
    }
}

/// The first thread on which the span is within, or behind, all others. `threads` has, for each,
/// the ends of those that it would be within, the outermost first.
fn thread(threads: &mut Vec<Vec<i64>>, span: &Span) -> usize {
    for (number, open) in threads.iter_mut().enumerate() {
        open.retain(|outer| span.begin_ns < *outer);
        if open.last().is_none_or(|outer| end(span) <= *outer) {
            open.push(end(span));
            return number + 1;
        }
    }
    threads.push(vec![end(span)]);
    threads.len()
}
