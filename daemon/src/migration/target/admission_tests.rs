use super::*;

const MIB: u64 = 1 << 20;

fn needs(private_mib: u64, shared_mib: u64) -> Needs {
    Needs {
        private_bytes: private_mib * MIB,
        shared_bytes: shared_mib * MIB,
        ..Needs::default()
    }
}

fn room(limit: &str, mib: u64) -> Room {
    Room {
        limit: limit.to_owned(),
        bytes: mib * MIB,
    }
}

#[test]
fn the_peak_is_what_was_measured() {
    // Of private and shared memory, in MiB, and with `--verify`.
    for (private, shared, verify, peak_mib) in [
        (0, 0, false, 71),
        (1024, 0, false, 1097),
        (4096, 0, false, 4175),
        (1024, 0, true, 1101),
        (0, 100, false, 271),
        (1024, 100, true, 1301),
    ] {
        let peak = peak(&needs(private, shared), verify);
        assert_eq!(peak, peak_mib * MIB, "{private} {shared} {verify}");
    }
    let endless = Needs {
        private_bytes: u64::MAX,
        shared_bytes: u64::MAX,
        ..Needs::default()
    };
    assert_eq!(peak(&endless, true), u64::MAX);
}

#[test]
fn the_tightest_limit_decides_beside_what_is_promised() {
    let node = || room("node", 1000);
    let unit = || room("unit", 300);
    // Needed, limits, promised, all in MiB, and whose limit refuses.
    for (needed, rooms, promised, refused) in [
        (1000, vec![node()], 0, None),
        (1001, vec![node()], 0, Some("node")),
        (1000, vec![node()], 1, Some("node")),
        (900, vec![node()], 100, None),
        (1, vec![node()], 2000, Some("node")),
        (301, vec![node(), unit()], 0, Some("unit")),
        (200, vec![unit(), node()], 101, Some("unit")),
        (200, vec![unit(), node()], 100, None),
        (0, vec![node()], 2000, None),
        (5000, vec![], 0, None),
    ] {
        let admitted = admit(needed * MIB, &rooms, promised * MIB);
        match (admitted, refused) {
            (Ok(()), None) => {}
            (Err(failure), Some(limit)) => {
                assert_eq!(failure.code(), ErrorCode::MemoryShort);
                let named = format!(" of {limit}, of which ");
                assert!(failure.text().contains(&named), "{failure}");
            }
            (admitted, refused) => panic!("{needed} {promised}: {admitted:?}, not {refused:?}"),
        }
    }
}

#[test]
fn a_refusal_says_both_numbers_with_units() {
    let rooms = [room("MemAvailable of the node", 2000)];
    let failure = admit(1097 * MIB, &rooms, 1500 * MIB).unwrap_err();
    assert_eq!(
        failure.text(),
        "the workload may need 1097.0 MiB of memory at the target, and 500.0 MiB are available: \
         2000.0 MiB of MemAvailable of the node, of which 1500.0 MiB are promised to other \
         migrations"
    );
}

/// A node of so many MiB, of which what is taken is not left.
fn ledger(mib: u64) -> (Ledger, Arc<AtomicU64>) {
    let taken = Arc::new(AtomicU64::new(0));
    let pages = Arc::clone(&taken);
    let rooms = move || {
        let left = mib * MIB - PageCount(pages.load(Ordering::Relaxed)).bytes();
        let limit = "node".to_owned();
        Ok(vec![Room { limit, bytes: left }])
    };
    (Ledger::new(rooms), taken)
}

fn none() -> Arc<AtomicU64> {
    Arc::default()
}

#[test]
fn what_one_was_promised_another_is_not_until_the_first_is_gone() {
    let (ledger, _) = ledger(2000);
    let first = ledger.promise(&needs(1024, 0), false, none()).unwrap();
    let second = ledger.promise(&needs(1024, 0), false, none());
    assert_eq!(second.unwrap_err().code(), ErrorCode::MemoryShort);
    let small = ledger.promise(&needs(512, 0), false, none()).unwrap();
    drop(first);
    ledger.promise(&needs(1024, 0), false, none()).unwrap();
    drop(small);
}

#[test]
fn what_is_taken_of_a_promise_counts_once() {
    let (ledger, taken) = ledger(2200);
    let first = ledger.promise(&needs(1024, 0), false, Arc::clone(&taken));
    for mib in [0, 512, 1024] {
        taken.store(mib * MIB / 4096, Ordering::Relaxed);
        let second = ledger.promise(&needs(1024, 0), false, none());
        second.unwrap_or_else(|failure| panic!("with {mib} MiB taken: {failure}"));
        let third = ledger.promise(&needs(1040, 0), false, none());
        assert!(third.is_err(), "with {mib} MiB taken");
    }
    drop(first);
}

#[test]
fn what_was_admitted_has_room_for_its_images() {
    // As much as the workload needs, and not a page more.
    let (ledger, taken) = ledger(172);
    let promise = ledger.promise(&needs(100, 0), false, Arc::clone(&taken));
    let promise = promise.unwrap();
    let with_images = PageCount(110 * MIB / 4096);
    taken.store(with_images.0, Ordering::Relaxed);
    assert!(promise.grow(with_images).unwrap() >= with_images);
}

#[test]
fn a_workload_that_grows_does_not_compete_with_itself() {
    let (ledger, taken) = ledger(220);
    let promise = ledger.promise(&needs(100, 0), false, Arc::clone(&taken));
    let promise = promise.unwrap();
    // 87 MiB are left, and it asks for 65; of its own promise 38 are not taken as pages.
    let held = PageCount(133 * MIB / 4096);
    taken.store(held.0, Ordering::Relaxed);
    assert!(promise.grow(held).unwrap() >= held);
}

#[test]
fn a_workload_that_grows_is_promised_more_until_there_is_no_more() {
    let (ledger, taken) = ledger(380);
    let promise = ledger.promise(&needs(100, 0), false, Arc::clone(&taken));
    let promise = promise.unwrap();
    let pages = |mib: u64| PageCount(mib * MIB / 4096);
    assert_eq!(promise.pages(), pages(132));
    assert_eq!(promise.grow(pages(132)).unwrap(), pages(132));
    taken.store(pages(133).0, Ordering::Relaxed);
    assert_eq!(promise.grow(pages(133)).unwrap(), pages(197));
    // What another was promised meanwhile is not to be had.
    let other = ledger.promise(&needs(50, 0), false, none()).unwrap();
    taken.store(pages(198).0, Ordering::Relaxed);
    let failure = promise.grow(pages(198)).unwrap_err();
    assert_eq!(failure.code(), ErrorCode::MemoryShort);
    assert_eq!(promise.pages(), pages(197));
    drop(other);
    promise.grow(pages(198)).unwrap();
}
