//! `apps`: real applications under load, moved to and fro, each with a proof that nothing is lost.
//!
//! A move that is refused is no failure of the application, whose proof is asked for all the same;
//! but it is none that can be let pass.

use anyhow::{Result, bail};

use super::report::{AppMove, Report};
use super::settings::{Settings, other};
use crate::app::layer::LAYER;
use crate::app::{ALL, App, Kind};
use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::mover::outcome::millis;
use crate::mover::pageferry::SETTLE_TIME_MAX;
use crate::mover::{MoveOptions, Order};

/// The scenario; its cases are the applications, and [`FEW`].
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let (wanted, moves) = match settings.only.as_deref() {
        None => (ALL.to_vec(), MOVES),
        Some(FEW) => (ALL.to_vec(), MOVES_FEW),
        Some(names) => (named(names)?, MOVES),
    };
    let mut lab = settings.lab_with(&LAYER, 2)?;
    for kind in wanted {
        if let Err(error) = run_app(&mut lab, settings, kind, moves, report) {
            report.fail(format!("{}: {error:#}", kind.name));
        }
        settings.mover.wait_settled(&lab, SETTLE_TIME_MAX)?;
    }
    print_table(settings.mover.name(), &report.apps);
    Ok(())
}

fn named(names: &str) -> Result<Vec<Kind>> {
    let find = |name: &str| match ALL.iter().find(|kind| kind.name == name) {
        Some(kind) => Ok(*kind),
        None => bail!(
            "no application is called {name:?}; there are {}, and {FEW} moves of each",
            ALL.map(|kind| kind.name).join(", ")
        ),
    };
    names.split(',').map(find).collect()
}

fn run_app(
    lab: &mut Lab,
    settings: &Settings,
    kind: Kind,
    moves: usize,
    report: &mut Report,
) -> Result<()> {
    let mut app = (kind.start)(lab, "a")?;
    let result = move_to_and_fro(lab, settings, kind, moves, app.as_mut(), report);
    let workload = app.workload().clone();
    let proof = result.and_then(|()| app.prove(lab));
    // Whatever has become of it, wherever it is.
    workload.kill(lab)?;
    let proof = proof?;
    if proof.wrong.is_empty() {
        println!("{}: {}", kind.name, proof.text);
    }
    report.note_contents(proof.wrong.is_empty());
    for wrong in proof.wrong {
        report.fail(format!("{}: {wrong}", kind.name));
    }
    Ok(())
}

fn move_to_and_fro(
    lab: &Lab,
    settings: &Settings,
    kind: Kind,
    moves: usize,
    app: &mut dyn App,
    report: &mut Report,
) -> Result<()> {
    let options = MoveOptions {
        shared: vec![SHARED.to_owned()],
        ..MoveOptions::default()
    };
    let mut at = "a";
    for _ in 0..moves {
        let to = other(at);
        app.before_move(lab)?;
        let workload = app.workload().clone();
        let order = Order {
            workload: &workload,
            from: at,
            to,
            options: &options,
        };
        let outcome = settings.mover.move_workload(lab, &order)?;
        app.workload().pid = outcome.pid_at_target().unwrap_or(workload.pid);
        let seen = app.after_move()?;
        let mut row = AppMove {
            app: kind.name.to_owned(),
            from: at.to_owned(),
            to: to.to_owned(),
            outcome: "moved".to_owned(),
            downtime_ms: None,
            blackout_ms: millis(seen.blackout),
            pause_ms: millis(seen.pause),
        };
        let Some(mut one) = outcome.moved else {
            let (code, text) = outcome.error.unwrap_or_default();
            row.outcome = format!("refused: {code}");
            println!("{}\n  {text}", row.line());
            report.apps.push(row);
            // It runs on, and has its proof.
            report.fail(format!("{}: {code}: {text}", kind.name));
            return Ok(());
        };
        row.downtime_ms = Some(one.downtime_ms);
        one.blackout_ms = Some(row.blackout_ms);
        report.push(one);
        println!("{}", row.line());
        report.apps.push(row);
        at = to;
    }
    Ok(())
}

fn print_table(mover: &str, rows: &[AppMove]) {
    let head = [
        "application",
        "move",
        "downtime",
        "blackout",
        "longest pause",
    ];
    let [app, way, downtime, blackout, pause] = head;
    println!("{app:<12} {way:<7} {downtime:>10} {blackout:>10} {pause:>14}  outcome");
    for row in rows {
        println!("{}", row.line());
    }
    let moved = rows.iter().filter(|row| row.downtime_ms.is_some()).count();
    println!("{mover}: moved {moved}, refused {}", rows.len() - moved);
}

/// The case that a test runs.
const FEW: &str = "few";
const MOVES: usize = 5;
const MOVES_FEW: usize = 2;
