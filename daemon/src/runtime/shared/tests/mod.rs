//! On real file systems: tmpfs, ext4 on a loop device, and one in user space. They need root.

pub(crate) mod fuse;

use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::description::{FileDescription, FileUse};
use pageferry_proto::wire::shared::SharedPath;
use pageferry_trial::shared_mapping;
use tempfile::TempDir;
use tokio::sync::watch;

use super::kind::Kind;
use super::lengths::Length;
use super::marker::{Markers, Written};
use super::sync::FileSystems;
use super::*;
use crate::runtime::files;
use fuse::{Fuse, OWNER};
use pageferry_trial::Trial;

/// The other process of these tests.
#[test]
fn workload() {
    pageferry_trial::obey();
}

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// What is looked for where it must have come to.
const PATTERN: &[u8] = b"written by the workload, read by nobody yet";

const SAME_KERNEL: [[u8; 16]; 2] = [[1; 16]; 2];

/// A server that does not answer, until this is dropped.
struct Hanging<'a>(&'a Fuse);

impl<'a> Hanging<'a> {
    fn begin(fuse: &'a Fuse) -> Self {
        fuse.state().hanging = true;
        Self(fuse)
    }
}

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Something mounted, until it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn tmpfs(path: &Path, options: &str) -> Mounted {
    fs::create_dir_all(path).unwrap();
    let flags = MsFlags::empty();
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options)).expect("root may mount");
    Mounted(path.to_owned())
}

/// An ext4 of 64 MiB in a file that takes room only where something was written.
fn ext4(image: &Path, path: &Path) -> Mounted {
    fs::create_dir_all(path).unwrap();
    File::create(image).unwrap().set_len(64 << 20).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{program}: {output:?}");
    };
    let (image, place) = (image.to_str().unwrap(), path.to_str().unwrap());
    let lazy = "lazy_itable_init=1,nodiscard";
    run(
        "mkfs.ext4",
        &["-q", "-O", "^has_journal", "-E", lazy, image],
    );
    run("mount", &["-o", "loop", image, place]);
    Mounted(path.to_owned())
}

fn storage(path: &Path) -> Storage {
    Storage::find(&[path.to_owned()]).expect("a path that is there")
}

fn offer_of(path: &Path) -> (SharedPath, Markers) {
    let mut markers = Markers::default();
    let mut offered = storage(path).offer(&mut markers).expect("an offer");
    assert_eq!(offered.len(), 1, "{offered:?}");
    (offered.remove(0), markers)
}

#[track_caller]
fn refused(result: Result<(), Failure>, code: ErrorCode, words: &[&str]) {
    let failure = result.expect_err("a refusal");
    assert_eq!(failure.code(), code, "{failure}");
    for word in words {
        assert!(failure.text().contains(word), "{word}: {failure}");
    }
}

fn markers_in(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// Markers are removed by a thread of their own.
#[track_caller]
fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::yield_now();
    }
}

fn sync(path: &Path, limit: Duration, cancelled: watch::Receiver<bool>) -> Result<(), Failure> {
    let systems = FileSystems::open(&storage(path)).expect("storage that can be opened");
    let syncing = systems.begin(vec![std::process::id().cast_signed()]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(syncing.ended(limit, cancelled)).map(drop)
}

/// Never turns true, and nobody goes away who could turn it.
fn never() -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    std::mem::forget(sender);
    receiver
}

#[test]
fn a_copy_of_a_folder_is_not_the_same_storage() {
    let (folder, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (offered, _markers) = offer_of(folder.path());
    assert_eq!(check(&offered, SAME_KERNEL), Ok(()));
    let elsewhere = SharedPath {
        path: copy.path().to_str().unwrap().to_owned(),
        ..offered.clone()
    };
    let words = [
        elsewhere.path.as_str(),
        "not the same storage",
        ".pageferry-",
    ];
    refused(
        check(&elsewhere, SAME_KERNEL),
        ErrorCode::SharedDiffers,
        &words,
    );
    // The name alone proves nothing.
    let name = offered.marker.unwrap().file_name();
    fs::write(copy.path().join(name), [0; 16]).unwrap();
    refused(
        check(&elsewhere, SAME_KERNEL),
        ErrorCode::SharedDiffers,
        &words,
    );
}

#[test]
fn a_file_is_proven_by_the_folder_it_is_in() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("data");
    fs::write(&file, "x").unwrap();
    let (offered, markers) = offer_of(&file);
    assert!(!offered.directory && offered.marker.is_some());
    // It is written meanwhile.
    fs::write(&file, "much longer").unwrap();
    assert_eq!(check(&offered, SAME_KERNEL), Ok(()));
    drop(markers);
    until("the marker is gone", || markers_in(folder.path()) == 1);
}

#[test]
fn a_marker_is_removed_with_its_migration_and_after_a_crash() {
    let folder = TempDir::new().unwrap();
    let (_, markers) = offer_of(folder.path());
    assert_eq!(markers_in(folder.path()), 1);
    drop(markers);
    until("the marker is gone", || markers_in(folder.path()) == 0);
    let (_, markers) = offer_of(folder.path());
    let journalled = serde_json::to_string(markers.written()).unwrap();
    // What a crash does.
    std::mem::forget(markers);
    let written: Vec<Written> = serde_json::from_str(&journalled).unwrap();
    drop(Markers::recovered(written));
    until("the marker is gone", || markers_in(folder.path()) == 0);
}

#[test]
fn what_a_crash_left_long_ago_is_removed_by_the_next_marker_beside_it() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, age: u64| {
        let file = File::create(folder.path().join(name)).unwrap();
        let then = SystemTime::now() - Duration::from_secs(age);
        file.set_times(FileTimes::new().set_modified(then)).unwrap();
    };
    let [old, new] = ["a", "b"].map(|digit| format!(".pageferry-{}", digit.repeat(32)));
    write(&old, 7200);
    write(&new, 60);
    write(".pageferry-notes", 7200);
    drop(offer_of(folder.path()));
    let left = |name: &str| folder.path().join(name).exists();
    assert!(!left(&old) && left(&new) && left(".pageferry-notes"));
}

#[test]
fn a_path_that_is_missing_is_refused_by_its_name_at_either_node() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("gone");
    let words = ["/gone", "is not at the source"];
    let found = Storage::find(std::slice::from_ref(&path)).map(drop);
    refused(found, ErrorCode::SharedDiffers, &words);
    fs::create_dir(&path).unwrap();
    let (offered, markers) = offer_of(&path);
    drop(markers);
    until("the marker is gone", || markers_in(&path) == 0);
    fs::remove_dir(&path).unwrap();
    let words = ["/gone", "is not at the target"];
    refused(
        check(&offered, SAME_KERNEL),
        ErrorCode::SharedDiffers,
        &words,
    );
    fs::write(&path, "").unwrap();
    refused(
        check(&offered, SAME_KERNEL),
        ErrorCode::SharedDiffers,
        &["a file at the other"],
    );
}

#[test]
fn two_kernels_do_not_share_a_file_system_that_is_made_for_one() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let (offered, _markers) = offer_of(folder.path());
    let two = [[1; 16], [2; 16]];
    let words = ["tmpfs", "two kernels cannot share"];
    refused(check(&offered, two), ErrorCode::SharedDiffers, &words);
    // A server has on its own disk what its clients have from it.
    let from_a_client = SharedPath {
        file_system: 0x6969,
        ..offered
    };
    assert_eq!(check(&from_a_client, two), Ok(()));
}

#[test]
fn where_nothing_can_be_written_the_inode_must_be_the_same() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let place = folder.path().join("mount");
    let _mounted = tmpfs(&place, "size=1m");
    fs::create_dir(place.join("other")).unwrap();
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &place, None::<&str>, read_only, None::<&str>).unwrap();
    let (offered, _markers) = offer_of(&place);
    assert_eq!(offered.marker, None);
    assert_eq!(check(&offered, SAME_KERNEL), Ok(()));
    let elsewhere = SharedPath {
        path: place.join("other").to_str().unwrap().to_owned(),
        ..offered
    };
    refused(
        check(&elsewhere, SAME_KERNEL),
        ErrorCode::SharedDiffers,
        &["inode or times"],
    );
}

#[test]
fn a_mount_below_a_shared_path_is_proven_by_itself_and_none_may_come_later() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let first = tmpfs(&folder.path().join("first place"), "size=1m");
    let declared = storage(folder.path());
    let mut markers = Markers::default();
    let offered = declared.offer(&mut markers).unwrap();
    let paths: Vec<&str> = offered.iter().map(|shared| shared.path.as_str()).collect();
    let expected = [folder.path(), &first.0].map(|path| path.to_str().unwrap());
    assert_eq!(paths, expected);
    assert_eq!(declared.check_unchanged(), Ok(()));
    let second = tmpfs(&folder.path().join("second"), "size=1m");
    let words = [second.0.to_str().unwrap(), "was mounted since"];
    refused(declared.check_unchanged(), ErrorCode::SharedDiffers, &words);
}

#[test]
fn where_root_is_nobody_the_owner_of_the_folder_writes_the_marker() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    fuse.state().squashing = true;
    assert_eq!(fs::metadata(&fuse.path).unwrap().uid(), OWNER);
    let (offered, markers) = offer_of(&fuse.path);
    assert!(offered.marker.is_some());
    assert_eq!(check(&offered, SAME_KERNEL), Ok(()));
    drop(markers);
    until("the marker is gone", || fuse.state().files.is_empty());
}

#[test]
fn a_table_of_descriptors_is_listed_once_however_many_threads_have_it() {
    let mut trial = Trial::start("runtime::shared::tests::workload");
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data");
    fs::write(&path, "x").unwrap();
    trial.tell("threads 8");
    let pid = trial.pid();
    // A thread that has just begun has a descriptor of libc's for a moment (its memory arena counts
    // the processors), so each count is one that holds at last.
    let table = || {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"));
        entries.unwrap().count()
    };
    let listed = || sync::descriptors(pid).len();
    until("each is listed once", || listed() == table());
    // One of them takes a copy of the table, and opens one more there.
    trial.tell(&format!("open-direct-in-thread {}", path.display()));
    until("those of the copy as well", || listed() == 2 * table() + 1);
    let found = sync::descriptors(pid);
    assert!(
        found
            .iter()
            .any(|found| fs::read_link(found).is_ok_and(|name| name == path))
    );
}

#[test]
fn what_was_written_is_with_the_server_when_the_sync_has_ended() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    let mut file = File::create(fuse.path.join("data")).unwrap();
    file.write_all(PATTERN).unwrap();
    sync(&fuse.path, LONG, never()).expect("a server that works");
    assert_eq!(fuse.content("data"), PATTERN);
    assert_eq!(fuse.state().fsyncs, 1);
}

#[test]
fn a_server_that_fails_fails_the_sync_by_name() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    let mut file = File::create(fuse.path.join("data")).unwrap();
    file.write_all(PATTERN).unwrap();
    fuse.state().failing = true;
    // Either the file system or the file is named, as the kernel waits or not.
    let words = [fuse.path.to_str().unwrap(), "Input/output error"];
    refused(
        sync(&fuse.path, LONG, never()),
        ErrorCode::SyncFailed,
        &words,
    );
}

#[test]
fn a_server_that_takes_what_was_written_and_cannot_keep_it_fails_the_sync_by_the_file() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    let mut file = File::create(fuse.path.join("data")).unwrap();
    file.write_all(PATTERN).unwrap();
    fuse.state().forgetful = true;
    let words = ["/data cannot be made durable", "Input/output error"];
    refused(
        sync(&fuse.path, LONG, never()),
        ErrorCode::SyncFailed,
        &words,
    );
}

#[test]
fn a_server_that_does_not_answer_holds_nobody_who_waits() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    let mut file = File::create(fuse.path.join("data")).unwrap();
    file.write_all(PATTERN).unwrap();
    // Gone before the file is: closing it waits for the server.
    let _hanging = Hanging::begin(&fuse);
    let (cancel, cancelled) = watch::channel(false);
    let words = [fuse.path.to_str().unwrap(), "did not end within"];
    let short = Duration::from_millis(100);
    refused(
        sync(&fuse.path, short, cancelled.clone()),
        ErrorCode::SyncFailed,
        &words,
    );
    cancel.send_replace(true);
    refused(
        sync(&fuse.path, LONG, cancelled),
        ErrorCode::Aborted,
        &["cut off"],
    );
}

#[test]
fn what_was_written_through_a_mapping_is_on_the_disk_when_the_sync_has_ended() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let (image, place) = (folder.path().join("image"), folder.path().join("mount"));
    let _mounted = ext4(&image, &place);
    let path = place.join("data");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(4096).unwrap();
    let mut mapping = shared_mapping::writable(&file);
    // Clean when it is stored to: the store itself must be noticed.
    sync(&place, LONG, never()).unwrap();
    mapping[100..100 + PATTERN.len()].copy_from_slice(PATTERN);
    sync(&place, LONG, never()).unwrap();
    let disk = fs::read(&image).unwrap();
    assert!(disk.windows(PATTERN.len()).any(|window| window == PATTERN));
}

#[test]
fn a_disk_that_takes_no_more_fails_the_sync_by_the_declared_path() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let small = tmpfs(&folder.path().join("small"), "size=4m");
    let place = folder.path().join("mount");
    let _mounted = ext4(&small.0.join("image"), &place);
    let systems = FileSystems::open(&storage(&place)).unwrap();
    let file = File::create(place.join("data")).unwrap();
    // The file system has room for it, what it lies on has not.
    file.write_all_at(&vec![1; 16 << 20], 0).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let synced = runtime.block_on(systems.begin(Vec::new()).ended(LONG, never()));
    let words = [place.to_str().unwrap(), "cannot be made durable"];
    refused(synced.map(drop), ErrorCode::SyncFailed, &words);
}

#[test]
fn a_writable_shared_mapping_is_refused_where_caches_differ() {
    let own = std::process::id().cast_signed();
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    let (declared, elsewhere) = (storage(&fuse.path), TempDir::new().unwrap());
    let check = || mappings::check_coherent(own, &declared, None);
    assert!(declared.is_incoherent());
    assert_eq!(check(), Ok(()));
    let file = mappable(&fuse.path.join("data"));
    let later = shared_mapping::write_later(&file);
    refused(
        check(),
        ErrorCode::SharedIncoherent,
        &["/data", &own.to_string(), "fuse"],
    );
    drop(later);
    assert_eq!(check(), Ok(()));
    let now = shared_mapping::writable(&file);
    assert!(check().is_err());
    // Only where it was declared.
    let other = storage(elsewhere.path());
    assert_eq!(mappings::check_coherent(own, &other, None), Ok(()));
    drop(now);
    let local = TempDir::new_in("/dev/shm").unwrap();
    let _mapping = shared_mapping::writable(&mappable(&local.path().join("data")));
    let other = storage(local.path());
    assert_eq!(mappings::check_coherent(own, &other, None), Ok(()));
    assert!(matches!(kind::of(local.path()), Ok((Kind::Local, _))));
}

fn mappable(path: &Path) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let file = file.unwrap();
    file.set_len(4096).unwrap();
    file
}

#[test]
fn a_file_elsewhere_that_is_mapped_to_be_read_asks_for_no_smaps() {
    let own = procfs::process::Process::myself().unwrap();
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let file = mappable(&there.path().join("modules"));
    let _mapping = shared_mapping::write_later(&file);
    let asks = |folder: &Path| {
        let (_, unsure) = mappings::writable_now(&own, |path| path.starts_with(folder)).unwrap();
        unsure
    };
    assert!(!asks(here.path()));
    assert!(asks(there.path()));
}

#[test]
fn a_file_that_is_mapped_is_refused_where_the_caches_of_the_target_differ() {
    let folder = TempDir::new().unwrap();
    let fuse = Fuse::mount(folder.path());
    File::create(fuse.path.join("data")).unwrap();
    let described = |mapped_shared| FileDescription {
        path: "/data".to_owned(),
        size: 0,
        build_id: Vec::new(),
        writable: true,
        mode: 0o100_666,
        kind: FileUse::Mapped,
        mapped_shared,
    };
    assert_eq!(files::check(&described(false), &fuse.path, false), Ok(()));
    let refusal = files::check(&described(true), &fuse.path, false);
    refused(
        refusal,
        ErrorCode::SharedIncoherent,
        &["/data", "at the target", "fuse"],
    );
}

#[test]
fn a_node_that_believes_in_an_old_length_does_not_restore() {
    let (here, there, images) = (
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
    );
    let source = Fuse::mount(here.path());
    let target = source.elsewhere(there.path());
    let append = |name: &str| {
        let path = source.path.join(name);
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        file.write_all(PATTERN).unwrap();
        sync(&source.path, LONG, never()).unwrap();
        file
    };
    let mut log = append("log");
    // The target looks at it, and keeps what it saw.
    let seen = || fs::metadata(target.path.join("log")).unwrap().len();
    assert_eq!(seen(), PATTERN.len() as u64);
    log.write_all(PATTERN).unwrap();
    let _other = append("other");
    // The workload does not write it.
    let _read = File::open(source.path.join("log")).unwrap();
    // Who appends is not the only one who writes.
    let _twice = append("twice");
    let _anywhere = File::options()
        .write(true)
        .open(source.path.join("twice"))
        .unwrap();
    let own = std::process::id().cast_signed();
    let mut read = lengths::read(&[own], std::slice::from_ref(&source.path), None);
    let expected = [
        ("log", 2 * PATTERN.len(), true),
        ("other", PATTERN.len(), true),
        ("twice", PATTERN.len(), false),
    ];
    let expected = expected.map(|(name, bytes, appended)| Length {
        path: source.path.join(name),
        bytes: bytes as u64,
        appended,
    });
    assert_eq!(read, expected);
    for length in &mut read {
        let name = length.path.file_name().unwrap().to_owned();
        length.path = target.path.join(name);
    }
    lengths::write(images.path(), &read[1..]).unwrap();
    assert_eq!(lengths::check(images.path()), Ok(()));
    // Others may append, too; then what is there is more.
    read[1].bytes -= 1;
    lengths::write(images.path(), &read[1..]).unwrap();
    assert_eq!(lengths::check(images.path()), Ok(()));
    lengths::write(images.path(), &read).unwrap();
    let words = ["/log", "43 bytes here, and 86 at the source"];
    refused(
        lengths::check(images.path()),
        ErrorCode::FileDiffers,
        &words,
    );
    assert_eq!(lengths::check(Path::new("/nowhere")), Ok(()));
}
