use pageferry_trial::Trial;

use super::*;
use crate::track::tests::{attach, eventually, start};

const BASE: u64 = 0x2000_0000_0000;

fn run(page: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex((BASE >> 12) + page), PageCount(count)).unwrap()
}

fn reader(pid: i32) -> Reader {
    Reader::open(pid, ptrace::pidfd_open(pid).unwrap()).unwrap()
}

fn read(reader: &Reader, wanted: &PageSet, misses: Misses) -> (Pages, Vec<u8>) {
    let mut buffer = vec![0xee; usize::try_from(wanted.len().bytes()).unwrap()];
    let pages = reader.read(wanted, &mut buffer, misses).unwrap();
    buffer.truncate(usize::try_from(pages.read.len().bytes()).unwrap());
    let firsts = buffer.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    (pages, firsts)
}

#[test]
fn what_is_unmapped_is_not_read_and_what_is_protected_is() {
    let mut trial = start();
    for (page, count, byte) in [(0, 4, 1), (8, 400, 2), (500, 1, 3), (600, 2, 4)] {
        trial.tell(&format!("map {:#x} {count} rw", BASE + page * 4096));
        trial.tell(&format!("fill {:#x} {count} {byte}", BASE + page * 4096));
    }
    trial.tell(&format!("protect {:#x} 300 none", BASE + 8 * 4096));
    let wanted = PageSet::from_runs([run(0, 408), run(499, 3), run(600, 1), run(700, 5)]);
    let (pages, firsts) = read(&reader(trial.pid()), &wanted, Misses::GiveUp);
    let got = [run(0, 4), run(8, 400), run(500, 1), run(600, 1)];
    assert_eq!(pages.read, PageSet::from_runs(got));
    assert_eq!(pages.unread, wanted.difference(&pages.read));
    let expected: Vec<u8> = [(4, 1), (400, 2), (1, 3), (1, 4)]
        .iter()
        .flat_map(|(count, byte)| vec![*byte; *count])
        .collect();
    assert_eq!(firsts, expected);
}

#[test]
fn many_small_runs_are_read_in_order() {
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} 6000 rw"));
    trial.tell(&format!("fill {BASE:#x} 6000 9"));
    for page in (0..6000).step_by(500) {
        trial.tell(&format!("fill {:#x} 1 5", BASE + page * 4096));
    }
    let wanted: PageSet = (0..3000).map(|page| run(2 * page, 1)).collect();
    let (pages, firsts) = read(&reader(trial.pid()), &wanted, Misses::GiveUp);
    assert_eq!((pages.read, pages.unread), (wanted, PageSet::new()));
    let expected: Vec<u8> = (0..3000)
        .map(|page| if page % 250 == 0 { 5 } else { 9 })
        .collect();
    assert_eq!(firsts, expected);
}

#[test]
fn a_long_stretch_of_nothing_is_given_up_early() {
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} 1 rw"));
    trial.tell(&format!("fill {BASE:#x} 1 9"));
    let wanted = PageSet::from(run(0, 100_000));
    let (pages, _) = read(&reader(trial.pid()), &wanted, Misses::GiveUp);
    assert_eq!(pages.read, PageSet::from(run(0, 1)));
    assert_eq!(pages.unread, PageSet::from(run(1, 99_999)));
}

/// Pages 4 to 43, and 60, of 100 are lost: whoever touches one of them gets a SIGBUS, and whoever
/// reads it from outside an error, though the kernel counts it as swapped out.
fn with_lost_pages() -> Trial {
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} 100 rw"));
    trial.tell(&format!("poison {:#x} 40", BASE + 4 * 4096));
    trial.tell(&format!("poison {:#x} 1", BASE + 60 * 4096));
    for (page, count) in [(0, 4), (44, 16), (61, 39)] {
        trial.tell(&format!("fill {:#x} {count} 7", BASE + page * 4096));
    }
    trial
}

#[test]
fn each_page_behind_lost_ones_is_tried_when_no_scan_follows() {
    let trial = with_lost_pages();
    let wanted = PageSet::from(run(0, 100));
    let (pages, firsts) = read(&reader(trial.pid()), &wanted, Misses::Settle);
    let lost = PageSet::from_runs([run(4, 40), run(60, 1)]);
    assert_eq!(pages.unread, lost);
    assert_eq!(pages.read, wanted.difference(&lost));
    assert_eq!(firsts, vec![7; 59]);
}

#[test]
fn lost_pages_are_live_and_dirty_for_as_long_as_they_are_lost() {
    let mut trial = with_lost_pages();
    let lost = PageSet::from_runs([run(4, 40), run(60, 1)]);
    let mut space = attach(&trial);
    for _ in 0..2 {
        let scan = space.scan().unwrap();
        let wanted = scan.dirty.intersection(&PageSet::from(run(0, 100)));
        let (pages, _) = read(&space.reader(), &wanted, Misses::Settle);
        assert_eq!(pages.unread, lost);
        space.put_back(&pages.unread);
    }
    let last = space.final_scan().unwrap();
    assert_eq!(lost.difference(&last.live), PageSet::new());
    assert_eq!(lost.difference(&last.dirty), PageSet::new());
    // An error that passes: the workload gives the pages up, and writes them anew.
    trial.tell(&format!("advise {BASE:#x} 100 dontneed"));
    trial.tell(&format!("fill {BASE:#x} 100 3"));
    let last = space.final_scan().unwrap();
    let wanted = last.dirty.intersection(&PageSet::from(run(0, 100)));
    let (pages, firsts) = read(&space.reader(), &wanted, Misses::Settle);
    assert_eq!((pages.unread, firsts), (PageSet::new(), vec![3; 100]));
}

#[test]
fn pages_that_were_lost_under_an_earlier_tracking_are_dirty_for_the_next() {
    let trial = with_lost_pages();
    let lost = PageSet::from_runs([run(4, 40), run(60, 1)]);
    for _ in 0..2 {
        let mut space = attach(&trial);
        let scan = space.scan().unwrap();
        assert_eq!(lost.difference(&scan.dirty), PageSet::new());
        // They are protected now, and this is never taken back.
    }
}

#[test]
fn a_process_whose_first_thread_has_ended_is_not_gone() {
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} 50 rw"));
    trial.tell(&format!("fill {BASE:#x} 50 6"));
    let reader = reader(trial.pid());
    trial.tell("end-first-thread");
    eventually("the end of the first thread", || {
        let status = pageferry_sys::task::Status::read(trial.pid());
        status.unwrap().has_ended()
    });
    let wanted = PageSet::from(run(0, 50));
    let (pages, firsts) = read(&reader, &wanted, Misses::Settle);
    assert_eq!((pages.read, firsts), (wanted, vec![6; 50]));
    assert!(!reader.has_ended());
}

#[test]
fn a_process_that_is_gone_is_not_read() {
    let trial = start();
    let reader = reader(trial.pid());
    drop(trial);
    let mut buffer = vec![0; PAGE_SIZE];
    let read = reader.read(&PageSet::from(run(0, 1)), &mut buffer, Misses::Settle);
    assert!(matches!(read, Err(ReadError::Gone { .. })));
}
