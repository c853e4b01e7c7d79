//! What changes in a process's memory, and what the tracker makes of it.

use pageferry_sys::pagemap::Pagemap;

use super::*;
use crate::track::walk::{Look, walk_all};

/// A trial process with `pages` pages of memory that have contents, tracked and mirrored once.
fn tracked(pages: u64) -> (Trial, Space, Mirror) {
    let mut trial = start();
    trial.tell(&format!("map {} {pages} rw", at(0)));
    trial.tell(&format!("fill {} {pages} random", at(0)));
    let mut space = attach(&trial);
    let mut mirror = Mirror::default();
    let scan = mirror.round(&mut space);
    assert_eq!(ours(&scan.dirty), [(0, pages)]);
    (trial, space, mirror)
}

fn dirty(mirror: &mut Mirror, space: &mut Space) -> Vec<(u64, u64)> {
    ours(&mirror.round(space).dirty)
}

#[test]
fn writes_by_the_program_and_by_the_kernel_are_found() {
    let (mut trial, mut space, mut mirror) = tracked(64);
    assert_eq!(dirty(&mut mirror, &mut space), []);
    trial.tell(&format!("fill {} 2 7", at(3)));
    trial.tell(&format!("kernel-write {} 5000", at(10)));
    assert_eq!(dirty(&mut mirror, &mut space), [(3, 2), (10, 2)]);
    assert_eq!(dirty(&mut mirror, &mut space), []);
    trial.tell(&format!("kernel-write {} 100", at(20)));
    let last = mirror.finish(&mut space);
    assert_eq!(ours(&last.dirty), [(20, 1)]);
    assert_eq!(ours(&last.live), [(0, 64)]);
    assert!(
        last.hidden
            .iter()
            .any(|(start, end)| *start <= BASE && BASE + 64 * 4096 <= *end)
    );
}

#[test]
fn a_final_scan_leaves_everything_dirty_for_another_round() {
    let (mut trial, mut space, mut mirror) = tracked(8);
    trial.tell(&format!("fill {} 1 7", at(2)));
    let first = space.final_scan().unwrap();
    let second = space.final_scan().unwrap();
    assert_eq!(ours(&first.dirty), [(2, 1)]);
    assert_eq!(ours(&second.dirty), [(2, 1)]);
    assert_eq!(dirty(&mut mirror, &mut space), [(2, 1)]);
    mirror.finish(&mut space);
}

#[test]
fn memory_given_up_is_not_live_and_comes_back_dirty() {
    let (mut trial, mut space, mut mirror) = tracked(64);
    trial.tell(&format!("advise {} 32 dontneed", at(16)));
    assert_eq!(dirty(&mut mirror, &mut space), []);
    let last = mirror.finish(&mut space);
    assert_eq!(ours(&last.live), [(0, 16), (48, 16)]);
    trial.tell(&format!("fill {} 2 9", at(20)));
    assert_eq!(dirty(&mut mirror, &mut space), [(20, 2)]);
    assert_eq!(
        ours(&mirror.finish(&mut space).live),
        [(0, 16), (20, 2), (48, 16)]
    );
}

#[test]
fn memory_that_was_only_looked_at_is_not_live() {
    let (mut trial, mut space, mut mirror) = tracked(4);
    trial.tell(&format!("map {} 64 rw", at(100)));
    trial.tell(&format!("look {} 64", at(100)));
    trial.tell(&format!("fill {} 1 5", at(130)));
    assert_eq!(dirty(&mut mirror, &mut space), [(130, 1)]);
    trial.tell(&format!("fill {} 1 6", at(131)));
    assert_eq!(ours(&mirror.finish(&mut space).live), [(0, 4), (130, 2)]);
}

#[test]
fn guard_regions_are_neither_live_nor_disturbed() {
    let (mut trial, mut space, mut mirror) = tracked(16);
    trial.tell(&format!("advise {} 4 guard", at(4)));
    assert_eq!(dirty(&mut mirror, &mut space), []);
    let last = mirror.finish(&mut space);
    assert_eq!(ours(&last.live), [(0, 4), (8, 8)]);
    let guards = |scan: &FinalScan| {
        let pages = scan
            .guards
            .iter()
            .map(|(start, end)| start / 4096..end / 4096);
        let runs = pages.map(|range| {
            let (start, count) = (PageIndex(range.start), PageCount(range.end - range.start));
            PageRun::new(start, count).unwrap()
        });
        ours(&PageSet::from_runs(runs))
    };
    assert_eq!(guards(&last), [(4, 4)]);
    trial.tell(&format!("advise {} 4 unguard", at(4)));
    assert_eq!(guards(&mirror.finish(&mut space)), []);
    assert_eq!(trial.tell(&format!("get {}", at(5))), "0");
    trial.tell(&format!("fill {} 1 8", at(5)));
    assert_eq!(dirty(&mut mirror, &mut space), [(5, 1)]);
    assert_eq!(
        ours(&mirror.finish(&mut space).live),
        [(0, 4), (5, 1), (8, 8)]
    );
}

#[test]
fn contents_behind_no_protection_are_read_and_followed() {
    let mut trial = start();
    trial.tell(&format!("map {} 32 rw", at(0)));
    trial.tell(&format!("fill {} 32 random", at(0)));
    trial.tell(&format!("protect {} 32 none", at(0)));
    let mut space = attach(&trial);
    let mut mirror = Mirror::default();
    assert_eq!(dirty(&mut mirror, &mut space), [(0, 32)]);
    trial.tell(&format!("protect {} 32 rw", at(0)));
    trial.tell(&format!("fill {} 1 random", at(9)));
    trial.tell(&format!("protect {} 32 none", at(0)));
    assert_eq!(dirty(&mut mirror, &mut space), [(9, 1)]);
    assert_eq!(ours(&mirror.finish(&mut space).live), [(0, 32)]);
}

#[test]
fn a_mapping_replaced_by_its_like_is_dirty_altogether() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    trial.tell(&format!("unmap {} 32", at(0)));
    trial.tell(&format!("map {} 32 rw", at(0)));
    trial.tell(&format!("fill {} 4 3", at(8)));
    assert_eq!(dirty(&mut mirror, &mut space), [(8, 4)]);
    trial.tell(&format!("fill {} 1 4", at(9)));
    assert_eq!(dirty(&mut mirror, &mut space), [(9, 1)]);
    assert_eq!(ours(&mirror.finish(&mut space).live), [(8, 4)]);
}

#[test]
fn the_middle_of_a_mapping_replaced_costs_no_write_around_it() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    trial.tell(&format!("fill {} 1 1", at(2)));
    trial.tell(&format!("unmap {} 4", at(8)));
    trial.tell(&format!("map {} 4 rw", at(8)));
    trial.tell(&format!("fill {} 4 3", at(8)));
    trial.tell(&format!("fill {} 1 1", at(30)));
    let mut found = mirror.round(&mut space).dirty;
    found.union_with(&mirror.round(&mut space).dirty);
    for page in [2, 8, 9, 10, 11, 30] {
        assert!(
            found.contains(run(page, 1).start()),
            "page {page} was not found"
        );
    }
    mirror.finish(&mut space);
}

#[test]
fn what_a_broken_walk_protected_without_telling_is_dirty() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    trial.tell(&format!("fill {} 1 1", at(2)));
    trial.tell(&format!("unmap {} 4", at(8)));
    trial.tell(&format!("map {} 4 rw", at(8)));
    trial.tell(&format!("fill {} 4 3", at(8)));
    // As if the middle were replaced after maps was read: the walk protects page 2 and then fails.
    let pagemap = Pagemap::open(trial.pid()).unwrap();
    let whole = BASE..BASE + 32 * 4096;
    let walked = walk_all(&pagemap, space.support.guard, &[whole], Look::Protect);
    assert_eq!(walked.broken.len(), 1);
    space.disown(walked.broken).unwrap();
    assert_eq!(dirty(&mut mirror, &mut space), [(0, 32)]);
    assert_eq!(dirty(&mut mirror, &mut space), []);
    mirror.finish(&mut space);
}

#[test]
fn a_mapping_replaced_in_the_freeze_is_taken_whole() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    trial.tell(&format!("unmap {} 32", at(0)));
    trial.tell(&format!("map {} 32 rw", at(0)));
    trial.tell(&format!("fill {} 4 3", at(8)));
    let last = mirror.finish(&mut space);
    assert_eq!(
        (ours(&last.dirty), ours(&last.live)),
        (vec![(8, 4)], vec![(8, 4)])
    );
}

#[test]
fn moved_memory_is_dirty_where_it_went() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    trial.tell(&format!("remap {} 16 {}", at(0), at(100)));
    assert_eq!(dirty(&mut mirror, &mut space), [(100, 16)]);
    trial.tell(&format!("fill {} 1 4", at(103)));
    assert_eq!(dirty(&mut mirror, &mut space), [(103, 1)]);
    assert_eq!(ours(&mirror.finish(&mut space).live), [(16, 16), (100, 16)]);
}

#[test]
fn memory_may_come_and_go_between_rounds() {
    let (mut trial, mut space, mut mirror) = tracked(8);
    for step in 1..6 {
        let place = 100 * step;
        trial.tell(&format!("map {} 50 rw", at(place)));
        trial.tell(&format!("fill {} 50 random", at(place)));
        if 1 < step {
            trial.tell(&format!("unmap {} 25", at(place - 100)));
        }
        assert_eq!(dirty(&mut mirror, &mut space), [(place, 50)]);
    }
    let live = ours(&mirror.finish(&mut space).live);
    assert_eq!(
        live,
        [
            (0, 8),
            (125, 25),
            (225, 25),
            (325, 25),
            (425, 25),
            (500, 50)
        ]
    );
}

#[test]
fn memory_that_grows_beside_tracked_memory_is_found() {
    let (mut trial, mut space, mut mirror) = tracked(8);
    for step in 1..5 {
        trial.tell(&format!("map {} 8 rw", at(8 * step)));
        trial.tell(&format!("fill {} 8 random", at(8 * step)));
        assert_eq!(dirty(&mut mirror, &mut space), [(8 * step, 8)]);
    }
    trial.tell(&format!("fill {} 1 1", at(7)));
    trial.tell(&format!("fill {} 1 1", at(33)));
    assert_eq!(dirty(&mut mirror, &mut space), [(7, 1), (33, 1)]);
    assert_eq!(ours(&mirror.finish(&mut space).live), [(0, 40)]);
}

#[test]
fn huge_pages_are_followed_page_by_page() {
    let mut trial = start();
    trial.tell(&format!("map {} 2048 rw", at(0)));
    trial.tell(&format!("advise {} 2048 hugepage", at(0)));
    trial.tell(&format!("fill {} 2048 random", at(0)));
    let mut space = attach(&trial);
    let mut mirror = Mirror::default();
    assert_eq!(dirty(&mut mirror, &mut space), [(0, 2048)]);
    trial.tell(&format!("fill {} 1 1", at(600)));
    assert_eq!(dirty(&mut mirror, &mut space), [(600, 1)]);
    assert_eq!(ours(&mirror.finish(&mut space).live), [(0, 2048)]);
}

/// On a machine without swap the memory stays where it is, and the test says less.
#[test]
fn memory_in_swap_is_live_clean_and_read() {
    let (mut trial, mut space, mut mirror) = tracked(64);
    trial.tell(&format!("advise {} 32 pageout", at(16)));
    assert_eq!(dirty(&mut mirror, &mut space), []);
    trial.tell(&format!("advise {} 64 pageout", at(0)));
    let last = mirror.finish(&mut space);
    assert_eq!(
        (ours(&last.dirty), ours(&last.live)),
        (vec![], vec![(0, 64)])
    );
    trial.tell(&format!("fill {} 1 9", at(20)));
    trial.tell(&format!("advise {} 64 pageout", at(0)));
    assert_eq!(dirty(&mut mirror, &mut space), [(20, 1)]);
    mirror.finish(&mut space);
}

#[test]
fn a_fork_disturbs_nothing_and_the_child_is_a_space_of_its_own() {
    let (mut trial, mut space, mut mirror) = tracked(32);
    let child: i32 = trial.tell("fork").parse().unwrap();
    trial.tell(&format!("fill {} 2 5", at(4)));
    assert_eq!(dirty(&mut mirror, &mut space), [(4, 2)]);
    let mut child_space = Space::attach(child, &options()).unwrap();
    let mut child_mirror = Mirror::default();
    assert_eq!(dirty(&mut child_mirror, &mut child_space), [(0, 32)]);
    trial.tell(&format!("fill {} 1 6", at(9)));
    mirror.finish(&mut space);
    let last = child_mirror.finish(&mut child_space);
    assert_eq!(ours(&last.live), [(0, 32)]);
    drop(child_space);
    trial::kill(child);
}

#[test]
fn another_program_makes_the_space_void() {
    let (mut trial, mut space, _) = tracked(8);
    assert_eq!(trial.tell("exec"), "ready");
    assert!(matches!(space.scan(), Err(TrackError::Exec { .. })));
    assert!(matches!(space.final_scan(), Err(TrackError::Exec { .. })));
    drop(space);
    let mut space = attach(&trial);
    Mirror::default().round(&mut space);
}

#[test]
fn another_program_is_noticed_though_its_old_memory_lives_on() {
    let mut trial = start();
    let answer = trial.tell("clone-vm");
    let (sharer, pipe) = answer.split_once(' ').unwrap();
    let sharer: i32 = sharer.parse().unwrap();
    let mut space = Space::attach(sharer, &options()).unwrap();
    space.scan().unwrap();
    trial.tell(&format!("poke {pipe}"));
    let executable = || std::fs::read_link(format!("/proc/{sharer}/exe")).unwrap();
    eventually("the exec", || {
        executable() != std::env::current_exe().unwrap()
    });
    assert!(matches!(space.scan(), Err(TrackError::Exec { .. })));
    trial::kill(sharer);
}

#[test]
fn the_end_of_the_process_is_told() {
    let (trial, mut space, _) = tracked(8);
    drop(trial);
    assert!(matches!(space.scan(), Err(TrackError::Gone { .. })));
    assert!(matches!(space.final_scan(), Err(TrackError::Gone { .. })));
}

#[test]
fn executable_memory_is_eager_and_its_writes_wait() {
    let (mut trial, mut space, mut mirror) = tracked(16);
    trial.tell(&format!("fill {} 1 5", at(4)));
    trial.tell(&format!("protect {} 16 rx", at(0)));
    let scan = mirror.round(&mut space);
    assert_eq!(ours(&scan.dirty), []);
    assert!(16 * 4096 <= scan.eager.private_bytes);
    let last = space.final_scan().unwrap();
    assert_eq!(ours(&last.live), []);
    assert!(16 * 4096 <= last.eager.private_bytes);
    assert!(
        !last
            .hidden
            .iter()
            .any(|(start, end)| *start <= BASE && BASE < *end)
    );
    trial.tell(&format!("protect {} 16 rw", at(0)));
    assert_eq!(dirty(&mut mirror, &mut space), [(4, 1)]);
    mirror.finish(&mut space);
}

#[test]
fn what_could_not_be_read_stays_dirty_while_it_is_executable() {
    let (mut trial, mut space, mut mirror) = tracked(16);
    space.put_back(&PageSet::from(run(3, 1)));
    trial.tell(&format!("protect {} 16 rx", at(0)));
    assert_eq!(dirty(&mut mirror, &mut space), []);
    trial.tell(&format!("protect {} 16 rw", at(0)));
    assert_eq!(dirty(&mut mirror, &mut space), [(3, 1)]);
    assert_eq!(dirty(&mut mirror, &mut space), []);
}

#[test]
fn locked_and_shared_memory_is_left_to_criu() {
    let (mut trial, mut space, mut mirror) = tracked(16);
    trial.tell(&format!("map {} 32 shared", at(100)));
    trial.tell(&format!("fill {} 32 5", at(100)));
    trial.tell(&format!("lock {} 4", at(4)));
    mirror.round(&mut space);
    space.record_smaps().unwrap();
    let forecast = mirror.round(&mut space).eager;
    let last = mirror.finish(&mut space);
    assert_eq!(ours(&last.live), [(0, 4), (8, 8)]);
    for eager in [&forecast, &last.eager] {
        let shared: Vec<u64> = eager.shared.iter().map(|object| object.bytes).collect();
        assert_eq!(shared, [32 * 4096]);
        assert!(4 * 4096 <= eager.private_bytes && eager.private_bytes < 1 << 22);
    }
    let mut both = last.eager.clone();
    both.merge(forecast);
    assert_eq!(both.shared.len(), 1);
}

#[test]
fn little_memory_born_in_the_freeze_is_taken_and_much_is_not() {
    let (mut trial, mut space, mut mirror) = tracked(4);
    space.record_smaps().unwrap();
    trial.tell(&format!("map {} 64 rw", at(100)));
    trial.tell(&format!("fill {} 64 random", at(100)));
    let last = mirror.finish(&mut space);
    assert_eq!(ours(&last.dirty), [(100, 64)]);
    trial.tell(&format!("map {} 5000 rw", at(1000)));
    trial.tell(&format!("fill {} 5000 1", at(1000)));
    let error = space.final_scan().unwrap_err();
    assert!(matches!(error, TrackError::LateBirth { bytes, .. } if 5000 * 4096 <= bytes));
    assert_eq!(dirty(&mut mirror, &mut space), [(100, 64), (1000, 5000)]);
    mirror.finish(&mut space);
}

#[test]
fn a_lock_after_the_record_is_found_by_the_comparison() {
    let (mut trial, mut space, mut mirror) = tracked(16);
    // What the kernel's flags mean is believed when it was met twice.
    space.record_smaps().unwrap();
    space.record_smaps().unwrap();
    assert!(mirror.finish(&mut space).smaps_rendered);
    space.shown_smaps().unwrap().compare().unwrap();
    let asked = space.support.flags.is_some();
    assert_eq!(space.shown_smaps().unwrap().is_confirmed(), asked);
    trial.tell(&format!("lock {} 4", at(4)));
    mirror.finish(&mut space);
    assert!(!space.shown_smaps().unwrap().is_confirmed());
    assert!(matches!(
        space.shown_smaps().unwrap().compare(),
        Err(TrackError::SmapsChanged { .. })
    ));
}

#[test]
fn a_walk_that_meets_the_end_of_the_process_tells_of_it() {
    let (trial, space, _) = tracked(4);
    let pid = trial.pid();
    let pagemap = Pagemap::open(pid).unwrap();
    // A zombie: without memory, and a process still.
    trial::signal(pid, libc::SIGKILL);
    eventually("the end", || task::has_ended(pid));
    let range = BASE..BASE + 4 * 4096;
    let walked = walk_all(&pagemap, false, &[range], Look::Protect);
    // Kernels differ: some refuse, others find nothing, and the scan asks for the end itself.
    let error = match walked.broken.into_iter().next() {
        Some(broken) => space.scanning(broken),
        None => {
            let (live, written) = walked.found.into_sets();
            assert!(live.is_empty() && written.is_empty());
            space.check_alive().unwrap_err()
        }
    };
    assert!(error.tells_of_end(), "{error}");
}
