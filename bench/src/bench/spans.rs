//! What took how long within the downtime of a move: taken from the source's timeline, and drawn.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::Value;

use super::drawing::{self, FONT, FONT_SIZE, failed};
use super::series::{Run, Span};
use crate::mover::outcome::round;

/// Those of `pageferry show --timeline --json` that are within the downtime, and the fill.
pub fn of(timeline: &Value) -> Vec<Span> {
    let all = timeline["spans"].as_array().into_iter().flatten();
    let mut spans: Vec<Span> = all.filter_map(span).collect();
    let Some((begin, end)) = downtime(&spans) else {
        return Vec::new();
    };
    spans.retain(|span| {
        let is_within = begin <= span.begin_ms && span.begin_ms < end;
        is_within || span.name == FILL
    });
    spans.sort_by(|one, other| one.begin_ms.total_cmp(&other.begin_ms));
    spans.truncate(SPANS_MAX);
    spans
}

fn span(span: &Value) -> Option<Span> {
    let text = |key: &str| span[key].as_str().map(str::to_owned);
    Some(Span {
        role: text("role")?,
        name: text("name")?,
        detail: text("detail")?,
        begin_ms: round(span["begin_ms"].as_f64()?),
        took_ms: round(span["took_ms"].as_f64()?),
    })
}

/// From when to when it stood still.
fn downtime(spans: &[Span]) -> Option<(f64, f64)> {
    let is_part = |span: &&Span| span.role == SOURCE && PARTS.contains(&span.name.as_str());
    let parts = spans
        .iter()
        .filter(is_part)
        .filter(|span| 0.0 <= span.begin_ms);
    let end = parts
        .map(|span| span.begin_ms + span.took_ms)
        .max_by(f64::total_cmp)?;
    Some((0.0, end))
}

/// The spans of a move, one below the other, on the scale of its downtime: the source's in one
/// colour, the target's in another. The parts of the downtime reach from top to bottom.
pub fn drawn(run: &Run) -> Result<Option<String>> {
    let Some((_, end)) = downtime(&run.spans).filter(|(_, end)| 0.0 < *end) else {
        return Ok(None);
    };
    let is_part = |span: &&Span| span.role == SOURCE && PARTS.contains(&span.name.as_str());
    let parts: Vec<&Span> = run.spans.iter().filter(is_part).collect();
    let is_row = |span: &&Span| !is_part(span) && end / 200.0 <= span.took_ms && span.name != FILL;
    let rows: Vec<&Span> = run.spans.iter().filter(is_row).collect();
    let count = rows.len() + 1;
    let height = u32::try_from(count).unwrap_or(1) * ROW + 34;
    let svg = drawing::drawn(height, |area| {
        let mut chart = ChartBuilder::on(&area)
            .x_label_area_size(30)
            .y_label_area_size(LABELS)
            .margin_right(30)
            .margin_top(4)
            .build_cartesian_2d(0.0..end, 0.0..count as f64)
            .map_err(failed)?;
        let place = |index: usize| (count - 1 - index) as f64;
        let name = |at: &f64| {
            let mut centres = rows.iter().enumerate();
            let row = centres.find(|(index, _)| (at - place(index + 1) - 0.5).abs() < 0.01);
            row.map_or(String::new(), |(_, span)| label(span))
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.14))
            .x_labels(7)
            .x_label_formatter(&|ms| format!("{ms:.0} ms"))
            .y_labels(count * 2 + 1)
            .y_label_formatter(&name)
            .label_style((FONT, FONT_SIZE))
            .draw()
            .map_err(failed)?;
        for (index, part) in parts.iter().enumerate() {
            let from = part.begin_ms;
            let to = from + part.took_ms;
            let shade = if index % 2 == 0 { 0.10 } else { 0.04 };
            let band = Rectangle::new([(from, 0.0), (to, count as f64)], BLACK.mix(shade).filled());
            chart.draw_series([band]).map_err(failed)?;
            // Where its name has room.
            if end / 12.0 <= part.took_ms {
                let style = (FONT, FONT_SIZE).into_font().color(&BLACK);
                let style = style.pos(Pos::new(HPos::Center, VPos::Center));
                let middle = (f64::midpoint(from, to), place(0) + 0.5);
                let text = Text::new(part.name.clone(), middle, style);
                chart.draw_series([text]).map_err(failed)?;
            }
        }
        for (index, span) in rows.iter().enumerate() {
            let colour = if span.role == SOURCE { OURS } else { THEIRS };
            let (below, from) = (place(index + 1), span.begin_ms);
            let to = (from + span.took_ms).min(end);
            let corners = [(from, below + 0.18), (to, below + 0.82)];
            let bar = Rectangle::new(corners, colour.mix(0.75).filled());
            chart.draw_series([bar]).map_err(failed)?;
        }
        area.present().map_err(failed)
    })?;
    Ok(Some(svg))
}

fn label(span: &Span) -> String {
    let Span { name, detail, .. } = span;
    let space = if detail.is_empty() { "" } else { " " };
    format!("{name}{space}{detail}")
}

const SOURCE: &str = "source";
const FILL: &str = "fill";
const PARTS: [&str; 5] = ["freeze", "final_round", "restore", "commit", "handoff"];
const SPANS_MAX: usize = 96;
const ROW: u32 = 20;
const LABELS: u32 = 130;
const OURS: RGBColor = drawing::OURS;
const THEIRS: RGBColor = RGBColor(0x2e, 0xa0, 0x6a);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn timeline() -> Value {
        let span = |role: &str, name: &str, begin: f64, took: f64| {
            let (begin_ms, took_ms) = (begin, took);
            json!({"role": role, "name": name, "detail": "",
                "begin_ms": begin_ms, "took_ms": took_ms})
        };
        json!({"spans": [
            span("source", "round", -900.0, 800.0),
            span("source", "freeze", 0.0, 2.0),
            span("source", "final_round", 2.0, 8.0),
            span("source", "dump", 2.5, 4.0),
            span("target", "restore", 10.0, 6.0),
            span("source", "restore", 10.0, 7.0),
            span("source", "release", 20.0, 5.0),
            span("target", "fill", 17.0, 400.0),
        ]})
    }

    #[test]
    fn what_is_kept_is_the_downtime_and_the_fill() {
        let names: Vec<String> = of(&timeline()).into_iter().map(|span| span.name).collect();
        let expected = [
            "freeze",
            "final_round",
            "dump",
            "restore",
            "restore",
            "fill",
        ];
        assert_eq!(names, expected);
        assert!(of(&json!({"spans": []})).is_empty() && of(&json!({})).is_empty());
    }

    #[test]
    fn a_move_with_spans_has_a_drawing() {
        let run = Run {
            spans: of(&timeline()),
            ..Run::default()
        };
        let svg = drawn(&run).expect("it can be drawn").expect("it has spans");
        for name in ["dump", "restore", "final_round"] {
            assert!(svg.contains(name), "{name}: {svg}");
        }
        assert!(!svg.contains("round<") || svg.contains("final_round"));
        assert_eq!(drawn(&Run::default()).expect("nothing"), None);
    }
}
