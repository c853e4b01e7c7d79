//! A series as text: lines while it runs, and tables at the end.

use std::fmt::Write as _;

use super::series::{Cell, Run, Series, Summary};

/// One move, as it is over.
pub fn line(name: &str, run: &Run) -> String {
    let figures = [
        ("gap", run.gap_ms.map(millis)),
        ("downtime", run.downtime_ms.map(millis)),
        ("TTR90", run.ttr90_ms.map(millis)),
        ("total", run.total_ms.map(millis)),
        (
            "on the wire",
            run.wire_bytes.map(|bytes| mebibytes(bytes as f64)),
        ),
        (
            "CPU",
            run.cpu_per_gib().map(|cpu| format!("{cpu:.2} s/GiB")),
        ),
    ];
    let figures: Vec<String> = figures
        .into_iter()
        .filter_map(|(what, value)| Some(format!("{what} {}", value?)))
        .collect();
    let mut line = format!("{:>3}  {name:<44} {}", run.number, figures.join(", "));
    if run.reconnects > 0 {
        let _ = write!(line, ", {} reconnects", run.reconnects);
    }
    if let Some(failure) = &run.failure {
        let _ = write!(line, "\n     FAILED: {failure}");
    }
    line
}

/// A column of the tables.
#[derive(Debug)]
pub struct Column {
    pub title: &'static str,
    pub figure: fn(&Run) -> Option<f64>,
    pub text: fn(f64) -> String,
}

/// All of them.
pub const COLUMNS: [Column; 11] = [
    Column {
        title: "gap",
        figure: |run| run.gap_ms,
        text: millis,
    },
    Column {
        title: "TTR90",
        figure: |run| run.ttr90_ms,
        text: millis,
    },
    Column {
        title: "stalls",
        figure: |run| Some(run.stalls() as f64),
        text: |count| format!("{count:.0}"),
    },
    Column {
        title: "downtime",
        figure: |run| run.downtime_ms,
        text: millis,
    },
    Column {
        title: "total",
        figure: |run| run.total_ms,
        text: millis,
    },
    Column {
        title: "wire",
        figure: |run| run.wire_bytes.map(|bytes| bytes as f64),
        text: mebibytes,
    },
    Column {
        title: "rate while copied",
        figure: Run::brownout,
        text: |share| format!("{:.0} %", share * 100.0),
    },
    Column {
        title: "p99 while copied",
        figure: Run::brownout_p99_ms,
        text: millis,
    },
    Column {
        title: "reconnects",
        figure: |run| Some(run.reconnects.into()),
        text: |count| format!("{count:.0}"),
    },
    Column {
        title: "CPU s/GiB",
        figure: Run::cpu_per_gib,
        text: |seconds| format!("{seconds:.2}"),
    },
    Column {
        title: "peak memory, both",
        figure: |run| {
            let all: u64 = run.memory_peak_bytes.values().sum();
            (all > 0).then_some(all as f64)
        },
        text: mebibytes,
    },
];

/// All cells, a table for each workload and link.
pub fn tables(series: &Series) -> String {
    let mut text = String::new();
    for (workload, link) in groups(series) {
        let _ = writeln!(text, "\n{workload} over {link}: medians (least to most)");
        let titles = ["system", "runs"].into_iter();
        let titles = titles.chain(COLUMNS.iter().map(|column| column.title));
        let mut rows = vec![titles.map(str::to_owned).collect::<Vec<_>>()];
        let mut absent = Vec::new();
        for cell in cells_of(series, &workload, &link) {
            match cell.absence() {
                Some(reason) => absent.push(format!("{}: {reason}", cell.system)),
                None => rows.push(row(cell)),
            }
        }
        if rows.len() > 1 {
            text += &aligned(&rows);
        }
        for reason in absent {
            let _ = writeln!(text, "  {reason}");
        }
    }
    text
}

pub fn row(cell: &Cell) -> Vec<String> {
    let failed = cell.runs.len() - cell.good().count();
    let runs = match failed {
        0 => cell.runs.len().to_string(),
        _ => format!("{} ({failed} failed)", cell.runs.len()),
    };
    let figures = COLUMNS.iter().map(|column| {
        let summary = cell.summary(column.figure);
        summary.map_or("–".to_owned(), |summary| spread(&summary, column.text))
    });
    [cell.system.clone(), runs]
        .into_iter()
        .chain(figures)
        .collect()
}

/// Workloads and links of a series, in the order in which they came.
pub fn groups(series: &Series) -> Vec<(String, String)> {
    let mut groups: Vec<(String, String)> = Vec::new();
    for cell in &series.cells {
        let group = (cell.workload.clone(), cell.link.clone());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    groups
}

pub fn cells_of<'a>(series: &'a Series, workload: &str, link: &str) -> Vec<&'a Cell> {
    let cells = series.cells.iter();
    cells
        .filter(|cell| cell.workload == workload && cell.link == link)
        .collect()
}

/// "median (least to most)", without the latter where it is the same.
pub fn spread(summary: &Summary, text: fn(f64) -> String) -> String {
    let [median, least, most] = [summary.median, summary.least, summary.most].map(text);
    if least == most {
        return median;
    }
    format!("{median} ({least} to {most})")
}

/// "9.8 ms", "1.24 s".
pub fn millis(ms: f64) -> String {
    match ms {
        ..10.0 => format!("{ms:.1} ms"),
        ..1000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.2} s", ms / 1e3),
    }
}

pub fn mebibytes(bytes: f64) -> String {
    format!("{:.0} MiB", bytes / f64::from(1 << 20))
}

/// Rows of one width a column.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |index: usize| {
        let cells = rows.iter().filter_map(|row| row.get(index));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let cells = cells.map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "  {}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_their_unit() {
        assert_eq!(millis(4.25), "4.2 ms");
        assert_eq!(millis(123.4), "123 ms");
        assert_eq!(millis(1234.0), "1.23 s");
    }

    #[test]
    fn a_cell_without_figures_says_why() {
        let text = r#"{"schema":"pageferry-bench/1.0","machine":{"processor":"","processors":2,
            "memory_bytes":1,"kernel":"k","nodes_on_it":2},"versions":{},"revision":"r",
            "commands":[],"seeds":[],"begun":[],"legend":{},"compression":{},"cells":[
            {"workload":"w","link":"l","system":"one","runs":[{"number":1,"gap_ms":3,
             "verified":true}]},
            {"workload":"w","link":"l","system":"two","unfit":"no such kernel","runs":[]}]}"#;
        let printed = tables(&serde_json::from_str(text).expect("a series"));
        assert!(printed.contains("3.0 ms"), "{printed}");
        assert!(printed.contains("two: no such kernel"), "{printed}");
    }
}
