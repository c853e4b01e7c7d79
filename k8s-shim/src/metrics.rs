//! What the programs count, for Prometheus: its text format, over plain HTTP at `/metrics`.
//!
//! Every series there can be is there from the start, at 0, so that a first violation is seen as a
//! change. Numbers are of this process: they begin anew with it, as counters may.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio::net::TcpListener;
use tracing::{error, info};

/// Something that is counted, or that stands somewhere.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Metric {
    name: &'static str,
    help: &'static str,
    /// It only grows.
    counts: bool,
    /// What its label is called, and all that this may be; none if it is one number.
    label: Option<(&'static str, &'static [&'static str])>,
}

/// All numbers of a process.
#[derive(Clone, Debug)]
pub struct Metrics {
    numbers: Arc<Mutex<Numbers>>,
}

/// By metric, and by the value of its label: empty where it has none.
type Numbers = BTreeMap<&'static Metric, BTreeMap<&'static str, u64>>;

impl Metrics {
    /// Of a program that has these, all of which are 0.
    pub fn new(all: &[&'static Metric]) -> Self {
        let zeros = all.iter().map(|metric| {
            let values = metric.label.map_or(&[""][..], |(_, values)| values);
            (*metric, values.iter().map(|value| (*value, 0)).collect())
        });
        Self {
            numbers: Arc::new(Mutex::new(zeros.collect())),
        }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        // They are whole, whoever panicked.
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more.
    pub fn count(&self, metric: &'static Metric, label: &'static str) {
        self.add(metric, label, 1);
    }

    /// So many more.
    pub fn add(&self, metric: &'static Metric, label: &'static str, more: u64) {
        let mut numbers = self.numbers();
        let number = numbers.entry(metric).or_default().entry(label).or_default();
        *number = number.saturating_add(more);
    }

    /// It is so much now.
    pub fn set(&self, metric: &'static Metric, number: u64) {
        self.numbers().entry(metric).or_default().insert("", number);
    }

    /// The number there.
    pub fn get(&self, metric: &'static Metric, label: &str) -> u64 {
        let numbers = self.numbers();
        let number = numbers.get(metric).and_then(|all| all.get(label));
        number.copied().unwrap_or_default()
    }

    /// All of it, in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (metric, numbers) in &*self.numbers() {
            let Metric { name, help, .. } = metric;
            let kind = if metric.counts { "counter" } else { "gauge" };
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (value, number) in numbers {
                let _ = match metric.label {
                    Some((label, _)) => writeln!(text, "{name}{{{label}=\"{value}\"}} {number}"),
                    None => writeln!(text, "{name} {number}"),
                };
            }
        }
        text
    }

    /// Serves them at an address until the process ends, if there is one.
    ///
    /// # Errors
    /// When nobody can listen there.
    pub async fn serve(&self, address: Option<SocketAddr>) -> Result<()> {
        let Some(address) = address else {
            return Ok(());
        };
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("listening for metrics at {address}"))?;
        let metrics = self.clone();
        let answer = move || {
            let text = metrics.text();
            async move { ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text) }
        };
        let router = Router::new().route("/metrics", get(answer));
        info!(%address, "metrics are served");
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                error!(%error, "metrics are served no more");
            }
        });
        Ok(())
    }
}

/// How moves ended, as this controller has written it down.
pub static MOVES: Metric = Metric {
    name: "pageferry_migrations_total",
    help: "Migrations that have ended, by their result.",
    counts: true,
    label: Some((
        "result",
        &[
            "Succeeded",
            "SucceededWithoutRestore",
            "Failed",
            "Cancelled",
        ],
    )),
};
/// For how long pods stood still.
pub static DOWNTIME: Metric = Metric {
    name: "pageferry_migration_downtime_milliseconds_total",
    help: "For how long pods have stood still, of those that have moved.",
    counts: true,
    label: None,
};
/// Rules of [`crate::invariants`].
pub static VIOLATIONS: Metric = Metric {
    name: "pageferry_invariant_violations_total",
    help: "How often a rule that must always hold was seen broken. Anything but 0 is a bug.",
    counts: true,
    label: Some(("rule", &crate::invariants::NAMES)),
};
/// Looks at Migrations.
pub static LOOKS_FAILED: Metric = Metric {
    name: "pageferry_reconcile_failures_total",
    help: "Looks at a Migration that came to nothing, and were repeated.",
    counts: true,
    label: None,
};
/// Whether this one leads.
pub static LEADS: Metric = Metric {
    name: "pageferry_controller_leads",
    help: "1 if this controller leads, 0 if it waits for the one that does to end.",
    counts: false,
    label: None,
};
/// All of a controller's.
pub const CONTROLLER: [&Metric; 5] = [&MOVES, &DOWNTIME, &VIOLATIONS, &LOOKS_FAILED, &LEADS];

const CALL_NAMES: [&str; 5] = ["migrate", "expect", "proceed", "abort", "resolve"];
/// Calls of a daemon.
pub static CALLS: Metric = Metric {
    name: "pageferry_agent_calls_total",
    help: "Calls of the node's pageferryd, by what was asked for.",
    counts: true,
    label: Some(("call", &CALL_NAMES)),
};
/// Those that came to nothing.
pub static CALLS_FAILED: Metric = Metric {
    name: "pageferry_agent_call_failures_total",
    help: "Calls of the node's pageferryd that failed, and are repeated.",
    counts: true,
    label: Some(("call", &CALL_NAMES)),
};
/// What was said of moves.
pub static REPORTS: Metric = Metric {
    name: "pageferry_agent_reports_total",
    help: "Reports on Migrations that the API server took.",
    counts: true,
    label: None,
};
/// Those that it did not take.
pub static REPORTS_FAILED: Metric = Metric {
    name: "pageferry_agent_report_failures_total",
    help: "Reports on Migrations that the API server did not take, and that are repeated.",
    counts: true,
    label: None,
};
/// Whether pods may come.
pub static READY: Metric = Metric {
    name: "pageferry_agent_ready",
    help: "1 if pods may come to this node: pageferryd answers, and the wrapper is there.",
    counts: false,
    label: None,
};
/// All of an agent's.
pub const AGENT: [&Metric; 5] = [&CALLS, &CALLS_FAILED, &REPORTS, &REPORTS_FAILED, &READY];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_there_can_be_is_told_from_the_start() {
        let metrics = Metrics::new(&CONTROLLER);
        let text = metrics.text();
        for line in [
            "# TYPE pageferry_migrations_total counter",
            "pageferry_migrations_total{result=\"Failed\"} 0",
            "pageferry_invariant_violations_total{rule=\"two-copies\"} 0",
            "# TYPE pageferry_controller_leads gauge",
            "pageferry_controller_leads 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}:\n{text}");
        }
        metrics.count(&MOVES, "Failed");
        metrics.count(&MOVES, "Failed");
        metrics.add(&DOWNTIME, "", 80);
        metrics.set(&LEADS, 1);
        let text = metrics.text();
        for line in [
            "pageferry_migrations_total{result=\"Failed\"} 2",
            "pageferry_migration_downtime_milliseconds_total 80",
            "pageferry_controller_leads 1",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}:\n{text}");
        }
        assert_eq!(metrics.get(&MOVES, "Failed"), 2);
    }

    #[tokio::test]
    async fn they_are_served_where_they_are_asked_for() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let metrics = Metrics::new(&AGENT);
        metrics.serve(None).await.expect("nothing to do");
        let probe = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = probe.local_addr().expect("an address");
        let taken = metrics.serve(Some(address)).await;
        assert!(format!("{:#}", taken.expect_err("it is taken")).contains("listening"));
        drop(probe);
        metrics.serve(Some(address)).await.expect("it listens");
        metrics.count(&CALLS, "expect");
        let mut stream = tokio::net::TcpStream::connect(address)
            .await
            .expect("it listens");
        let ask = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        stream.write_all(ask).await.expect("it is heard");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains("pageferry_agent_calls_total{call=\"expect\"} 1"),
            "{answer}"
        );
    }
}
