//! `report.html`: a series for people, in one file without a script, for any screen.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::compare::{Comparison, Pair, comparisons};
use super::series::Series;
use super::table::{COLUMNS, cells_of, groups, mebibytes, millis, spread};
use super::{drawing, published, spans};

pub const FILE: &str = "report.html";

/// Writes it beside a series.
pub fn write(series: &Series, path: &Path) -> Result<()> {
    let text = page(series)?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

fn page(series: &Series) -> Result<String> {
    let mut body = String::new();
    let machine = &series.machine;
    let _ = write!(
        body,
        "<h1>How workloads move</h1><p>{} moves on one machine, which ran {} nodes, the clients \
         and everything else: {} × {}, {:.0} GiB, Linux {}. Sources {}.</p>",
        series.runs(),
        machine.nodes_on_it,
        machine.processors,
        escaped(&machine.processor),
        machine.memory_bytes as f64 / f64::from(1 << 30),
        escaped(&machine.kernel),
        escaped(&series.revision)
    );
    body += "<p>Each figure is a median, with the least and the most of its runs behind it. \
             <b>Gap</b>: the longest time in which no client finished a request. <b>TTR90</b>: \
             from there until nine tenths of the final rate are back and hold. <b>Wire</b>: IP \
             bytes that the nodes sent each other.</p>";
    body += &main_table(series);
    for (workload, link) in groups(series) {
        group(&mut body, series, &workload, &link)?;
    }
    for table in &published::ALL {
        if let Some(rows) = published::rows(table, series) {
            let _ = write!(body, "<h2>{}</h2>", escaped(table.title));
            body += &html_table(&rows);
            let _ = write!(body, "<p>{}</p>", escaped(table.differs));
        }
    }
    legend(&mut body, series);
    Ok(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" \
         content=\"light dark\"><title>pageferry: benchmark</title><style>{STYLE}</style>\
         <main>{body}</main></html>\n"
    ))
}

fn main_table(series: &Series) -> String {
    let titles = [
        "workload",
        "link",
        "gap",
        "best peer",
        "ratio",
        "total",
        "wire",
        "behind in",
    ];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    let all = comparisons(series);
    rows.extend(all.iter().map(row));
    if all.is_empty() {
        return String::new();
    }
    let mut text = "<h2>pageferry and the best peer</h2>".to_owned();
    text += &html_table(&rows);
    text += "<p>The best peer is the one with the shortest gap of those that ran here. Ratios are \
             peer to pageferry, for total and wire to the peer with the least.";
    let mut absent: Vec<_> = all.iter().flat_map(|row| row.absent.iter()).collect();
    absent.sort_unstable();
    absent.dedup();
    for (system, why) in absent {
        let _ = write!(
            text,
            " Not among them: {} ({}).",
            escaped(system),
            escaped(why)
        );
    }
    text + "</p>"
}

fn row(row: &Comparison<'_>) -> Vec<String> {
    let ratio = |pair: Option<Pair<'_>>| {
        pair.map_or("–".to_owned(), |pair| format!("{:.1}×", pair.ratio()))
    };
    let shortfalls = row.shortfalls();
    let (ours, peer) = row.gap.map_or(("–".to_owned(), "–".to_owned()), |gap| {
        (
            spread(&gap.ours, millis),
            format!("{}: {}", gap.peer_name, spread(&gap.peer, millis)),
        )
    });
    vec![
        row.workload.clone(),
        row.link.clone(),
        ours,
        peer,
        ratio(row.gap),
        ratio(row.total),
        ratio(row.wire),
        if shortfalls.is_empty() {
            "–".to_owned()
        } else {
            shortfalls.join("; ")
        },
    ]
}

fn group(body: &mut String, series: &Series, workload: &str, link: &str) -> Result<()> {
    let cells = cells_of(series, workload, link);
    let _ = write!(
        body,
        "<h2>{} over {}</h2>",
        escaped(workload),
        escaped(link)
    );
    if let Some(what) = series.legend.get(workload) {
        let ratio = series.compression.get(workload);
        let ratio = ratio.map_or(String::new(), |ratio| format!(" LZ4 {ratio:.2}:1."));
        let _ = write!(body, "<p>{}.{ratio}</p>", escaped(what));
    }
    let titles = ["system", "runs"]
        .into_iter()
        .chain(COLUMNS.iter().map(|one| one.title));
    let mut rows = vec![titles.map(str::to_owned).collect::<Vec<_>>()];
    let mut absent = String::new();
    for cell in &cells {
        match cell.absence() {
            None => rows.push(super::table::row(cell)),
            Some(why) => {
                let _ = write!(absent, "<li>{}: {}", escaped(&cell.system), escaped(why));
            }
        }
    }
    if rows.len() > 1 {
        *body += &html_table(&rows);
    }
    if !absent.is_empty() {
        let _ = write!(body, "<ul>{absent}</ul>");
    }
    if rows.len() > 1 {
        let _ = write!(
            body,
            "<figure><figcaption>Gap of each move, and the median</figcaption>{}</figure>\
             <figure><figcaption>Requests answered around the move whose gap is the median; it was \
             ordered at 0 s</figcaption>{}</figure>",
            drawing::gaps(&cells)?,
            drawing::timelines(&cells)?
        );
    }
    for cell in cells {
        let run = drawing::median_run(cell);
        if let Some(svg) = run.map(spans::drawn).transpose()?.flatten() {
            let _ = write!(
                body,
                "<figure><figcaption>Where the downtime of {} goes, in the move whose gap is the \
                 median: blue at the source, green at the target</figcaption>{svg}</figure>",
                escaped(&cell.system)
            );
        }
    }
    Ok(())
}

fn legend(body: &mut String, series: &Series) {
    *body += "<h2>What the names mean</h2><dl>";
    for (name, what) in &series.legend {
        let _ = write!(body, "<dt>{}<dd>{}", escaped(name), escaped(what));
    }
    *body += "</dl><h2>Programs and commands</h2><dl>";
    for (name, version) in &series.versions {
        let _ = write!(body, "<dt>{}<dd>{}", escaped(name), escaped(version));
    }
    for (command, seed) in series.commands.iter().zip(&series.seeds) {
        let _ = write!(body, "<dt>seed {seed}<dd><code>{}</code>", escaped(command));
    }
    *body += "</dl>";
    let memory: u64 = series.machine.memory_bytes;
    let _ = write!(
        body,
        "<p>The nodes share {} and {} processors: nodes of their own would not wait for each \
         other.</p>",
        mebibytes(memory as f64),
        series.machine.processors
    );
}

/// The first row is the head.
fn html_table(rows: &[Vec<String>]) -> String {
    let mut text = "<div class=\"wide\"><table>".to_owned();
    for (index, row) in rows.iter().enumerate() {
        text += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            let tag = if index == 0 || column == 0 {
                "th"
            } else {
                "td"
            };
            let ours = column == 0 && cell.starts_with(super::compare::OURS);
            let class = if ours { " class=\"ours\"" } else { "" };
            // The least and the most below the median.
            let cell = escaped(cell);
            let cell = match cell.split_once(" (") {
                Some((median, rest)) if index > 0 => format!("{median}<small>{rest}</small>"),
                _ => cell,
            };
            let cell = cell.replace(")</small>", "</small>");
            let _ = write!(text, "<{tag}{class}>{cell}</{tag}>");
        }
        text += "</tr>";
    }
    text + "</table></div>"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--ours:#2f81f7}\
body{margin:0;font:15px/1.5 system-ui,sans-serif;background:Canvas;color:CanvasText}\
main{max-width:70rem;margin:0 auto;padding:1rem}h1{font-size:1.5rem}\
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;\
font-variant-numeric:tabular-nums}th,td{padding:.3rem .6rem;text-align:left;\
border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}\
tr:first-child th{background:var(--soft)}td small{display:block;opacity:.65}\
th.ours{color:var(--ours)}figure{margin:1rem 0;max-width:44rem}\
figcaption{font-size:.86rem;opacity:.8}svg{width:100%;height:auto;display:block}\
dt{font-weight:600}dd{margin:0 0 .4rem 1rem}code{overflow-wrap:anywhere}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::series::Run;

    fn series() -> Series {
        let mut series = Series::default();
        for (system, gap) in [("pageferry", 40.0), ("peer<1>", 900.0)] {
            let run = |more: f64| Run {
                gap_ms: Some(gap + more),
                timeline: vec![400; 80],
                timeline_from_ms: -3000.0,
                ..Run::default()
            };
            series.cell_mut("w", "l", system).runs = vec![run(0.0), run(7.0)];
        }
        series.cell_mut("w", "l", "other").unfit = Some("no <such> thing".to_owned());
        series
    }

    #[test]
    fn a_page_needs_nothing_but_itself() {
        let page = page(&series()).expect("a page");
        for needed in ["<script", "http-equiv", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(needed), "{needed}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(!page.contains("peer<1>") && !page.contains("<such>"));
        assert!(page.contains("no &lt;such&gt; thing"));
    }

    #[test]
    fn drawings_take_the_colour_of_the_page() {
        let page = page(&series()).expect("a page");
        assert!(page.contains("currentColor") && !page.contains("#000000"));
        assert!(page.contains("viewBox=\"0 0 560 "), "drawings scale");
    }
}
