//! What a fill costs. Printed, never judged: `cargo test --test pager figures -- --nocapture`.

use std::time::Instant;

use pageferry::pager::client::Notice;

use crate::MIB;
use crate::lab::{FIRST_PAGE, Lab, Tree};
use crate::workload::{Answer, Command};

/// Bytes per nanosecond are GB per second.
fn rate(pages: u64, nanoseconds: u128) -> f64 {
    (pages * 4096) as f64 / nanoseconds as f64
}

fn memcpy(pages: u64) -> f64 {
    let source = vec![1_u8; (pages * 4096) as usize];
    let mut target = vec![2_u8; source.len()];
    let start = Instant::now();
    target.copy_from_slice(&source);
    let elapsed = start.elapsed().as_nanos();
    assert_eq!(target[target.len() - 1], 1);
    rate(pages, elapsed)
}

#[tokio::test]
async fn figures_of_fill_and_faults() {
    let pages = 256 * MIB;
    for touches in [0, 20_000] {
        let copied = memcpy(pages);
        let (mut lab, mut peers) = Lab::running(&Tree::of(pages)).await;
        if 0 < touches {
            let touch = Command::Touch {
                page: FIRST_PAGE,
                count: pages,
                touches,
            };
            let Answer::Times(times) = peers[0].ask(&touch).await else {
                panic!("wrong")
            };
            let faults: Vec<u64> = times.into_iter().filter(|time| 1500 < *time).collect();
            let at = |part: usize| faults[(faults.len() - 1) * part / 1000] as f64 / 1e3;
            println!(
                "{} faults in the fill: p50 {:.1} µs, p90 {:.1}, p99 {:.1}, p99.9 {:.1}",
                faults.len(),
                at(500),
                at(900),
                at(990),
                at(999)
            );
        }
        let Notice::Filled(report) = lab.notice().await else {
            panic!("not filled")
        };
        let filled = rate(report.pages, u128::from(report.fill_ms.max(1)) * 1_000_000);
        println!(
            "fill of 256 MiB: {} ms, {filled:.2} GB/s, {} faults; memcpy {copied:.2} GB/s",
            report.fill_ms, report.faults
        );
    }
}
