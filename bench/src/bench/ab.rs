//! `lab ab BASE HEAD`: two builds in one run, their moves mixed, and a rank test that says whether
//! they differ by more than by chance.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::plan::{Plan, Wanted};
use super::series::{Run, Summary};
use super::table::{aligned, line, mebibytes, millis, spread};
use super::trial;
use crate::content::Generator;
use crate::lab::network::{BRIDGE, Link};
use crate::lab::{Lab, LabOptions};

/// Moves by two builds: folders with their programs. The lab's own are those of the program that
/// runs.
pub fn run(plan: &Plan, builds: [&Path; 2]) -> Result<String> {
    for build in builds {
        let program = build.join("pageferryd");
        ensure!(
            program.is_file(),
            "{} is not there: name two folders with programs, such as target/release of two work \
             trees",
            program.display()
        );
    }
    let cells: Vec<Wanted> = plan
        .cells()
        .into_iter()
        .filter(|cell| cell.system.mover.needs_daemons())
        .collect();
    ensure!(
        !cells.is_empty(),
        "the pattern names no cell of pageferry's"
    );
    let mut generator = Generator(plan.seed);
    let mut text = String::new();
    let begun = Instant::now();
    for cell in cells {
        let mut runs = [Vec::new(), Vec::new()];
        for number in 1..=plan.repeats {
            // In pairs, so that a slow hour is nobody's; which is first is chance.
            let first = generator.below(2) as usize;
            for which in [first, 1 - first] {
                let mut run = run_one(plan, &cell, builds[which])?;
                run.number = number;
                println!("{}: {}", NAMES[which], line(&cell.name(), &run));
                runs[which].push(run);
            }
            if plan.budget.is_some_and(|budget| budget < begun.elapsed()) {
                println!("out of time after {number} pairs");
                break;
            }
        }
        text += &compared(&cell.name(), &runs);
    }
    Ok(text)
}

fn run_one(plan: &Plan, cell: &Wanted, build: &Path) -> Result<Run> {
    let options = LabOptions {
        nodes: 2,
        link: cell.link.name.parse::<Link>()?,
        daemons: true,
        bridge: BRIDGE,
        layer: cell.needs_layer().then_some(&super::layer::LAYER),
        programs: None,
        keep: false,
    };
    let lab = Lab::up_with(&options, build);
    let mut lab = lab.with_context(|| format!("with the programs of {}", build.display()))?;
    trial::run(&mut lab, &cell.entry.kind, cell.system, plan.stretches)
}

/// What is compared, and how it is told.
type Figure = (&'static str, fn(&Run) -> Option<f64>, fn(f64) -> String);

const FIGURES: [Figure; 5] = [
    ("gap", |run| run.gap_ms, millis),
    ("downtime", |run| run.downtime_ms, millis),
    ("total", |run| run.total_ms, millis),
    (
        "wire",
        |run| run.wire_bytes.map(|bytes| bytes as f64),
        mebibytes,
    ),
    ("CPU s/GiB", Run::cpu_per_gib, |seconds| {
        format!("{seconds:.2}")
    }),
];

fn compared(name: &str, runs: &[Vec<Run>; 2]) -> String {
    let mut rows = vec![
        ["", "base", "head", "head / base", "p"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (what, figure, text) in FIGURES {
        let values = runs.each_ref().map(|runs| {
            let good = runs.iter().filter(|run| run.failure.is_none());
            good.filter_map(figure).collect::<Vec<_>>()
        });
        let [Some(base), Some(head)] = values.each_ref().map(|values| Summary::of(values)) else {
            continue;
        };
        let p = rank_test(&values[0], &values[1]);
        rows.push(vec![
            what.to_owned(),
            spread(&base, text),
            spread(&head, text),
            format!("{:.2}", head.median / base.median.max(f64::MIN_POSITIVE)),
            format!("{p:.3}{}", if p < 0.05 { " *" } else { "" }),
        ]);
    }
    let failed = runs
        .each_ref()
        .map(|runs| runs.iter().filter(|run| run.failure.is_some()).count());
    let mut text =
        format!("\n{name}: medians (least to most), p of Mann and Whitney's rank test\n");
    text += &aligned(&rows);
    if failed != [0, 0] {
        text += &format!("  failed: {} of base, {} of head\n", failed[0], failed[1]);
    }
    text
}

/// The two-sided p of Mann and Whitney's test: how often, by chance alone, the ranks of two samples
/// lie at least so far apart. Exact for small samples (over all ways to divide the values), else by
/// the normal distribution, corrected for ties.
pub fn rank_test(one: &[f64], other: &[f64]) -> f64 {
    if one.is_empty() || other.is_empty() {
        return 1.0;
    }
    let mut all: Vec<f64> = one.iter().chain(other).copied().collect();
    all.sort_by(f64::total_cmp);
    let rank = |value: f64| {
        let below = all.partition_point(|other| *other < value);
        let up_to = all.partition_point(|other| *other <= value);
        // The mean rank of all that are equal.
        (below + up_to + 1) as f64 / 2.0
    };
    let ranks: Vec<f64> = all.iter().map(|value| rank(*value)).collect();
    let sum: f64 = one.iter().map(|value| rank(*value)).sum();
    let middle = one.len() as f64 * (all.len() + 1) as f64 / 2.0;
    let distance = (sum - middle).abs();
    if all.len() <= EXACT_MAX {
        let (mut as_far, mut ways) = (0_u64, 0_u64);
        divisions(&ranks, one.len(), 0.0, &mut |sum| {
            ways += 1;
            as_far += u64::from(distance <= (sum - middle).abs() + 1e-9);
        });
        return as_far as f64 / ways as f64;
    }
    let (a, b, n) = (one.len() as f64, other.len() as f64, all.len() as f64);
    let ties: f64 = all
        .chunk_by(|a, b| a.total_cmp(b).is_eq())
        .map(|equal| (equal.len() as f64).powi(3) - equal.len() as f64)
        .sum();
    let variance = a * b / 12.0 * (n + 1.0 - ties / (n * (n - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    let z = ((distance - 0.5).max(0.0)) / variance.sqrt();
    2.0 * upper_tail(z)
}

/// The sums of every choice of so many of the ranks.
fn divisions(ranks: &[f64], choose: usize, sum: f64, found: &mut impl FnMut(f64)) {
    if choose == 0 {
        found(sum);
        return;
    }
    if let Some((first, rest)) = ranks.split_first()
        && choose <= ranks.len()
    {
        divisions(rest, choose - 1, sum + first, found);
        divisions(rest, choose, sum, found);
    }
}

/// Of the normal distribution (Abramowitz and Stegun 26.2.17; off by less than 1e-7).
fn upper_tail(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let factors = [
        0.319_381_530,
        -0.356_563_782,
        1.781_477_937,
        -1.821_255_978,
        1.330_274_429,
    ];
    let sum = factors
        .iter()
        .rev()
        .fold(0.0, |sum, factor| (sum + factor) * t);
    density * sum
}

const NAMES: [&str; 2] = ["base", "head"];
/// Values of both samples: 184,756 ways to divide them.
const EXACT_MAX: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_that_lie_apart_differ_and_mixed_ones_do_not() {
        let low = [1.0, 2.0, 3.0, 4.0, 5.0];
        let high = [6.0, 7.0, 8.0, 9.0, 10.0];
        // Two of the 252 ways.
        assert!((rank_test(&low, &high) - 2.0 / 252.0).abs() < 1e-12);
        assert!((rank_test(&low, &low) - 1.0).abs() < 1e-12);
        assert!(rank_test(&[1.0, 3.0, 5.0, 7.0], &[2.0, 4.0, 6.0, 8.0]) > 0.5);
    }

    #[test]
    fn large_samples_are_judged_as_small_ones_are() {
        let one: Vec<f64> = (0..15).map(f64::from).collect();
        let shifted: Vec<f64> = one.iter().map(|value| value + 6.0).collect();
        let p = rank_test(&one, &shifted);
        // 0.0043 as R's wilcox.test has it with the correction.
        assert!((0.002..0.01).contains(&p), "{p}");
        assert!((upper_tail(1.96) - 0.025).abs() < 1e-4);
    }
}
