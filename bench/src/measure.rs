//! What processes used: CPU time and private memory, by sampling each node's /proc.
//!
//! A process that ends between two samples loses its last interval: at most [`PERIOD`] of CPU time.

pub mod node;
pub mod scrape;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::lab::node::Node;

/// Samples until it is finished.
#[derive(Debug)]
pub struct Meter {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<HashMap<(usize, i32), Process>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug)]
struct Process {
    /// Node and command: "b/pageferryd".
    name: String,
    ticks_first: u64,
    ticks_last: u64,
    anonymous_peak: u64,
}

/// Usage by "node/command".
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub cpu_seconds: f64,
    /// The largest private memory (anonymous and file pages, no shared ones) of one such process.
    pub private_bytes_peak: u64,
}

impl Meter {
    pub fn start(lab: &Lab) -> Result<Self> {
        let places: Vec<(String, PathBuf)> = lab
            .nodes
            .iter()
            .map(|node| (node.name().to_owned(), node.path("/proc")))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(HashMap::new()));
        sample(&places, &mut seen.lock().expect("nobody else has it yet"));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::Builder::new().name("meter".to_owned());
        let thread = thread.spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(PERIOD);
                sample(
                    &places,
                    &mut shared.lock().expect("sampling does not panic"),
                );
            }
        });
        Ok(Self {
            stop,
            seen,
            thread: Some(thread.context("starting the meter")?),
        })
    }

    /// Ends the sampling; usage since the start, by "node/command".
    pub fn finish(mut self) -> BTreeMap<String, Usage> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It ends without a result; its panic would show as missing figures.
            let _ = thread.join();
        }
        let mut sums: BTreeMap<String, Usage> = BTreeMap::new();
        for process in self.seen.lock().expect("sampling does not panic").values() {
            let usage = sums.entry(process.name.clone()).or_default();
            usage.cpu_seconds +=
                (process.ticks_last - process.ticks_first) as f64 / TICKS_PER_SECOND;
            usage.private_bytes_peak = usage.private_bytes_peak.max(process.anonymous_peak);
        }
        sums
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn sample(places: &[(String, PathBuf)], seen: &mut HashMap<(usize, i32), Process>) {
    let first = seen.is_empty();
    for (index, (node, proc)) in places.iter().enumerate() {
        let Ok(entries) = fs::read_dir(proc) else {
            continue;
        };
        for entry in entries.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let Some((command, ticks)) = read_stat(&entry.path().join("stat")) else {
                continue;
            };
            if !COMMANDS.contains(&command.as_str()) {
                continue;
            }
            let process = seen.entry((index, pid)).or_insert_with(|| Process {
                name: format!("{node}/{command}"),
                // What came up after the start has used all of its time since.
                ticks_first: if first { ticks } else { 0 },
                ticks_last: ticks,
                anonymous_peak: 0,
            });
            // A restored process is named after CRIU until it gets its own name back.
            process.name = format!("{node}/{command}");
            process.ticks_last = process.ticks_last.max(ticks);
            let private = private_bytes(&entry.path().join("status")).unwrap_or(0);
            process.anonymous_peak = process.anonymous_peak.max(private);
        }
    }
}

/// Command name and CPU time in clock ticks.
fn read_stat(path: &std::path::Path) -> Option<(String, u64)> {
    let text = fs::read_to_string(path).ok()?;
    let (before, after) = text.rsplit_once(") ")?;
    let (_, command) = before.split_once('(')?;
    // utime and stime are fields 14 and 15; the state, field 3, is the first after the name.
    let mut times = after.split(' ').skip(11);
    let user: u64 = times.next()?.parse().ok()?;
    let system: u64 = times.next()?.parse().ok()?;
    Some((command.to_owned(), user + system))
}

fn private_bytes(path: &std::path::Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some((kib("RssAnon:")? + kib("RssFile:")?) << 10)
}

/// Forgets the peak of a node's memory so far.
pub fn reset_memory_peak(node: &Node) {
    for folder in &node.record.cgroups {
        // Each file exists in one kind of hierarchy; not all kernels can reset version 2's.
        let _ = fs::write(folder.join("memory.max_usage_in_bytes"), "0");
        if folder.join("memory.peak").exists() {
            let _ = fs::write(folder.join("memory.peak"), "0");
        }
    }
}

/// The peak of all memory of a node since the last reset, where the machine has memory cgroups.
pub fn memory_peak(node: &Node) -> Option<u64> {
    let files = node.record.cgroups.iter().flat_map(|folder| {
        [
            folder.join("memory.max_usage_in_bytes"),
            folder.join("memory.peak"),
        ]
    });
    let mut peaks = files.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    peaks.next()
}

const COMMANDS: [&str; 5] = [
    "criu",
    "lab-writer",
    "pageferry-pager",
    "pageferryd",
    "redis-server",
];
const PERIOD: Duration = Duration::from_millis(100);
/// USER_HZ, which is 100 on every architecture that Linux supports today.
const TICKS_PER_SECOND: f64 = 100.0;
