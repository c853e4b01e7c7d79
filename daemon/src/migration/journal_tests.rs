use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const ID: MigrationId = MigrationId::new([7; 16]);

fn folder() -> (TempDir, Journals) {
    let folder = tempfile::tempdir().unwrap();
    let journals = Journals::open(&folder.path().join("journal")).unwrap();
    (folder, journals)
}

fn records_of(journals: &Journals) -> Vec<Vec<u8>> {
    journals.read(ID).unwrap().records
}

#[test]
fn a_new_journal_is_there_and_empty() {
    let (_folder, journals) = folder();
    journals.create(ID).unwrap();
    assert_eq!(records_of(&journals), Vec::<Vec<u8>>::new());
}

#[test]
fn a_journal_is_made_once() {
    let (_folder, journals) = folder();
    journals.create(ID).unwrap().append(b"first").unwrap();
    let again = journals.create(ID).unwrap_err();
    assert!(matches!(again, JournalError::Create { .. }), "{again}");
    assert_eq!(records_of(&journals), [b"first"]);
}

#[test]
fn records_come_back_in_order_and_appending_goes_on_after_them() {
    let (_folder, journals) = folder();
    let mut journal = journals.create(ID).unwrap();
    journal.append(b"one").unwrap();
    journal.append(&[0; 100]).unwrap();
    drop(journal);
    let mut recovered = journals.read(ID).unwrap();
    recovered.journal.append(b"three").unwrap();
    let records = records_of(&journals);
    assert_eq!(records, [&b"one"[..], &[0; 100], b"three"]);
}

#[test]
fn a_journal_grows_beyond_what_was_preallocated() {
    let (_folder, journals) = folder();
    let mut journal = journals.create(ID).unwrap();
    let record = vec![5; GROWTH_BYTES - 100];
    for _ in 0..5 {
        journal.append(&record).unwrap();
    }
    assert_eq!(records_of(&journals), vec![record; 5]);
}

#[test]
fn records_that_are_empty_or_too_large_are_refused_and_nothing_is_written() {
    let (_folder, journals) = folder();
    let mut journal = journals.create(ID).unwrap();
    for record in [vec![], vec![1; RECORD_BYTES_MAX + 1]] {
        let error = journal.append(&record).unwrap_err();
        assert!(matches!(error, JournalError::Oversize { .. }), "{error}");
    }
    journal.append(b"still usable").unwrap();
    assert_eq!(records_of(&journals), [b"still usable"]);
}

#[test]
fn a_full_journal_says_so() {
    let (_folder, journals) = folder();
    let mut journal = journals.create(ID).unwrap();
    let record = vec![1; RECORD_BYTES_MAX];
    let full = std::iter::repeat_with(|| journal.append(&record)).find_map(Result::err);
    assert!(matches!(full, Some(JournalError::Oversize { .. })));
    assert_eq!(records_of(&journals).len(), 7);
}

#[test]
fn a_second_daemon_is_kept_out() {
    let (folder, _journals) = folder();
    let second = Journals::open(&folder.path().join("journal")).unwrap_err();
    assert!(matches!(second, JournalError::InUse { .. }), "{second}");
}

#[test]
fn one_bad_journal_does_not_hide_the_others() {
    let (folder, journals) = folder();
    let other = MigrationId::new([8; 16]);
    journals.create(ID).unwrap().append(b"good").unwrap();
    fs::write(
        folder.path().join(format!("journal/{other}.journal")),
        b"short",
    )
    .unwrap();
    let mut found = journals.scan().unwrap();
    found.sort_by_key(|found| found.migration);
    let [good, bad] = found.try_into().unwrap();
    assert_eq!(good.migration, ID);
    assert_eq!(good.contents.unwrap().records, [b"good"]);
    assert_eq!(bad.migration, other);
    let error = bad.contents.unwrap_err();
    assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
}

#[test]
fn a_journal_under_another_name_is_foreign() {
    let (folder, journals) = folder();
    journals.create(ID).unwrap();
    let other = MigrationId::new([8; 16]);
    let named = |id| folder.path().join(format!("journal/{id}.journal"));
    fs::rename(named(ID), named(other)).unwrap();
    let error = journals.read(other).unwrap_err();
    assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
}

#[test]
fn what_a_crash_left_half_made_is_cleared_away() {
    let (folder, journals) = folder();
    drop(journals);
    let left = folder
        .path()
        .join(format!("journal/{ID}{TEMPORARY_SUFFIX}"));
    fs::write(&left, b"half").unwrap();
    let journals = Journals::open(&folder.path().join("journal")).unwrap();
    assert!(!left.exists());
    journals.create(ID).unwrap();
}

#[test]
fn expiry_keeps_the_newest_and_touches_nothing_unfinished() {
    let (folder, journals) = folder();
    let ids: Vec<_> = (0..=u8::try_from(FINISHED_MAX).unwrap())
        .map(|n| MigrationId::new([n; 16]))
        .collect();
    for (age, &id) in ids.iter().rev().enumerate() {
        journals.create(id).unwrap();
        let then = SystemTime::now() - std::time::Duration::from_secs(age as u64);
        File::open(folder.path().join(format!("journal/{id}.journal")))
            .unwrap()
            .set_modified(then)
            .unwrap();
    }
    assert_eq!(journals.surplus(&ids[1..]).unwrap(), []);
    assert_eq!(journals.surplus(&ids).unwrap(), [ids[0]]);
}

/// A disk whose writes or syncs fail when told to, and that keeps only a part of such a write.
struct Failing {
    disk: Box<dyn Disk>,
    syncs_to_fail: Arc<AtomicUsize>,
    kept_bytes: usize,
}

impl Disk for Failing {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let failing = self.syncs_to_fail.load(Ordering::Relaxed) > 0;
        let kept = if failing {
            self.kept_bytes
        } else {
            bytes.len()
        };
        self.disk.write_at(&bytes[..kept.min(bytes.len())], offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        let count = |n: usize| n.checked_sub(1);
        if self
            .syncs_to_fail
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count)
            .is_ok()
        {
            return Err(io::Error::other("injected"));
        }
        self.disk.sync()
    }
}

#[test]
fn a_record_in_doubt_is_settled_by_the_next_append() {
    for kept_bytes in [0, 5, 12, usize::MAX] {
        let (_folder, journals) = folder();
        let failures = Arc::new(AtomicUsize::new(0));
        let syncs_to_fail = Arc::clone(&failures);
        let mut journal = journals.create(ID).unwrap().on(|disk| {
            Box::new(Failing {
                disk,
                syncs_to_fail,
                kept_bytes,
            })
        });
        journal.append(b"offered").unwrap();
        failures.store(2, Ordering::Relaxed);
        for _ in 0..2 {
            // The second one fails while it settles the first.
            let error = journal.append(b"commit").unwrap_err();
            assert!(matches!(error, JournalError::Append { .. }), "{error}");
        }
        journal.append(b"aborted").unwrap();
        let records = records_of(&journals);
        assert_eq!(records, [&b"offered"[..], b"commit", b"aborted"]);
    }
}

/// Records whose bytes have every kind of zero in them, where a lost sector looks like a pause.
fn any_records() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let record = prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..1500);
    prop::collection::vec(record, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_while_appending_loses_at_most_that_record(
        records in any_records(),
        lost_sectors in any::<u8>(),
    ) {
        let (folder, journals) = folder();
        let mut journal = journals.create(ID).unwrap();
        let path = folder.path().join(format!("journal/{ID}.journal"));
        for record in &records[..records.len() - 1] {
            journal.append(record).unwrap();
        }
        let before = fs::read(&path).unwrap();
        journal.append(&records[records.len() - 1]).unwrap();
        drop(journal);
        // The disk got some sectors of the last append and not others.
        let mut torn = fs::read(&path).unwrap();
        let sectors = torn.chunks_mut(512).zip(before.chunks(512));
        let changed = sectors.filter(|(after, before)| after != before);
        for (n, (after, before)) in changed.enumerate() {
            if lost_sectors >> (n % 8) & 1 == 1 {
                after.copy_from_slice(before);
            }
        }
        fs::write(&path, torn).unwrap();

        let recovered = journals.read(ID).unwrap();
        let whole = recovered.records == records;
        prop_assert!(whole || recovered.records == records[..records.len() - 1]);
        prop_assert!(whole || lost_sectors != 0);
        // And the journal goes on from there.
        let mut journal = recovered.journal;
        journal.append(b"after the crash").unwrap();
        let read = records_of(&journals);
        prop_assert_eq!(read.last().unwrap(), b"after the crash");
    }

    #[test]
    fn damage_before_the_last_record_is_never_taken_for_a_crash(
        records in any_records(),
        at in any::<prop::sample::Index>(),
        flip in 1..=255u8,
    ) {
        prop_assume!(records.len() > 1);
        let (folder, journals) = folder();
        let mut journal = journals.create(ID).unwrap();
        for record in &records {
            journal.append(record).unwrap();
        }
        drop(journal);
        let path = folder.path().join(format!("journal/{ID}.journal"));
        let mut bytes = fs::read(&path).unwrap();
        let (last, earlier) = records.split_last().unwrap();
        let earlier: usize = earlier.iter().map(|record| framed_bytes(record.len())).sum();
        let damaged = HEADER_BYTES + at.index(earlier);
        bytes[damaged] ^= flip;
        fs::write(&path, &bytes).unwrap();
        match journals.read(ID) {
            Err(JournalError::Corrupt { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
            // The padding between records holds nothing.
            Ok(recovered) => prop_assert_eq!(&recovered.records, &records, "{:?}", last),
        }
    }
}
