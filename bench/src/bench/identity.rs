//! What a series says of itself: machine, programs, sources, and what its names mean.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use super::plan::Wanted;
use super::series::{Machine, SCHEMA, Series};
use crate::lab::Lab;
use crate::lab::node::Node;

/// The series at a path, if it is of this machine and these sources; a new one if there is none.
///
/// # Errors
/// It is of another machine or of other sources.
pub fn begin(lab: &Lab, path: &Path) -> Result<Series> {
    let node = lab.nodes.first().context("a lab has at least one node")?;
    let fresh = Series {
        schema: SCHEMA.to_owned(),
        machine: machine(lab)?,
        versions: versions(node),
        revision: revision(),
        commands: Vec::new(),
        seeds: Vec::new(),
        begun: Vec::new(),
        legend: BTreeMap::new(),
        compression: BTreeMap::new(),
        cells: Vec::new(),
    };
    if !path.exists() {
        return Ok(fresh);
    }
    let mut series = Series::read(path)?;
    let same = series.machine == fresh.machine && series.revision == fresh.revision;
    ensure!(
        same,
        "{} is of another machine, kernel or revision ({}; this is {}): choose another --out",
        path.display(),
        series.revision,
        fresh.revision
    );
    series.versions.extend(fresh.versions);
    Ok(series)
}

/// One more command that adds to it.
pub fn note_command(series: &mut Series, command: &str, seed: u64) {
    series.commands.push(command.to_owned());
    series.seeds.push(seed);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    series.begun.push(now.map_or(0, |since| since.as_secs()));
}

/// What the names of these cells mean.
pub fn describe(series: &mut Series, cells: &[Wanted]) {
    for cell in cells {
        let (kind, link, system) = (&cell.entry.kind, cell.link, cell.system);
        let names = [
            (kind.name, kind.summary),
            (link.name, link.summary),
            (system.name, system.summary),
        ];
        for (name, summary) in names {
            series.legend.insert(name.to_owned(), summary.to_owned());
        }
        let ratio = (kind.compression() * 100.0).round() / 100.0;
        series.compression.insert(kind.name.to_owned(), ratio);
    }
}

fn machine(lab: &Lab) -> Result<Machine> {
    let read =
        |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let processors = read("/proc/cpuinfo")?;
    let memory = after(&read("/proc/meminfo")?, "MemTotal").unwrap_or_default();
    let kib = memory
        .split(' ')
        .next()
        .and_then(|kib| kib.parse::<u64>().ok());
    Ok(Machine {
        processor: after(&processors, "model name").unwrap_or_default(),
        processors: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        memory_bytes: kib.unwrap_or_default() << 10,
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        nodes_on_it: lab.nodes.len(),
    })
}

/// What programs of a node say of themselves; those it does not have are left out.
fn versions(node: &Node) -> BTreeMap<String, String> {
    let says = |(name, arguments): &(&str, &[&str])| -> Option<(String, String)> {
        let output = node.command(name).ok()?.args(*arguments).output().ok()?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = printed
            .lines()
            .find(|line| line.bytes().any(|byte| byte.is_ascii_digit()))?;
        let words = line.split_whitespace().take(VERSION_WORDS);
        Some(((*name).to_owned(), words.collect::<Vec<_>>().join(" ")))
    };
    PROGRAMS.iter().filter_map(says).collect()
}

/// Of the sources that the current folder is in.
fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text)
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let is_clean = changed.is_some_and(|changed| changed.is_empty());
    if is_clean {
        head
    } else {
        format!("{head}-dirty")
    }
}

const PROGRAMS: [(&str, &[&str]); 10] = [
    ("criu", &["--version"]),
    ("crun", &["--version"]),
    ("memcached", &["--version"]),
    ("nginx", &["-v"]),
    ("pageferry", &["--version"]),
    ("podman", &["--version"]),
    ("redis-server", &["--version"]),
    ("runc", &["--version"]),
    ("socat", &["-V"]),
    ("zstd", &["--version"]),
];
const VERSION_WORDS: usize = 4;
