//! What a node's daemon counts, as its endpoint says it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::daemon::METRICS;
use crate::lab::inside::in_network;
use crate::lab::node::Node;

/// The value of each series, by its name with its labels; those of buckets too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape {
    values: BTreeMap<String, f64>,
    /// How long the daemon took to answer.
    pub took: Duration,
}

impl Scrape {
    /// What the daemon of a node says now.
    pub fn of(node: &Node) -> Result<Self> {
        let began = Instant::now();
        let asked = in_network(&node.namespaces.net, ask)?;
        let answer = asked.with_context(|| format!("asking node {} for metrics", node.name()))?;
        let took = began.elapsed();
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("the metrics have no head")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "the endpoint says {head}");
        Ok(Self {
            took,
            ..Self::read(body)?
        })
    }

    fn read(text: &str) -> Result<Self> {
        ensure!(text.ends_with("# EOF\n"), "the metrics have no end");
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line
                .rsplit_once(' ')
                .with_context(|| format!("no series: {line}"))?;
            let value = value
                .parse()
                .with_context(|| format!("no number: {line}"))?;
            let old = values.insert(name.to_owned(), value);
            ensure!(old.is_none(), "{name} is there twice");
        }
        Ok(Self {
            values,
            took: Duration::ZERO,
        })
    }

    /// The value of a series, by its name without the prefix of all.
    pub fn get(&self, name: &str) -> Result<f64> {
        let name = format!("{PREFIX}{name}");
        let value = self.values.get(&name).copied();
        value.with_context(|| format!("there is no {name}"))
    }

    /// The sum of all series of a metric.
    pub fn sum(&self, metric: &str) -> f64 {
        let begin = format!("{PREFIX}{metric}{{");
        let own = format!("{PREFIX}{metric}");
        let series = self.values.iter();
        let of_it = series.filter(|(name, _)| **name == own || name.starts_with(&begin));
        of_it.map(|(_, value)| value).sum()
    }

    /// A counter that is less than it was, or a series that has come or gone.
    pub fn step_back_from(&self, earlier: &Self) -> Option<String> {
        if !self.values.keys().eq(earlier.values.keys()) {
            return Some("series have come or gone".to_owned());
        }
        let grows = |name: &str| {
            let metric = name.split('{').next().unwrap_or(name);
            ["_total", "_bucket", "_count", "_sum"]
                .iter()
                .any(|suffix| metric.ends_with(suffix))
        };
        let mut counters = self.values.iter().filter(|(name, _)| grows(name));
        let back = counters.find(|(name, value)| **value < earlier.values[*name]);
        back.map(|(name, value)| format!("{name} went from {} to {value}", earlier.values[name]))
    }
}

fn ask() -> Result<String> {
    let mut stream = TcpStream::connect(METRICS).context("connecting")?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    let ask = format!("GET /metrics HTTP/1.1\r\nHost: {METRICS}\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).context("asking")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading")?;
    Ok(answer)
}

const PREFIX: &str = "pageferryd_";
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Scrape {
        Scrape::read(&format!("{text}# EOF\n")).expect("metrics")
    }

    #[test]
    fn series_are_told_from_each_other_and_from_those_with_longer_names() {
        let text = "# HELP x y.\npageferryd_sent_total 7\n\
                    pageferryd_sent_pages_total{path=\"a\"} 1\n\
                    pageferryd_sent_pages_total{path=\"b\"} 2\n";
        let scrape = read(text);
        assert_eq!(scrape.get("sent_total").ok(), Some(7.0));
        assert_eq!(scrape.sum("sent_pages_total"), 3.0);
        assert_eq!(scrape.sum("sent_total"), 7.0);
        assert!(scrape.get("sent").is_err());
        assert!(Scrape::read("a 1\n").is_err(), "cut off");
        assert!(Scrape::read("a 1\na 1\n# EOF\n").is_err(), "twice");
    }

    #[test]
    fn a_counter_that_shrinks_is_seen_and_a_level_may() {
        let before = read("pageferryd_a_total 2\npageferryd_b 2\n");
        let same = read("pageferryd_a_total 2\npageferryd_b 1\n");
        assert_eq!(same.step_back_from(&before), None);
        let back = read("pageferryd_a_total 1\npageferryd_b 2\n");
        assert!(
            back.step_back_from(&before)
                .is_some_and(|why| why.contains("a_total"))
        );
        let gone = read("pageferryd_a_total 2\n");
        assert!(gone.step_back_from(&before).is_some());
    }
}
