//! Pages that have not come when the workload runs: whoever touches one waits until it is brought,
//! and reads what it had at the source, whatever is done to memory meanwhile.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use pageferry_pager::client::{Notice, PagerClient, Wanted};
use pageferry_pager::message::FillReport;
use pageferry_proto::id::SpaceId;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

use crate::lab::{DEADLINE, FIRST_PAGE, Lab, Tree, VPID, put, run};
use crate::workload::Command;
use crate::{MIB, check};

type Wants = UnboundedReceiver<Vec<Wanted>>;

/// The next pages that are wanted, by their places in the first space.
async fn wanted(wants: &mut Wants) -> Vec<u64> {
    let told = tokio::time::timeout(DEADLINE, wants.recv()).await;
    let told = told.expect("something is wanted").unwrap();
    let offset = |(space, page): Wanted| {
        assert_eq!(space, SpaceId(77));
        page.0 - FIRST_PAGE
    };
    told.into_iter().map(offset).collect()
}

fn set(offset: u64, count: u64) -> PageSet {
    PageSet::from(run(FIRST_PAGE + offset, count))
}

async fn report(lab: &mut Lab) -> FillReport {
    match lab.notice().await {
        Notice::Filled(report) => report,
        other => panic!("{other:?}"),
    }
}

/// Brings what is wanted at once, and the rest of `left` piece by piece beside it, in the order
/// that `seed` says.
fn serve(client: Arc<PagerClient>, lab: &Lab, left: PageSet, seed: u64) -> JoinHandle<()> {
    let mut wants = client.wanted().unwrap();
    let store = lab.stores[&77].try_clone().unwrap();
    let space = SpaceId(u32::try_from(VPID).unwrap());
    tokio::spawn(async move {
        let mut parts = left.partition(PageCount(37));
        let mut random = seed;
        // The pager ends when all is there, whether or not all was brought.
        loop {
            let pages = tokio::select! {
                biased;
                Some(told) = wants.recv() => {
                    PageSet::from_runs(told.iter().map(|(_, page)| run(page.0, 1)))
                }
                () = std::future::ready(()), if !parts.is_empty() => {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = usize::try_from(random >> 33).unwrap() % parts.len();
                    parts.swap_remove(at)
                }
                else => break,
            };
            put(&store, &pages);
            if client.arrived(space, &pages).await.is_err() {
                break;
            }
        }
    })
}

#[tokio::test]
async fn who_touches_an_absent_page_waits_for_it_and_no_longer() {
    let tree = Tree {
        absent: vec![(20, 30)],
        ..Tree::of(64)
    };
    let (mut lab, mut peers) = Lab::running(&tree).await;
    let mut wants = lab.client.wanted().unwrap();
    peers[0].ok(&check(FIRST_PAGE, 20)).await;
    peers[0].tell(&check(FIRST_PAGE + 15, 20)).await;
    assert_eq!(wanted(&mut wants).await, [20]);
    // All but what is absent is filled meanwhile, and that is not taken for zero.
    while lab.status().await.pending_pages != 30 {
        tokio::task::yield_now().await;
    }
    assert!(!peers[0].has_answered(Duration::from_millis(20)).await);
    assert_eq!(lab.status().await.absent_pages, 30);
    lab.bring(&set(20, 1)).await;
    assert_eq!(wanted(&mut wants).await, [21]);
    lab.bring(&set(20, 15)).await;
    assert_eq!(peers[0].answer().await, crate::Answer::Ok);
    assert_eq!(lab.status().await.pending_pages, 15);
    lab.bring(&set(30, 20)).await;
    let report = report(&mut lab).await;
    assert_eq!((report.pages, report.waited.faults), (64, 2));
    assert!(0 < report.waited.p50_us && report.waited.p50_us <= report.waited.max_us);
    peers[0].ok(&check(FIRST_PAGE, 64)).await;
    assert_eq!(lab.stored(77), 0, "the store was not given back");
}

#[tokio::test]
async fn pages_that_are_absent_and_zero_are_zero_only_when_they_have_come() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(8)).await;
    let mut wants = lab.client.wanted().unwrap();
    let (page, count) = (FIRST_PAGE, 8);
    peers[0].tell(&Command::CheckZero { page, count }).await;
    assert_eq!(wanted(&mut wants).await, [0]);
    assert!(!peers[0].has_answered(Duration::from_millis(20)).await);
    lab.client.arrived(SpaceId(77), &set(0, 8)).await.unwrap();
    assert_eq!(peers[0].answer().await, crate::Answer::Ok);
    assert_eq!(report(&mut lab).await.pages, 8);
}

#[tokio::test]
async fn a_page_that_the_restore_touches_is_wanted_before_anything_runs() {
    let tree = Tree {
        early: vec![5],
        ..Tree::absent(16)
    };
    let mut lab = Lab::start().await;
    lab.plan(&tree).await;
    let mut wants = lab.client.wanted().unwrap();
    let (client, request) = (lab.client.clone(), lab.request(&tree));
    let restoring = tokio::spawn(async move { client.restore(request, &[], &[]).await });
    assert_eq!(wanted(&mut wants).await, [5]);
    lab.bring(&set(5, 1)).await;
    restoring.await.unwrap().unwrap();
    lab.bring(&set(0, 16)).await;
    lab.client.go().await.unwrap();
    let mut workload = lab.peer("77").await;
    assert_eq!(report(&mut lab).await.pages, 16);
    workload.ok(&check(FIRST_PAGE, 16)).await;
}

#[tokio::test]
async fn absent_memory_that_is_given_up_or_unmapped_is_not_waited_for() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(64).by_hand()).await;
    let (page, count) = (FIRST_PAGE + 10, 20);
    peers[0].ok(&Command::GiveUp { page, count }).await;
    peers[0].ok(&Command::CheckZero { page, count: 5 }).await;
    let page = FIRST_PAGE + 40;
    peers[0].ok(&Command::Unmap { page, count }).await;
    peers[0].ok(&Command::Map { page, count }).await;
    peers[0].ok(&Command::CheckZero { page, count: 7 }).await;
    lab.finish().await;
    let missing = lab.client.missing().await.unwrap();
    let needed =
        PageSet::from_runs([(0, 10), (30, 10), (60, 4)].map(|(at, n)| run(FIRST_PAGE + at, n)));
    assert_eq!(missing.len(), 1);
    assert_eq!(missing[0].pages, needed);
    drop(missing);
    // What comes too late is given back, and never seen.
    lab.bring(&set(0, 64)).await;
    assert_eq!(report(&mut lab).await.pages, 64);
    peers[0].ok(&Command::CheckZero { page, count }).await;
    peers[0].ok(&check(FIRST_PAGE, 10)).await;
    peers[0].ok(&check(FIRST_PAGE + 30, 10)).await;
    assert_eq!(lab.stored(77), 0);
}

#[tokio::test]
async fn absent_memory_that_moves_comes_to_where_it_is() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(64).by_hand()).await;
    let mut wants = lab.client.wanted().unwrap();
    let to = FIRST_PAGE + 10_000;
    let moved = |page, count, to| Command::Remap { page, count, to };
    peers[0].ok(&moved(FIRST_PAGE + 8, 16, to)).await;
    let (page, of) = (to + 2, FIRST_PAGE + 10);
    peers[0].tell(&Command::Check { page, count: 3, of }).await;
    // It is called what it was called at the source.
    assert_eq!(wanted(&mut wants).await, [10]);
    lab.bring(&set(10, 3)).await;
    assert_eq!(peers[0].answer().await, crate::Answer::Ok);
    lab.finish().await;
    lab.bring(&set(0, 64)).await;
    assert_eq!(report(&mut lab).await.pages, 64);
    let (page, of) = (to, FIRST_PAGE + 8);
    peers[0]
        .ok(&Command::Check {
            page,
            count: 16,
            of,
        })
        .await;
    peers[0].ok(&check(FIRST_PAGE, 8)).await;
    peers[0].ok(&check(FIRST_PAGE + 24, 40)).await;
}

#[tokio::test]
async fn a_child_forked_with_pages_absent_waits_for_them_too() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(MIB)).await;
    let mut wants = lab.client.wanted().unwrap();
    peers[0].ok(&Command::Fork).await;
    let mut child = lab.peer("child-of-77").await;
    child.tell(&check(FIRST_PAGE + 9, 1)).await;
    assert_eq!(wanted(&mut wants).await, [9]);
    let (page, count) = (FIRST_PAGE, 20);
    peers[0].ok(&Command::GiveUp { page, count }).await;
    lab.bring(&set(0, MIB)).await;
    assert_eq!(child.answer().await, crate::Answer::Ok);
    report(&mut lab).await;
    child.ok(&check(FIRST_PAGE, MIB)).await;
    peers[0].ok(&Command::CheckZero { page, count }).await;
    peers[0].ok(&check(FIRST_PAGE + 20, MIB - 20)).await;
    assert_eq!(lab.stored(77), 0);
}

#[tokio::test]
async fn whatever_a_process_does_while_pages_come_no_byte_is_wrong() {
    for seed in 1..7 {
        // Every other stretch is absent.
        let tree = Tree {
            absent: (0..4 * MIB)
                .step_by(16)
                .map(|at| (at, 1 + at % 13))
                .collect(),
            ..Tree::of(4 * MIB)
        };
        let (mut lab, mut peers) = Lab::running(&tree).await;
        let serving = serve(lab.client.clone(), &lab, tree.absent_pages(), seed);
        let (page, count, steps) = (FIRST_PAGE, 4 * MIB, 300);
        peers[0]
            .ok(&Command::Churn {
                page,
                count,
                steps,
                seed,
            })
            .await;
        report(&mut lab).await;
        serving.abort();
    }
}

#[tokio::test]
async fn a_daemon_that_comes_back_is_told_what_is_absent_and_who_waits() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(64)).await;
    let mut wants = lab.client.wanted().unwrap();
    peers[0].tell(&check(FIRST_PAGE + 7, 10)).await;
    assert_eq!(wanted(&mut wants).await, [7]);
    lab.bring(&set(20, 5)).await;
    lab.client.close();
    assert_eq!(lab.notice().await, Notice::Lost);
    let (client, notices) = PagerClient::connect(lab.directory.path()).unwrap();
    (lab.client, lab.notices) = (Arc::new(client), notices);
    let mut wants = lab.client.wanted().unwrap();
    let missing = lab.client.missing().await.unwrap();
    assert_eq!(wanted(&mut wants).await, [7]);
    let [missing] = &missing[..] else {
        panic!("{missing:?}")
    };
    assert_eq!(missing.space, SpaceId(77));
    assert_eq!(missing.pages, set(0, 64).difference(&set(20, 5)));
    // The store is the same one.
    let store = std::fs::File::from(missing.store.as_fd().try_clone_to_owned().unwrap());
    put(&store, &missing.pages);
    lab.client
        .arrived(SpaceId(77), &missing.pages)
        .await
        .unwrap();
    assert_eq!(peers[0].answer().await, crate::Answer::Ok);
    assert_eq!(report(&mut lab).await.pages, 64);
    peers[0].ok(&check(FIRST_PAGE, 64)).await;
}

#[tokio::test]
async fn a_workload_that_ends_with_pages_absent_ends_the_pager() {
    let (mut lab, mut peers) = Lab::running(&Tree::absent(MIB)).await;
    peers[0].tell(&Command::Exit).await;
    report(&mut lab).await;
    assert_eq!(lab.notice().await, Notice::Lost);
}

#[tokio::test]
async fn pages_that_are_not_planned_cannot_be_absent() {
    let mut lab = Lab::start().await;
    lab.plan(&Tree::of(8)).await;
    let beyond = PageSet::from(PageRun::new(PageIndex(FIRST_PAGE + 7), PageCount(2)).unwrap());
    let told = lab.client.absent(&[(SpaceId(77), &beyond)]).await;
    assert!(told.is_err());
    lab.client.discard().await.unwrap();
}
