//! Drawings of a series, as SVG that takes the colours of the page around it.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::series::{Cell, Run};

/// How far apart the gaps of each system's moves are: a dot for each move, a bar at the median, on
/// a logarithmic scale.
pub fn gaps(cells: &[&Cell]) -> Result<String> {
    let all: Vec<(&Cell, Vec<f64>)> = cells
        .iter()
        .map(|cell| (*cell, cell.values(|run| run.gap_ms)))
        .filter(|(_, values)| !values.is_empty())
        .collect();
    let most = all
        .iter()
        .flat_map(|(_, values)| values)
        .fold(10.0, |a: f64, b| a.max(*b));
    let least = all
        .iter()
        .flat_map(|(_, values)| values)
        .fold(most, |a: f64, b| a.min(*b));
    let rows = all.len();
    let height = u32::try_from(rows).unwrap_or(1) * ROW + 44;
    drawn(height, |area| {
        // Whole powers of ten: those have labels.
        let power = |ms: f64, up: f64| 10_f64.powf((ms.max(0.1).log10() + up).floor());
        let scale = (power(least, -0.05)..power(most, 1.05)).log_scale();
        let mut chart = ChartBuilder::on(&area)
            .x_label_area_size(34)
            .y_label_area_size(LABELS)
            .margin_right(34)
            .margin_top(4)
            .build_cartesian_2d(scale, 0.0..rows as f64)
            .map_err(failed)?;
        let name = |place: &f64| {
            let mut centres = (0..rows).zip(all.iter().rev());
            let cell = centres.find(|(index, _)| (place - *index as f64 - 0.5).abs() < 0.01);
            cell.map_or(String::new(), |(_, (cell, _))| cell.system.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(BLACK.mix(0.06))
            .bold_line_style(BLACK.mix(0.16))
            .x_label_formatter(&|ms| super::table::millis(*ms))
            .x_labels(6)
            .y_labels(rows * 2 + 1)
            .y_label_formatter(&name)
            .label_style((FONT, FONT_SIZE))
            .draw()
            .map_err(failed)?;
        for (index, (cell, values)) in all.iter().enumerate() {
            let place = (rows - 1 - index) as f64 + 0.5;
            let colour = colour_of(cell);
            let dots = values
                .iter()
                .map(|ms| Circle::new((*ms, place), 4, colour.mix(0.6).filled()));
            chart.draw_series(dots).map_err(failed)?;
            if let Some(summary) = cell.summary(|run| run.gap_ms) {
                let bar = [
                    (summary.median, place - 0.32),
                    (summary.median, place + 0.32),
                ];
                let bar = PathElement::new(bar.to_vec(), colour.stroke_width(3));
                chart.draw_series([bar]).map_err(failed)?;
            }
        }
        area.present().map_err(failed)
    })
}

/// What clients had in each tenth of a second of the median move of each system, one below the
/// other, from the order to move on (0 s).
pub fn timelines(cells: &[&Cell]) -> Result<String> {
    let all: Vec<(&Cell, &Run)> = cells
        .iter()
        .filter_map(|cell| Some((*cell, median_run(cell)?)))
        .collect();
    let per_second = |run: &Run| -> Vec<(f64, f64)> {
        let times = (0_u32..).map(|index| run.timeline_from_ms / 1e3 + f64::from(index) * 0.1);
        let rates = run.timeline.iter().map(|count| f64::from(*count) * 10.0);
        times.zip(rates).collect()
    };
    let lines: Vec<Vec<(f64, f64)>> = all.iter().map(|(_, run)| per_second(run)).collect();
    let points = || lines.iter().flatten();
    let end = points().fold(1.0, |a: f64, point| a.max(point.0));
    let most = points().fold(1.0, |a: f64, point| a.max(point.1));
    let rows = all.len();
    let height = u32::try_from(rows).unwrap_or(1) * TIMELINE;
    drawn(height, |area| {
        for (index, part) in area.split_evenly((rows.max(1), 1)).iter().enumerate() {
            let (Some((cell, _)), Some(line)) = (all.get(index), lines.get(index)) else {
                continue;
            };
            timeline(part, (cell, line), (end, most))?;
        }
        area.present().map_err(failed)
    })
}

fn timeline(
    part: &Area<'_>,
    (cell, line): (&Cell, &[(f64, f64)]),
    (end, most): (f64, f64),
) -> Result<()> {
    let title = (FONT, FONT_SIZE + 1);
    let mut chart = ChartBuilder::on(part)
        .caption(&cell.system, title)
        .x_label_area_size(22)
        .y_label_area_size(64)
        .margin_right(12)
        .build_cartesian_2d(BEFORE..end, 0.0..most * 1.05)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.14))
        .x_labels(8)
        .y_labels(3)
        .x_label_formatter(&|seconds| format!("{seconds:.0} s"))
        .y_label_formatter(&|rate| format!("{rate:.0}/s"))
        .label_style((FONT, FONT_SIZE))
        .draw()
        .map_err(failed)?;
    let shown = line.iter().copied().filter(|point| BEFORE <= point.0);
    let colour = colour_of(cell);
    let area = AreaSeries::new(shown, 0.0, colour.mix(0.35)).border_style(colour.stroke_width(2));
    chart.draw_series(area).map_err(failed)?;
    let order = PathElement::new(vec![(0.0, 0.0), (0.0, most)], BLACK.stroke_width(1));
    chart.draw_series([order]).map_err(failed)?;
    Ok(())
}

/// The one whose gap is nearest to the median.
pub fn median_run(cell: &Cell) -> Option<&Run> {
    let median = cell.summary(|run| run.gap_ms)?.median;
    let distance = |run: &&Run| (run.gap_ms.unwrap_or(f64::MAX) - median).abs();
    cell.good()
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) fn drawn(height: u32, draw: impl FnOnce(Area<'_>) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    draw(SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area())?;
    // What is drawn in black takes the colour of the text around it, in the light and in the dark.
    let text = text
        .replace("\"#000000\"", "\"currentColor\"")
        .replace("font-family=\"sans-serif\"", "font-family=\"inherit\"");
    let size = format!("width=\"{WIDTH}\" height=\"{height}\" ");
    Ok(text.replacen(&size, "", 1))
}

fn colour_of(cell: &Cell) -> RGBColor {
    if super::compare::is_peer(cell) {
        PEER
    } else {
        OURS
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}

/// That of a narrow column: on a telephone it shrinks by a third.
const WIDTH: u32 = 560;
const ROW: u32 = 26;
const TIMELINE: u32 = 104;
const LABELS: u32 = 158;
pub(super) const FONT: &str = "sans-serif";
pub(super) const FONT_SIZE: u32 = 14;
/// Seconds that are shown before the order.
const BEFORE: f64 = -2.0;
/// Both can be told from white and from black.
pub(super) const OURS: RGBColor = RGBColor(0x2f, 0x81, 0xf7);
const PEER: RGBColor = RGBColor(0xd9, 0x8a, 0x1f);
