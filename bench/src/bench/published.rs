//! Tables of papers, repeated as far as one machine allows: theirs beside ours.

use super::series::Series;
use super::table::{millis, spread};

/// A table of a paper.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// As `--table` takes it.
    pub name: &'static str,
    pub title: &'static str,
    /// The cells that repeat it.
    pub pattern: &'static str,
    /// The head of their columns.
    figures: &'static [&'static str],
    rows: &'static [Row],
    /// What is not as in the paper.
    pub differs: &'static str,
}

/// What they measured, and our cell that is the same method.
#[derive(Clone, Copy, Debug)]
struct Row {
    method: &'static str,
    theirs: &'static [&'static str],
    /// Workload, link, system.
    cell: Option<(&'static str, &'static str, &'static str)>,
}

const fn row(
    method: &'static str,
    theirs: &'static [&'static str],
    cell: Option<(&'static str, &'static str, &'static str)>,
) -> Row {
    Row {
        method,
        theirs,
        cell,
    }
}

pub const SWIFTBATON: &str = "redis-swiftbaton";
pub const KUBESPT_1: &str = "redis-kubespt-1g";
pub const KUBESPT_2: &str = "redis-kubespt-2g";

pub static ALL: [Published; 2] = [
    Published {
        name: "swiftbaton",
        title: "SwiftBaton (ACM ATC 2026), Redis under YCSB-A, and the same here",
        pattern: "redis-swiftbaton/unshaped/*",
        figures: &["client gap", "TTR90", "operations per second"],
        rows: &[
            row(
                "native CRIU 3.18, images over rsocket",
                &["212.5 s", "0.56 s", "42,109"],
                Some((SWIFTBATON, "unshaped", "criu-stop-copy")),
            ),
            row(
                "resident snapshot and refresh (as PCLive)",
                &["362 ms", "31.9 s", "44,316"],
                None,
            ),
            row(
                "post-copy",
                &["261 ms", "3.64 s", "41,701"],
                Some((SWIFTBATON, "unshaped", "criu-lazy")),
            ),
            row("hybrid", &["301 ms", "1.68 s", "43,112"], None),
            row(
                "remote fork (on demand only)",
                &["1.02 s", "89.8 s", "43,459"],
                None,
            ),
            row(
                "SwiftBaton, in user space (32 clients)",
                &["46.6 to 56.4 ms", "1.2 to 3.3 s", "–"],
                None,
            ),
            row(
                "pageferry, pre-copy",
                &["–", "–", "–"],
                Some((SWIFTBATON, "unshaped", "pageferry")),
            ),
        ],
        differs: "Theirs: two servers, 25 Gbit/s RDMA, 500,000 records of 10,240 bytes (5.12 GB), \
                  16 clients as fast as they can (32 for SwiftBaton itself). Here: one machine \
                  with both nodes and the clients on it, a veth pair, 100,000 such records (1 GB), \
                  16 clients as fast as they can, so that the workload and the move share the \
                  processors. Their post-copy is their own, ours stock CRIU's.",
    },
    Published {
        name: "kubespt",
        title: "KubeSPT, Redis on 3 Gbit/s, and the same here",
        pattern: "redis-kubespt-*/3gbit/*",
        figures: &["pre-copy", "total"],
        rows: &[
            row(
                "Redis 1 GB: KubeSPT; pageferry",
                &["10.72 s", "16.41 s"],
                Some((KUBESPT_1, "3gbit", "pageferry")),
            ),
            row(
                "Redis 2 GB: KubeSPT; pageferry",
                &["19.48 s", "25.63 s"],
                Some((KUBESPT_2, "3gbit", "pageferry")),
            ),
            row("Redis 4 GB: KubeSPT", &["36.86 s", "45.18 s"], None),
            row(
                "Redis 8 GB: KubeSPT; downtime 10.76 s",
                &["66.93 s", "79.81 s"],
                None,
            ),
        ],
        differs: "Theirs: pods of Kubernetes 1.18 on two servers, CRIU 3.17, 3 Gbit/s, keys of 8 \
                  bytes and values of 1 KB, 20 clients, Zipf 1.22, half reads and half writes. \
                  Here: a bare tree, one machine, keys of 10 bytes and values of 1,000, 20 clients \
                  of 4,000 requests per second together, Zipf 0.99; no pod is made anew.",
    },
];

pub fn find(name: &str) -> Option<&'static Published> {
    ALL.iter().find(|table| table.name == name)
}

/// The table with our figures, if the series has any of them; the first row is the head.
pub fn rows(table: &Published, series: &Series) -> Option<Vec<Vec<String>>> {
    let theirs = table
        .figures
        .iter()
        .map(|figure| format!("theirs: {figure}"));
    let ours = OURS.map(|figure| format!("here: {figure}"));
    let head = ["method".to_owned()].into_iter().chain(theirs).chain(ours);
    let mut rows = vec![head.collect::<Vec<_>>()];
    let mut any = false;
    for row in table.rows {
        let theirs = row.theirs.iter().map(|text| (*text).to_owned());
        let mut cells: Vec<String> = [row.method.to_owned()].into_iter().chain(theirs).collect();
        let cell = row
            .cell
            .and_then(|(workload, link, system)| series.cell(workload, link, system));
        let Some(cell) = cell.filter(|cell| cell.absence().is_none()) else {
            let why = match (cell, row.cell) {
                (Some(cell), _) => cell.absence().unwrap_or("–").to_owned(),
                (None, Some(_)) => "not run".to_owned(),
                (None, None) => "–".to_owned(),
            };
            cells.push(why);
            cells.extend([const { String::new() }; OURS.len() - 1]);
            rows.push(cells);
            continue;
        };
        any = true;
        let text = |summary: Option<super::series::Summary>, text: fn(f64) -> String| {
            summary.map_or("–".to_owned(), |summary| spread(&summary, text))
        };
        cells.extend([
            text(cell.summary(|run| run.gap_ms), millis),
            text(cell.summary(|run| run.ttr90_ms), millis),
            text(cell.summary(|run| run.downtime_ms), millis),
            text(cell.summary(|run| run.total_ms), millis),
            text(cell.summary(|run| Some(run.calm?.per_second)), |rate| {
                format!("{rate:.0}")
            }),
        ]);
        rows.push(cells);
    }
    any.then_some(rows)
}

const OURS: [&str; 5] = ["gap", "TTR90", "downtime", "total", "operations per second"];
