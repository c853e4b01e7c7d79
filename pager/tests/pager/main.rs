//! The pager on the real kernel: real userfaultfds, real processes, a stand-in for CRIU.
//!
//! Needs root (userfaultfd's fork event, cgroups). Where pages must be missing when something
//! happens, the stand-in lets the workload run before it says "finished", which is what the fill
//! waits for; so nothing here depends on how fast anything is.

#![allow(clippy::unwrap_used)]

mod absent;
mod criu;
mod fates;
mod lab;
mod loopback;
mod losses;
mod sys;
mod workload;

use pageferry_pager::client::{Notice, Remains};
use pageferry_pager::message::State;

use lab::{FIRST_PAGE, Lab, NEXT_SPACE, Tree};
use workload::{Answer, Command};

/// Pages of a MiB.
const MIB: u64 = 256;

/// Not a test: what the processes do that tests start.
#[test]
fn play_a_role() {
    if let Ok(setup) = std::env::var("PAGER_TEST_WORKLOAD") {
        workload::run(&serde_json::from_str(&setup).unwrap());
        std::process::exit(0);
    }
    if let Ok(directory) = std::env::var("PAGER_TEST_DAEMON") {
        fates::be_a_daemon(directory.as_ref());
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

/// Waits for the end of the fill and answers how many pages it settled.
async fn filled(lab: &mut Lab) -> u64 {
    match lab.notice().await {
        Notice::Filled(report) => report.pages,
        other => panic!("{other:?}"),
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
    let registered = peers[0].ask(&Command::IsRegistered).await;
    assert_eq!(registered, Answer::Yes(false));
    assert_eq!(lab.notice().await, Notice::Lost);
    let remains = Remains::read(lab.directory.path()).unwrap();
    assert_eq!(remains, Remains::Filled(report));
    assert_eq!(lab.stored(77), 0, "the store was not given back");
}

#[tokio::test]
async fn a_criu_that_was_started_ahead_is_the_one_that_restores() {
    // The pager has it from us. CRIU must not have it from the pager: the workload would keep it.
    std::fs::write("/proc/self/oom_score_adj", "300").unwrap();
    let tree = Tree::of(MIB);
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    lab.client.prepare(lab.request(&tree), &[]).await.unwrap();
    let ahead = lab.processes();
    assert_eq!(ahead.len(), 1);
    let inherited = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", ahead[0])).unwrap();
    assert_eq!(inherited.trim(), "0");
    let restoring = lab.client.restore(lab.request(&tree), &[], &[]);
    restoring.await.unwrap();
    let now = lab.processes();
    assert!(now.contains(&ahead[0]), "{now:?} without {ahead:?}");
    lab.client.discard().await.unwrap();
    assert!(lab.processes().is_empty());
}

#[tokio::test]
async fn a_criu_that_was_started_ahead_and_killed_is_replaced() {
    use nix::sys::signal::{Signal, kill};
    let tree = Tree::of(MIB);
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    lab.client.prepare(lab.request(&tree), &[]).await.unwrap();
    let ahead = lab.processes();
    assert_eq!(ahead.len(), 1);
    kill(nix::unistd::Pid::from_raw(ahead[0]), Signal::SIGKILL).unwrap();
    let deadline = std::time::Instant::now() + lab::DEADLINE;
    while !lab.processes().is_empty() {
        assert!(std::time::Instant::now() < deadline, "it does not end");
        tokio::task::yield_now().await;
    }
    let restoring = lab.client.restore(lab.request(&tree), &[], &[]);
    let restored = restoring.await.unwrap();
    assert!(lab.processes().contains(&restored.root_pid));
    assert_eq!(lab.status().await.state, State::Held);
    lab.client.discard().await.unwrap();
    assert!(lab.processes().is_empty());
}

#[tokio::test]
async fn faults_are_served_while_held_and_nothing_else_is_filled() {
    let tree = Tree {
        early: vec![0, 1, 700, 3000, 3001, 4095],
        ..Tree::of(16 * MIB)
    };
    let mut lab = Lab::held(&tree).await;
    let status = lab.status().await;
    assert_eq!(status.state, State::Held);
    assert!(0 < status.faults && status.faults <= 6, "{status:?}");
    assert!(status.filled_pages <= 4 * status.faults, "{status:?}");
    assert_eq!(status.pending_pages + status.filled_pages, 16 * MIB);
    lab.client.go().await.unwrap();
    let mut workload = lab.peer("77").await;
    filled(&mut lab).await;
    workload.ok(&check(FIRST_PAGE, 16 * MIB)).await;
}

#[tokio::test]
async fn memory_that_was_given_up_reads_as_zero_and_is_not_filled_again() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(64).by_hand()).await;
    let (page, count) = (FIRST_PAGE + 10, 20);
    peers[0].ok(&Command::GiveUp { page, count }).await;
    peers[0].ok(&Command::CheckZero { page, count: 5 }).await;
    peers[0].ok(&check(FIRST_PAGE, 10)).await;
    // What was there is given up, too, and faults anew.
    let page = FIRST_PAGE + 5;
    peers[0].ok(&Command::GiveUp { page, count: 5 }).await;
    peers[0].ok(&Command::CheckZero { page, count: 5 }).await;
    peers[0].ok(&Command::Write { page }).await;
    lab.finish().await;
    assert_eq!(filled(&mut lab).await, 64);
    peers[0].ok(&check(FIRST_PAGE, 5)).await;
    peers[0]
        .ok(&Command::CheckZero {
            page: page + 1,
            count: 24,
        })
        .await;
    peers[0].ok(&check(FIRST_PAGE + 30, 34)).await;
}

#[tokio::test]
async fn unmapped_memory_is_forgotten_and_mapped_again_reads_as_zero() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(64).by_hand()).await;
    let (page, count) = (FIRST_PAGE + 10, 20);
    peers[0].ok(&Command::Unmap { page, count }).await;
    peers[0].ok(&Command::Map { page, count }).await;
    peers[0].ok(&Command::CheckZero { page, count: 10 }).await;
    lab.finish().await;
    filled(&mut lab).await;
    peers[0].ok(&Command::CheckZero { page, count }).await;
    peers[0].ok(&check(FIRST_PAGE, 10)).await;
    peers[0].ok(&check(FIRST_PAGE + 30, 34)).await;
}

#[tokio::test]
async fn moved_memory_is_filled_where_it_is() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(64).by_hand()).await;
    let to = FIRST_PAGE + 10_000;
    let moved = |page, count, to| Command::Remap { page, count, to };
    peers[0].ok(&moved(FIRST_PAGE + 8, 16, to)).await;
    let of = FIRST_PAGE + 10;
    peers[0]
        .ok(&Command::Check {
            page: to + 2,
            count: 3,
            of,
        })
        .await;
    // Onto other missing memory, and onward.
    peers[0].ok(&moved(to + 8, 8, FIRST_PAGE + 40)).await;
    peers[0].ok(&moved(FIRST_PAGE + 44, 4, to + 100)).await;
    lab.finish().await;
    filled(&mut lab).await;
    peers[0].ok(&check(FIRST_PAGE, 8)).await;
    peers[0]
        .ok(&Command::Check {
            page: to,
            count: 8,
            of: FIRST_PAGE + 8,
        })
        .await;
    let of = FIRST_PAGE + 16;
    peers[0]
        .ok(&Command::Check {
            page: FIRST_PAGE + 40,
            count: 4,
            of,
        })
        .await;
    peers[0]
        .ok(&Command::Check {
            page: to + 100,
            count: 4,
            of: of + 4,
        })
        .await;
    peers[0].ok(&check(FIRST_PAGE + 48, 16)).await;
}

#[tokio::test]
async fn a_forked_child_has_what_its_parent_had_at_the_fork() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(4 * MIB).by_hand()).await;
    let (page, count) = (FIRST_PAGE + 100, 50);
    peers[0].ok(&Command::GiveUp { page, count }).await;
    peers[0].ok(&Command::Fork).await;
    let mut child = lab.peer("child-of-77").await;
    // What the parent does now is nothing to the child.
    peers[0]
        .ok(&Command::Unmap {
            page: FIRST_PAGE + 500,
            count: 100,
        })
        .await;
    child
        .ok(&Command::Unmap {
            page: FIRST_PAGE + 600,
            count: 100,
        })
        .await;
    child.ok(&Command::Fork).await;
    let mut grandchild = lab.peer("child-of-child-of-77").await;
    let half = 250;
    child.ok(&check(FIRST_PAGE + 150, half)).await;
    lab.finish().await;
    filled(&mut lab).await;
    for descendant in [&mut child, &mut grandchild] {
        descendant.ok(&check(FIRST_PAGE, 100)).await;
        descendant.ok(&Command::CheckZero { page, count }).await;
        descendant.ok(&check(FIRST_PAGE + 150, 450)).await;
        descendant.ok(&check(FIRST_PAGE + 700, 324)).await;
    }
    peers[0].ok(&check(FIRST_PAGE, 100)).await;
    peers[0].ok(&check(FIRST_PAGE + 600, 424)).await;
    assert_eq!(lab.stored(77), 0);
}

#[tokio::test]
async fn a_child_that_dies_does_not_keep_the_fill_from_ending() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
    peers[0].ok(&Command::Fork).await;
    let mut child = lab.peer("child-of-77").await;
    child.tell(&Command::Exit).await;
    lab.finish().await;
    filled(&mut lab).await;
    peers[0].ok(&check(FIRST_PAGE, MIB)).await;
}

#[tokio::test]
async fn children_forked_at_once_in_the_fill_all_read_what_was_there() {
    let pages = 64 * MIB;
    let (mut lab, mut peers) = Lab::running(&Tree::of(pages)).await;
    let (page, count) = (FIRST_PAGE + pages - 2 * MIB, 2 * MIB);
    for _ in 0..3 {
        peers[0]
            .ok(&Command::ForkAtOnce {
                threads: 4,
                page,
                count,
            })
            .await;
    }
    filled(&mut lab).await;
    peers[0].ok(&check(FIRST_PAGE, pages)).await;
}

#[tokio::test]
async fn a_child_forked_while_memory_is_given_up_has_what_there_was_at_the_fork() {
    let pages = 16 * MIB;
    let (mut lab, mut peers) = Lab::running(&Tree::of(pages).by_hand()).await;
    let (page, count) = (FIRST_PAGE, pages);
    peers[0].ok(&Command::ForkRace { page, count }).await;
    lab.finish().await;
    filled(&mut lab).await;
    peers[0].ok(&Command::CheckZero { page, count }).await;
}

#[tokio::test]
async fn whatever_a_process_does_to_its_memory_in_the_fill_no_byte_is_wrong() {
    for seed in 1..9 {
        let (mut lab, mut peers) = Lab::running(&Tree::of(48 * MIB)).await;
        // The end is filled last.
        let (page, count) = (FIRST_PAGE + 40 * MIB, 8 * MIB);
        let steps = 150;
        peers[0]
            .ok(&Command::Churn {
                page,
                count,
                steps,
                seed,
            })
            .await;
        filled(&mut lab).await;
        peers[0].ok(&check(FIRST_PAGE, 40 * MIB)).await;
    }
}

#[tokio::test]
async fn whatever_a_process_does_before_the_fill_no_byte_is_wrong() {
    for seed in 1..9 {
        let (mut lab, mut peers) = Lab::running(&Tree::of(4 * MIB).by_hand()).await;
        let (page, count, steps) = (FIRST_PAGE, 4 * MIB, 300);
        peers[0]
            .ok(&Command::Churn {
                page,
                count,
                steps,
                seed,
            })
            .await;
        lab.finish().await;
        filled(&mut lab).await;
    }
}

#[tokio::test]
async fn several_spaces_are_filled_each_from_its_own_store() {
    let tree = Tree {
        spaces: vec![8 * MIB, 3, 5 * MIB, 1],
        ..Tree::of(0)
    };
    let (mut lab, mut peers) = Lab::running(&tree).await;
    assert_eq!(filled(&mut lab).await, 13 * MIB + 4);
    for (index, (peer, pages)) in peers.iter_mut().zip(&tree.spaces).enumerate() {
        let first = FIRST_PAGE + index as u64 * NEXT_SPACE;
        peer.ok(&check(first, *pages)).await;
    }
}

#[tokio::test]
async fn a_workload_that_ends_in_the_fill_ends_the_pager() {
    let (mut lab, mut peers) = Lab::running(&Tree::of(MIB).by_hand()).await;
    peers[0].tell(&Command::Exit).await;
    lab.finish().await;
    filled(&mut lab).await;
    assert_eq!(lab.notice().await, Notice::Lost);
}
