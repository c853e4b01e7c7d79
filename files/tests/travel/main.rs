//! Folders travel, on real file systems: whatever a program does to one between two differences,
//! what the target has afterwards is the same, entry by entry.

mod compare;
mod mutate;
mod stand_in;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use compare::assert_same;
use mutate::{Mutation, mutate, mutations};
use pageferry_files::{
    Digest, Error, ErrorKind, Keep, Key, Placed, Record, Report, Source, Staging, Suspects,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Two nodes: a folder, and where it comes to.
struct Nodes {
    root: tempfile::TempDir,
}

impl Nodes {
    fn at(parent: &str) -> Self {
        let root = tempfile::tempdir_in(parent).expect("a folder");
        for name in ["a", "b", "a-state", "b-state"] {
            fs::create_dir(root.path().join(name)).expect("a folder");
        }
        fs::create_dir(root.path().join("a/data")).expect("a folder");
        Self { root }
    }

    fn here(&self) -> PathBuf {
        self.root.path().join("a/data")
    }

    fn there(&self) -> PathBuf {
        self.root.path().join("b/data")
    }

    fn keep(&self, node: &str) -> Keep {
        Keep::new(self.root.path().join(format!("{node}-state")))
    }

    fn staging(&self) -> Staging {
        let place = Keep::place(&self.there(), "m", 0);
        stage(&self.keep("b"), &self.there(), &place, None).expect("a staging")
    }
}

fn stage(keep: &Keep, path: &Path, place: &Path, base: Option<Digest>) -> Result<Staging, Error> {
    let inode = keep.claim(path, place, base.is_some())?;
    let staging = Staging::open(place, base)?;
    let (device, number, _) = inode;
    assert_eq!(staging.inode()?, (device, number));
    Ok(staging)
}

/// Sends one difference.
fn send(
    source: &mut Source,
    staging: &mut Staging,
    suspects: &Suspects,
    frozen: bool,
) -> Result<Report, Error> {
    let mut frames = Vec::new();
    let report = source.difference(suspects, frozen, &mut |frame| {
        frames.push(frame);
        Ok(())
    })?;
    apply(staging, &frames)?;
    assert_eq!(staging.proven(), Some(report.digest));
    Ok(report)
}

fn apply(staging: &mut Staging, frames: &[Vec<u8>]) -> Result<(), Error> {
    for frame in frames {
        let (header, operations) = frame.split_first_chunk().expect("a header");
        let (length, checksum) = Staging::frame(*header)?;
        assert_eq!(length, operations.len());
        staging.apply(operations, checksum)?;
    }
    Ok(())
}

fn key(path: &Path) -> Key {
    let metadata = fs::metadata(path).expect("a file");
    let device = metadata.dev();
    Key {
        device: (rustix::fs::major(device), rustix::fs::minor(device)),
        inode: metadata.ino(),
    }
}

/// A file system that marks stores through mappings, and one that does not.
const FILE_SYSTEMS: [&str; 2] = [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"];

#[test]
fn whatever_happens_between_differences_the_folders_are_the_same() {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let config = Config {
        cases: cases.unwrap_or(30),
        failure_persistence: None,
        ..Config::default()
    };
    let rounds = proptest::collection::vec(mutations(), 1..5);
    for parent in FILE_SYSTEMS {
        TestRunner::new(config.clone())
            .run(&rounds, |rounds| {
                moves(parent, &rounds);
                Ok(())
            })
            .expect("they are the same");
    }
}

/// Sends after each round, and compares.
fn moves(parent: &str, rounds: &[Vec<Mutation>]) {
    let nodes = Nodes::at(parent);
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    for round in rounds {
        let mappings = mutate(&nodes.here(), round);
        send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
        assert_same(&nodes.here(), &staging.tree_path());
        drop(mappings);
    }
}

#[test]
fn a_store_that_changes_no_time_is_found_in_a_file_that_is_suspect() {
    for parent in FILE_SYSTEMS {
        // Whoever syncs the file system meanwhile has the next store noted.
        let found = (0..50).find(|_| finds_a_store(parent));
        assert!(found.is_some(), "{parent} is always being synced");
    }
}

/// Answers whether the second store changed no time.
fn finds_a_store(parent: &str) -> bool {
    let (nodes, elsewhere) = (Nodes::at(parent), Nodes::at("/dev/shm"));
    let path = nodes.here().join("mapped");
    fs::write(&path, vec![1; 300_000]).expect("a file");
    let file = fs::File::options().read(true).write(true).open(&path);
    let file = file.expect("a file");
    let mut mapping = pageferry_trial::shared_mapping::writable(&file);
    mapping[5] = 2;
    // Older than the ticks of any clock.
    std::thread::sleep(std::time::Duration::from_millis(150));
    let suspects = Suspects::look(|| Some(HashSet::from([key(&path)])));
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = elsewhere.staging();
    send(&mut source, &mut staging, &suspects, false).expect("a difference");
    let before = fs::metadata(&path).expect("a file");
    mapping[6] = 3;
    let after = fs::metadata(&path).expect("a file");
    // It is mapped no more, and was at the last look.
    drop((mapping, file));
    let report = send(&mut source, &mut staging, &Suspects::default(), true);
    let report = report.expect("a difference");
    assert_same(&nodes.here(), &staging.tree_path());
    assert!(report.bytes < 40_000, "{report:?}");
    (before.ctime(), before.ctime_nsec()) == (after.ctime(), after.ctime_nsec())
}

#[test]
fn what_has_not_changed_is_neither_read_nor_sent() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    for number in 0..100 {
        fs::write(nodes.here().join(number.to_string()), vec![7; 10_000]).expect("a file");
    }
    std::thread::sleep(std::time::Duration::from_millis(150));
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    let none = Suspects::default();
    let first = send(&mut source, &mut staging, &none, false).expect("a difference");
    assert_eq!(first.compared, 100);
    assert!(1_000_000 < first.bytes);
    let second = send(&mut source, &mut staging, &none, true).expect("a difference");
    assert_eq!((second.compared, second.read), (0, 0));
    assert!(second.bytes < 100, "{second:?}");
    // A name that goes to another folder takes no bytes along.
    fs::create_dir(nodes.here().join("folder")).expect("a folder");
    fs::rename(nodes.here().join("5"), nodes.here().join("folder/five")).expect("a name");
    fs::hard_link(nodes.here().join("6"), nodes.here().join("folder/six")).expect("a name");
    let third = send(&mut source, &mut staging, &none, true).expect("a difference");
    assert_same(&nodes.here(), &staging.tree_path());
    assert!(third.bytes < 2000, "{third:?}");
}

#[test]
fn a_folder_that_is_another_by_the_same_name_is_looked_at() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let (folder, aside) = (nodes.here().join("folder"), nodes.here().join("aside"));
    let (mut source, mut staging) = (
        Source::open(&nodes.here(), None).expect("a source"),
        nodes.staging(),
    );
    for number in 0..3 {
        drop(fs::rename(&folder, &aside));
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("file"), "bytes").expect("a file");
        let name = format!("user.number{number}");
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(folder.join("file"), name, b"1", flags).expect("an attribute");
        let sent = send(&mut source, &mut staging, &Suspects::default(), true);
        sent.expect("a difference");
        assert_same(&nodes.here(), &staging.tree_path());
        drop(fs::remove_dir_all(&aside));
    }
}

#[test]
fn what_may_be_stored_to_since_the_look_is_compared_again() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let path = nodes.here().join("file");
    fs::write(&path, "one").expect("a file");
    fs::write(nodes.here().join("other"), "one").expect("a file");
    let pause = || std::thread::sleep(std::time::Duration::from_millis(250));
    pause();
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    let mut compared = |suspects: &Suspects, after: Option<&Suspects>| {
        let report = send(&mut source, &mut staging, suspects, false).expect("a difference");
        after.into_iter().for_each(|after| source.doubt(after));
        report.compared
    };
    let early = Suspects::default();
    pause();
    fs::write(&path, "two").expect("written");
    pause();
    // It has been opened, written and perhaps kept since the look, however long ago that is.
    assert_eq!(compared(&early, None), 2);
    assert_eq!(compared(&early, None), 1);
    assert_eq!(compared(&Suspects::default(), None), 1);
    assert_eq!(compared(&Suspects::default(), None), 0);
    // One that was found only after a difference, and where nobody could tell.
    let later = Suspects::look(|| Some(HashSet::from([key(&path)])));
    assert_eq!(compared(&Suspects::default(), Some(&later)), 0);
    assert_eq!(compared(&Suspects::default(), None), 1);
    assert_eq!(compared(&Suspects::look(|| None), None), 2);
}

#[test]
fn a_sparse_file_costs_what_it_holds() {
    use std::os::unix::fs::FileExt;
    for parent in FILE_SYSTEMS {
        let nodes = Nodes::at(parent);
        let path = nodes.here().join("sparse");
        let file = fs::File::create(&path).expect("a file");
        file.set_len(50 << 30).expect("a length");
        for place in [0, 7 << 30, (50 << 30) - 3] {
            file.write_all_at(b"abc", place).expect("some bytes");
        }
        let mut source = Source::open(&nodes.here(), None).expect("a source");
        let mut staging = nodes.staging();
        let report = send(&mut source, &mut staging, &Suspects::default(), true);
        let report = report.expect("a difference");
        assert!(report.bytes < 20_000, "{report:?}");
        let there = staging.tree_path().join("sparse");
        let (here, there) = (fs::metadata(path), fs::metadata(there));
        let (here, there) = (here.expect("a file"), there.expect("a file"));
        assert_eq!(here.len(), there.len());
        assert!(
            there.blocks() <= here.blocks() + 16,
            "{} {}",
            there.blocks(),
            here.blocks()
        );
    }
}

#[test]
fn what_comes_is_put_and_a_way_back_costs_what_has_changed() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let (a, b) = (nodes.keep("a"), nodes.keep("b"));
    for number in 0..50 {
        fs::write(nodes.here().join(number.to_string()), vec![7; 50_000]).expect("a file");
    }
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    let none = Suspects::default();
    let there = send(&mut source, &mut staging, &none, true).expect("a difference");
    let placed = put(&mut staging, &nodes.there());
    b.remember(&nodes.there(), &staging.record())
        .expect("a record");
    Keep::settle(&placed).expect("settled");
    assert_same(&nodes.here(), &nodes.there());
    a.set_aside(&nodes.here(), &there.digest)
        .expect("set aside");
    assert!(!nodes.here().exists());
    // The other way: what the record says is what the first node has.
    fs::write(nodes.there().join("7"), b"changed").expect("a file");
    fs::rename(nodes.there().join("8"), nodes.there().join("eight")).expect("a name");
    let record = b.recall(&nodes.there()).expect("a record");
    assert!(a.has(&nodes.here(), &record.digest()).is_some());
    assert!(b.has(&nodes.there(), &record.digest()).is_none());
    let place = Keep::place(&nodes.here(), "n", 0);
    let base = Some(record.digest());
    let mut staging = stage(&a, &nodes.here(), &place, base).expect("a staging");
    let mut source = Source::open(&nodes.there(), Some(record)).expect("a source");
    let back = send(&mut source, &mut staging, &none, true).expect("a difference");
    assert_eq!(back.compared, 50);
    assert!(back.bytes < 2000, "{back:?}");
    let placed = put(&mut staging, &nodes.here());
    Keep::settle(&placed).expect("settled");
    assert_same(&nodes.there(), &nodes.here());
    assert!(
        !nodes
            .root
            .path()
            .join("a")
            .join(pageferry_files::HIDDEN)
            .exists()
    );
}

fn identity(staging: &Staging) -> pageferry_files::Identity {
    let tree = Keep::tree(staging.place());
    pageferry_files::identity_of(&tree).expect("an inode")
}

fn put(staging: &mut Staging, path: &Path) -> Placed {
    let placed = Placed {
        path: path.to_owned(),
        place: staging.place().to_owned(),
        inode: Some(identity(staging)),
        was_there: false,
        stand_in: None,
    };
    Keep::put(staging, &placed).expect("put");
    placed
}

#[test]
fn what_was_put_is_taken_back_and_what_another_has_put_is_not() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), b"bytes").expect("a file");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
    let placed = put(&mut staging, &nodes.there());
    assert!(nodes.there().join("file").exists());
    Keep::undo(&placed).expect("undone");
    assert!(!nodes.there().exists());
    fs::create_dir(nodes.there()).expect("another folder");
    fs::write(nodes.there().join("mine"), b"bytes").expect("a file");
    Keep::undo(&placed).expect("undone");
    assert!(nodes.there().join("mine").exists());
    let refused = pageferry_files::may_come(&nodes.there());
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Unfit));
    assert!(
        !nodes
            .root
            .path()
            .join("b")
            .join(pageferry_files::HIDDEN)
            .exists()
    );
}

#[test]
fn nothing_but_what_was_sent_is_proven() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), vec![5; 1000]).expect("a file");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut frames = Vec::new();
    let sent = source.difference(&Suspects::default(), true, &mut |frame| {
        frames.push(frame);
        Ok(())
    });
    sent.expect("a difference");
    // A bit on its way is noticed by the checksum.
    let mut damaged = frames.clone();
    damaged[0][100] ^= 1;
    let mut staging = nodes.staging();
    let refused = apply(&mut staging, &damaged).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Malformed));
    assert_eq!(staging.proven(), None);
    // One that both checksums miss, by the digest.
    let at = frames[0]
        .windows(100)
        .position(|bytes| bytes == [5; 100])
        .expect("the bytes");
    frames[0][at] = 6;
    let checksum = crc32fast::hash(&frames[0][8..]);
    frames[0][4..8].copy_from_slice(&checksum.to_le_bytes());
    drop(staging);
    pageferry_files::remove_all(&Keep::place(&nodes.there(), "m", 0)).expect("removed");
    let mut staging = nodes.staging();
    let refused = apply(&mut staging, &frames).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Differs));
    assert_eq!(staging.proven(), None);
    let placed = Placed {
        path: nodes.there(),
        place: staging.place().to_owned(),
        inode: None,
        was_there: false,
        stand_in: None,
    };
    assert!(Keep::put(&staging, &placed).is_err());
}

#[test]
fn a_kept_folder_that_somebody_has_changed_is_not_built_upon() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), b"bytes").expect("a file");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let none = Suspects::default();
    let report = source
        .difference(&none, true, &mut |_| Ok(()))
        .expect("a difference");
    let keep = nodes.keep("a");
    keep.set_aside(&nodes.here(), &report.digest)
        .expect("set aside");
    let hidden = nodes.root.path().join("a").join(pageferry_files::HIDDEN);
    let kept = fs::read_dir(&hidden)
        .expect("a folder")
        .next()
        .expect("an entry");
    fs::write(kept.expect("an entry").path().join("tree/file"), b"other").expect("a file");
    assert_eq!(keep.has(&nodes.here(), &report.digest), Some(report.totals));
    let place = Keep::place(&nodes.here(), "m", 0);
    let refused = stage(&keep, &nodes.here(), &place, Some(report.digest));
    assert_eq!(
        refused.map(drop).map_err(|error| error.kind()),
        Err(ErrorKind::Differs)
    );
    assert_eq!(keep.has(&nodes.here(), &report.digest), None);
}

#[test]
fn a_kept_folder_with_a_name_outside_of_it_is_not_built_upon() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let (here, other) = (nodes.here(), nodes.root.path().join("other"));
    fs::write(here.join("file"), "mine").expect("a file");
    fs::hard_link(here.join("file"), here.join("twin")).expect("a link");
    let mut source = Source::open(&here, None).expect("a source");
    let report = source.difference(&Suspects::default(), true, &mut |_| Ok(()));
    let digest = report.expect("a difference").digest;
    fs::hard_link(here.join("file"), &other).expect("a link");
    let keep = nodes.keep("a");
    keep.set_aside(&here, &digest).expect("aside");
    assert_eq!(keep.has(&here, &digest), None);
    // Whoever takes it in spite of that does not come to write.
    let place = Keep::place(&here, "m", 0);
    let staged = stage(&keep, &here, &place, Some(digest));
    assert_eq!(
        staged.map(drop).map_err(|error| error.kind()),
        Err(ErrorKind::Unfit)
    );
    fs::remove_file(&other).expect("removed");
    drop(fs::remove_dir(place.join("hold")));
    Staging::open(&place, Some(digest)).expect("a staging");
}

#[test]
fn what_is_kept_in_a_folder_does_not_travel_with_it() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let hidden = nodes.here().join("inner").join(pageferry_files::HIDDEN);
    fs::create_dir_all(&hidden).expect("a folder");
    let looked = Source::open(&nodes.here(), None).expect("a source").look();
    let refused = looked.expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::Unfit);
    assert!(
        refused.to_string().contains("inner/.pageferry-files"),
        "{refused}"
    );
    let come = |path: &Path| pageferry_files::may_come(path).map_err(|error| error.kind());
    assert_eq!(come(&hidden.join("a")), Err(ErrorKind::Unfit));
    assert_eq!(come(&hidden), Err(ErrorKind::Unfit));
    fs::remove_dir(&hidden).expect("removed");
    Source::open(&nodes.here(), None)
        .expect("a source")
        .look()
        .expect("nothing hidden");
}

#[test]
fn what_has_no_room_is_refused_before_anything_is_written() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let totals = |bytes| pageferry_files::Totals { entries: 1, bytes };
    let refused = pageferry_files::admit(&nodes.there(), &totals(1 << 60));
    assert_eq!(
        refused.map_err(|error| error.kind()),
        Err(ErrorKind::NoSpace)
    );
    pageferry_files::admit(&nodes.there(), &totals(1)).expect("room");
    let nowhere = nodes.root.path().join("nowhere/data");
    let refused = pageferry_files::may_come(&nowhere).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Unfit));
}

#[test]
fn links_are_copied_and_never_followed() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let outside = nodes.root.path().join("outside");
    fs::create_dir(&outside).expect("a folder");
    fs::write(outside.join("secret"), b"bytes").expect("a file");
    symlink(&outside, nodes.here().join("link")).expect("a link");
    symlink("/nowhere", nodes.here().join("dangling")).expect("a link");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
    assert_same(&nodes.here(), &staging.tree_path());
    assert!(
        fs::symlink_metadata(staging.tree_path().join("link"))
            .expect("it")
            .is_symlink()
    );
    // A folder that is a link now has no entries.
    let through = nodes.root.path().join("through");
    symlink(nodes.here(), &through).expect("a link");
    let refused = Source::open(&through, None)
        .map(drop)
        .map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Unfit));
}

#[test]
fn a_record_says_what_it_said_and_a_damaged_one_says_nothing() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), vec![5; 200_000]).expect("a file");
    fs::set_permissions(
        nodes.here().join("file"),
        fs::Permissions::from_mode(0o4711),
    )
    .expect("a mode");
    symlink("file", nodes.here().join("link")).expect("a link");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let none = Suspects::default();
    source
        .difference(&none, true, &mut |_| Ok(()))
        .expect("a difference");
    let record = source.record();
    let bytes = record.encode();
    assert_eq!(Record::decode(&bytes).expect("a record"), record);
    for at in [0, 10, 100, bytes.len() - 1] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(Record::decode(&damaged).is_err());
        assert!(Record::decode(&bytes[..at]).is_err());
    }
}

fn raw() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 1..300)
}

proptest! {
    #![proptest_config(Config { cases: 200, failure_persistence: None, ..Config::default() })]

    #[test]
    fn whatever_comes_nothing_outside_is_touched(bytes in raw()) {
        let nodes = Nodes::at(FILE_SYSTEMS[1]);
        let mut staging = nodes.staging();
        let checksum = crc32fast::hash(&bytes);
        let proven = staging.apply(&bytes, checksum);
        prop_assert!(proven.is_err() || proven.is_ok_and(|proven| !proven));
        let b: Vec<_> = fs::read_dir(nodes.root.path().join("b")).expect("a folder").collect();
        prop_assert_eq!(b.len(), 1);
    }
}
