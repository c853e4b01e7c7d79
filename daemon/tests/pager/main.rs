//! The pager on the real kernel: real userfaultfds, real processes, a stand-in for CRIU.
//!
//! Needs root (userfaultfd's fork event, cgroups).

#![allow(clippy::unwrap_used)]

mod criu;
mod lab;
mod sys;
mod workload;

use lab::{FIRST_PAGE, Lab, Tree};
use pageferry::pager::client::{Notice, Remains};
use pageferry::pager::message::State;
use workload::{Answer, Command};

const MIB: u64 = 256;

/// Not a test: what the processes do that tests start.
#[test]
fn play_a_role() {
    if let Ok(setup) = std::env::var("PAGER_TEST_WORKLOAD") {
        workload::run(&serde_json::from_str(&setup).unwrap());
        std::process::exit(0);
    }
    if let Ok(script) = std::env::var("PAGER_TEST_CRIU") {
        let socket = std::env::var("PAGER_TEST_SOCKET").unwrap().parse().unwrap();
        criu::run(&serde_json::from_str(&script).unwrap(), socket);
        std::process::exit(0);
    }
}

fn check(page: u64, count: u64) -> Command {
    Command::Check {
        page,
        count,
        of: page,
    }
}

#[tokio::test]
async fn all_memory_is_right_after_the_fill_and_the_pager_ends() {
    let pages = 256 * MIB;
    let (mut lab, mut peers) = Lab::running(&Tree::of(pages)).await;
    let Notice::Filled(report) = lab.notice().await else {
        panic!("not filled")
    };
    assert_eq!((report.pages, report.unmapped), (pages, 0));
    peers[0].ok(&check(FIRST_PAGE, pages)).await;
    assert_eq!(
        peers[0].ask(&Command::IsRegistered).await,
        Answer::Yes(false)
    );
    assert_eq!(lab.notice().await, Notice::Lost);
    assert_eq!(
        Remains::read(lab.directory.path()).unwrap(),
        Remains::Filled(report)
    );
    assert_eq!(lab.stored(77), 0, "the store was not given back");
}
