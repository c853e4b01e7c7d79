use super::*;
use crate::pages::track::tests::start;

const BASE: u64 = 0x2000_0000_0000;

fn run(page: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex((BASE >> 12) + page), PageCount(count)).unwrap()
}

fn reader(pid: i32) -> Reader {
    Reader::open(pid, ptrace::pidfd_open(pid).unwrap()).unwrap()
}

fn read(reader: &Reader, wanted: &PageSet) -> (Pages, Vec<u8>) {
    let mut buffer = vec![0xee; usize::try_from(wanted.len().bytes()).unwrap()];
    let pages = reader.read(wanted, &mut buffer).unwrap();
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
    let (pages, firsts) = read(&reader(trial.pid()), &wanted);
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
    let (pages, firsts) = read(&reader(trial.pid()), &wanted);
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
    let (pages, _) = read(&reader(trial.pid()), &wanted);
    assert_eq!(pages.read, PageSet::from(run(0, 1)));
    assert_eq!(pages.unread, PageSet::from(run(1, 99_999)));
}

#[test]
fn a_process_that_is_gone_is_not_read() {
    let trial = start();
    let reader = reader(trial.pid());
    drop(trial);
    let mut buffer = vec![0; PAGE_SIZE];
    let read = reader.read(&PageSet::from(run(0, 1)), &mut buffer);
    assert!(matches!(read, Err(ReadError::Gone { .. })));
}
