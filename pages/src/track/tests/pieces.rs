//! Scans whose caller decides when the memory is walked.

use std::ops::Range;
use std::time::Instant;

use super::*;

/// So much that one walk does not come to its end when there is no time.
const MANY: u64 = 16_384;

/// What of the ranges is in the trial process's memory.
fn here(ranges: &[Range<u64>]) -> u64 {
    let end = BASE + MANY * PAGE_SIZE as u64;
    let inside = ranges
        .iter()
        .filter(|range| BASE <= range.start && range.end <= end);
    inside.map(|range| range.end - range.start).sum()
}

fn filled() -> (Trial, Space) {
    let mut trial = start();
    trial.tell(&format!("map {} {MANY} rw", at(0)));
    trial.tell(&format!("fill {} {MANY} 7", at(0)));
    let space = attach(&trial);
    (trial, space)
}

#[test]
fn a_scan_in_pieces_finds_what_one_in_a_whole_does() {
    let (mut trial, mut space) = filled();
    let mut scanning = space.begin_scan().unwrap();
    let mut walks = 0;
    while !scanning.is_walked() {
        let left = scanning.todo();
        scanning.walk(Some(Instant::now())).unwrap();
        scanning.register_replaced().unwrap();
        assert_ne!(scanning.todo(), left, "nothing was walked");
        walks += u32::from(here(&left) != here(&scanning.todo()));
    }
    // 8 MiB each.
    assert_eq!(walks, 8);
    assert_eq!(ours(&scanning.end().unwrap().dirty), [(0, MANY)]);
    assert_eq!(ours(&space.scan().unwrap().dirty), []);
    // Written where the walk has been, and where it is still to come.
    let mut scanning = space.begin_scan().unwrap();
    while scanning
        .todo()
        .first()
        .is_some_and(|range| range.start <= BASE)
    {
        scanning.walk(Some(Instant::now())).unwrap();
    }
    trial.tell(&format!("fill {} 1 8", at(0)));
    trial.tell(&format!("fill {} 1 8", at(MANY - 1)));
    scanning.walk(None).unwrap();
    assert!(scanning.is_walked());
    assert_eq!(ours(&scanning.end().unwrap().dirty), [(MANY - 1, 1)]);
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, 1)]);
}

#[test]
fn a_part_that_is_walked_again_is_dirty_once_and_for_all() {
    let (mut trial, mut space) = filled();
    space.scan().unwrap();
    trial.tell(&format!("fill {} 3 8", at(5)));
    let mut scanning = space.begin_scan().unwrap();
    let todo = scanning.todo();
    scanning.walk(None).unwrap();
    scanning.walk_again(todo);
    assert!(!scanning.is_walked());
    trial.tell(&format!("fill {} 1 8", at(100)));
    scanning.walk(None).unwrap();
    let dirty = scanning.end().unwrap().dirty;
    assert_eq!(ours(&dirty), [(5, 3), (100, 1)]);
    assert_eq!(ours(&space.scan().unwrap().dirty), []);
}

#[test]
fn what_a_scan_has_found_that_is_given_up_stays_dirty() {
    let (_trial, mut space) = filled();
    let mut scanning = space.begin_scan().unwrap();
    scanning.walk(None).unwrap();
    drop(scanning);
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, MANY)]);
}

#[test]
fn after_a_beginning_anew_everything_is_dirty_once() {
    let (_trial, mut space) = filled();
    space.scan().unwrap();
    assert_eq!(ours(&space.scan().unwrap().dirty), []);
    space.begin_anew();
    assert_eq!(ours(&space.scan().unwrap().dirty), [(0, MANY)]);
    assert_eq!(ours(&space.scan().unwrap().dirty), []);
}
