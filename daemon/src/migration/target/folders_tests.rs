use std::os::unix::fs::MetadataExt;

use pageferry_files::{Source, Suspects};

use pageferry_proto::wire::copied::CopiedPath;

use super::*;
use crate::runtime::rootfs::{Bundle, RootPlace};

/// Where folders come to, and what is known of them.
fn node() -> (tempfile::TempDir, Shelf) {
    let root = tempfile::tempdir().expect("a folder");
    let shelf = Shelf::new(root.path().join("state"));
    (root, shelf)
}

fn coming(path: &Path, bytes: u64, base: Option<Digest>) -> CopiedPath {
    CopiedPath {
        path: path.to_str().expect("UTF-8").to_owned(),
        form: CopiedForm::Folder,
        entries: 1,
        bytes,
        base,
    }
}

/// What comes with the only member.
const fn own<'a>(
    copied: &'a [CopiedPath],
    root: Option<&'a RootPlace>,
    are_looked_for: bool,
) -> [Own<'a>; 1] {
    [Own {
        copied,
        root,
        are_looked_for,
    }]
}

#[test]
fn one_that_cannot_be_taken_back_leaves_no_other() {
    let (root, shelf) = node();
    let paths = ["one", "two"].map(|name| root.path().join(name));
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let folders = Folders::new(shelf.clone(), id);
    let all = paths.each_ref().map(|path| coming(path, 0, None));
    folders.prepare(&own(&all, None, false)).expect("room");
    let places: Vec<PathBuf> = {
        let all = folders.lock();
        let placed = all.iter().filter_map(|folder| folder.placed.as_ref());
        placed.map(|placed| placed.place.clone()).collect()
    };
    for (path, place) in paths.iter().zip(&places) {
        fs::rename(place.join("tree"), path).expect("put");
    }
    let in_the_way = places[0].with_extension("undone");
    fs::create_dir(&in_the_way).expect("a folder");
    let failure = folders.take_back().expect_err("something is in the way");
    assert!(failure.text().contains("/one"), "{failure}");
    assert!(paths[0].exists() && !paths[1].exists());
    // Whoever starts again finds it.
    fs::remove_dir(&in_the_way).expect("removed");
    Folders::new(shelf.clone(), id)
        .take_back()
        .expect("taken back");
    assert!(!paths[0].exists() && !shelf.note(id).exists());
}

#[test]
fn an_empty_folder_is_there_for_who_looks_and_goes_with_the_rest() {
    let (root, shelf) = node();
    let paths = ["one", "two"].map(|name| root.path().join(name));
    fs::create_dir(&paths[1]).expect("a folder");
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let all = paths.each_ref().map(|path| coming(path, 0, None));
    let folders = Folders::new(shelf.clone(), id);
    folders.prepare(&own(&all, None, true)).expect("room");
    assert!(paths[0].is_dir() && paths[1].is_dir());
    let stand_ins = |folders: &Folders| -> Vec<bool> {
        let all = folders.lock();
        let placed = all.iter().filter_map(|folder| folder.placed.as_ref());
        placed.map(|placed| placed.stand_in.is_some()).collect()
    };
    assert_eq!(stand_ins(&folders), [true, false]);
    // What somebody puts into one that was there before is his.
    fs::write(paths[1].join("mine"), "").expect("a file");
    // Also by whoever finds the note alone.
    Folders::new(shelf.clone(), id).take_back().expect("back");
    assert!(!paths[0].exists() && paths[1].join("mine").exists());
    fs::remove_file(paths[1].join("mine")).expect("removed");
    // It is nobody's if it is that of a volume which was made for what comes.
    let note = shelf.state.join(format!("{id}.{VOLUMES}"));
    let made = serde_json::json!([
        {"name": "data", "path": paths[1], "created": "2026", "folder": [1, 2, 3]},
    ]);
    fs::write(&note, made.to_string()).expect("a note");
    let folders = Folders::new(shelf.clone(), id);
    folders.prepare(&own(&all, None, true)).expect("room");
    assert_eq!(stand_ins(&folders), [true, true]);
    folders.hand_over().expect("written down");
    assert!(!note.exists());
    assert_eq!(stand_ins(&Folders::new(shelf.clone(), id)), [false, false]);
    drop(folders);
    fs::remove_dir(&paths[0]).expect("an empty folder");
    fs::remove_file(shelf.note(id)).expect("a note");
    fs::remove_dir_all(root.path().join(pageferry_files::HIDDEN)).expect("hidden");
    let folders = Folders::new(shelf.clone(), id);
    folders.prepare(&own(&all, None, true)).expect("room");
    // What somebody has put there since is his.
    fs::rename(&paths[0], root.path().join("aside")).expect("renamed");
    fs::create_dir(&paths[0]).expect("a folder");
    shelf.clean_up(|_| false);
    assert!(paths[0].is_dir() && paths[1].is_dir() && !shelf.note(id).exists());
}

#[test]
fn what_is_missing_of_a_folder_that_is_kept_must_have_room() {
    let (root, shelf) = node();
    let path = root.path().join("data");
    fs::create_dir(&path).expect("a folder");
    let digest = [7; 32];
    shelf.keep().set_aside(&path, &digest).expect("aside");
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let refused = Folders::new(shelf.clone(), id).prepare(&own(
        &[coming(&path, 1 << 60, Some(digest))],
        None,
        false,
    ));
    let code = refused.map_err(|failure| failure.code());
    assert_eq!(code, Err(ErrorCode::DiskShort));
    let folders = Folders::new(shelf, id);
    folders
        .prepare(&own(&[coming(&path, 0, Some(digest))], None, false))
        .expect("room");
    assert_eq!(folders.kept(), [0]);
}

const LIKE: BundleFolder = BundleFolder {
    mode: 0o710,
    uid: 0,
    gid: 0,
};

/// A bundle that comes, and where.
fn bundle(path: PathBuf) -> (CopiedPath, RootPlace) {
    let coming = CopiedPath {
        path: String::new(),
        form: CopiedForm::Root(LIKE),
        ..coming(&path, 0, None)
    };
    let bundle = Bundle {
        path,
        config: b"{}".to_vec(),
        root: "rootfs".into(),
    };
    (coming, RootPlace::Bundle(bundle))
}

/// As if an empty folder had come, to its end.
fn fill(folders: &Folders) {
    let empty = tempfile::tempdir().expect("a folder");
    let mut source = Source::open(empty.path(), None).expect("a folder");
    let stage = folders.lock()[0].staging.clone().expect("a stage");
    let mut stage = stage.lock().expect("not poisoned");
    let staging = stage.open().expect("open");
    let mut take = |frame: Vec<u8>| {
        let (head, operations) = frame.split_at(8);
        let (_, checksum) = Staging::frame(head.try_into().expect("8 bytes"))?;
        staging.apply(operations, checksum).map(drop)
    };
    let sent = source.difference(&Suspects::default(), true, &mut take);
    sent.expect("applied");
}

fn ids() -> [MigrationId; 2] {
    [
        "0123456789abcdef0123456789abcdef",
        "0123456789abcdef0123456789abcde0",
    ]
    .map(|id| id.parse().expect("an id"))
}

#[test]
fn a_bundle_is_there_before_anything_comes_and_goes_by_its_inode() {
    let (root, shelf) = node();
    let path = root.path().join("web");
    let (coming, place) = bundle(path.clone());
    let [id, other] = ids();
    let come = |id| {
        let folders = Folders::new(shelf.clone(), id);
        let prepared = folders.prepare(&own(std::slice::from_ref(&coming), Some(&place), true));
        prepared.map(|()| folders)
    };
    let folders = come(id).expect("room");
    assert_eq!(
        fs::read(path.join("config.json")).expect("it is there"),
        b"{}"
    );
    assert!(path.join("rootfs").is_dir());
    let mode = || fs::metadata(&path).expect("it is there").mode() & 0o7777;
    assert_eq!(mode(), 0o700);
    let unproven = folders.put().expect_err("nothing has come");
    assert!(unproven.text().contains("not proven"), "{unproven}");
    assert_eq!(mode(), 0o700);
    fill(&folders);
    folders.put().expect("all has come");
    assert_eq!(mode(), LIKE.mode);
    let taken = come(other).map(drop).map_err(|failure| failure.code());
    assert_eq!(taken, Err(ErrorCode::PathTaken));
    Folders::new(shelf.clone(), other)
        .take_back()
        .expect("nothing of it");
    assert!(path.exists());
    drop(folders);
    // A daemon that starts again knows of no such migration, or of this one.
    shelf.clean_up(|known| known == id);
    assert!(path.exists());
    shelf.clean_up(|_| false);
    assert!(!path.exists() && !root.path().join(pageferry_files::HIDDEN).exists());
    let folders = come(id).expect("room");
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside).expect("renamed");
    fs::create_dir(&path).expect("a folder of somebody else");
    folders.take_back().expect("taken back");
    assert!(path.exists() && aside.exists());
}

#[test]
fn what_may_run_is_taken_back_by_nobody_but_who_knows_that_it_never_ran() {
    let (root, shelf) = node();
    let path = root.path().join("web");
    let (coming, place) = bundle(path.clone());
    let [id, _] = ids();
    let begun = || {
        let folders = Folders::new(shelf.clone(), id);
        let prepared = folders.prepare(&own(std::slice::from_ref(&coming), Some(&place), true));
        prepared.expect("room");
        folders.hand_over().expect("written down");
        folders
    };
    let folders = begun();
    // As a power cut may leave it: what was removed of the notes is there again.
    let note = fs::read(shelf.note(id)).expect("a note");
    Folders::new(shelf.clone(), id)
        .take_back()
        .expect("nothing that is known");
    assert!(path.join("rootfs").is_dir() && !shelf.note(id).exists());
    fs::write(shelf.note(id), &note).expect("a note");
    shelf.clean_up(|_| false);
    assert!(path.join("rootfs").is_dir() && !shelf.note(id).exists());
    // Who has let it go, and hears that it never ran.
    folders.take_back().expect("taken back");
    assert!(!path.exists());
    // Who cannot tell what is left of it.
    let folders = begun();
    folders.stay("of a test");
    drop(folders);
    shelf.clean_up(|_| false);
    assert!(path.join("rootfs").is_dir() && !shelf.note(id).exists());
}

#[test]
fn what_is_bound_in_a_bundle_is_let_go_before_that_is_removed() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use pageferry_sys::bound;

    let (root, shelf) = node();
    let (path, files) = (root.path().join("web"), root.path().join("files"));
    let (coming, place) = bundle(path.clone());
    let folders = Folders::new(shelf, ids()[0]);
    folders
        .prepare(&own(&[coming], Some(&place), true))
        .expect("room");
    fs::create_dir(&files).expect("a folder");
    fs::write(files.join("kept"), "").expect("a file");
    let runtimes = path.join("criu-root");
    fs::create_dir(&runtimes).expect("a folder");
    // In a mount namespace of this thread, whose mounts nobody else sees.
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("needs root");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("needs root");
    mount(Some(&files), &runtimes, none, MsFlags::MS_BIND, none).expect("needs root");
    let failure = folders.take_back().expect_err("something is bound");
    assert!(failure.text().contains("/web"), "{failure}");
    assert!(files.join("kept").exists());
    // It is no bundle any more, wherever it is.
    assert!(!path.exists());
    let hidden = root.path().join(pageferry_files::HIDDEN);
    let left = fs::read_dir(&hidden)
        .expect("a folder")
        .flatten()
        .map(|entry| entry.path());
    let left: Vec<PathBuf> = left
        .filter(|path| path.join("criu-root").exists())
        .collect();
    bound::release(&left[0], "criu-root").expect("unmounted");
    folders.take_back().expect("taken back");
    assert!(files.join("kept").exists() && !hidden.exists());
}

#[test]
fn what_comes_as_a_containers_own_is_what_it_has_here() {
    let (root, shelf) = node();
    let (whole, place) = bundle(root.path().join("web"));
    let layer = CopiedPath {
        form: CopiedForm::Layer,
        ..whole.clone()
    };
    let folder = coming(&root.path().join("data"), 0, None);
    let refused = |copied: &[CopiedPath], place: Option<&RootPlace>| {
        let folders = Folders::new(shelf.clone(), ids()[0]);
        let code = folders
            .prepare(&own(copied, place, true))
            .map_err(|failure| failure.code());
        assert_eq!(code, Err(ErrorCode::Malformed));
    };
    refused(&[], Some(&place));
    refused(std::slice::from_ref(&folder), Some(&RootPlace::Overlay));
    refused(std::slice::from_ref(&whole), None);
    refused(std::slice::from_ref(&layer), Some(&place));
    refused(&[whole.clone(), whole.clone()], Some(&place));
    refused(&[whole], Some(&RootPlace::Overlay));
    let folders = Folders::new(shelf.clone(), ids()[0]);
    folders
        .prepare(&own(&[layer], Some(&RootPlace::Overlay), true))
        .expect("one to come");
    // It is mounted nowhere.
    let found = folders
        .found(0, root.path())
        .map_err(|failure| failure.code());
    assert_eq!(found, Err(ErrorCode::NodeUnfit));
    folders.take_back().expect("nothing of it");
}

/// As an engine does it: with nothing lazy about it.
#[test]
fn an_overlay_that_has_all_can_be_unmounted_and_another_one_is_told_from_it() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};

    let (root, shelf) = node();
    let path = |name: &str| root.path().join(name);
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("needs root");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("needs root");
    // An upper layer is on no overlay.
    fs::create_dir(path("disk")).expect("a folder");
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &path("disk"), tmpfs, MsFlags::empty(), none).expect("needs root");
    for name in ["disk/lower", "disk/upper", "disk/work", "merged"] {
        fs::create_dir(path(name)).expect("a folder");
    }
    let disk = path("disk");
    let disk = disk.display();
    let layers = format!("lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work");
    let overlay = || {
        let kind = Some("overlay");
        mount(
            kind,
            &path("merged"),
            kind,
            MsFlags::empty(),
            Some(&*layers),
        )
        .expect("needs root");
    };
    let layer = CopiedPath {
        form: CopiedForm::Layer,
        ..coming(Path::new(""), 0, None)
    };
    let come = || {
        let folders = Folders::new(shelf.clone(), ids()[0]);
        let layer = std::slice::from_ref(&layer);
        folders
            .prepare(&own(layer, Some(&RootPlace::Overlay), true))
            .expect("room");
        folders.found(0, &path("merged")).expect("it is there");
        fill(&folders);
        folders.put().expect("all has come");
        folders
    };
    overlay();
    let folders = come();
    folders.check_restored().expect("the same");
    let folders = {
        drop(folders);
        come()
    };
    umount2(&path("merged"), MntFlags::empty()).expect("nothing of it is open");
    overlay();
    let failure = folders.check_restored().expect_err("another one");
    assert!(failure.text().contains("anew"), "{failure}");
    umount2(&path("merged"), MntFlags::empty()).expect("nothing of it is open");
    umount2(&path("disk"), MntFlags::MNT_DETACH).expect("ours");
}

#[test]
fn who_says_that_folders_stay_waits_for_nobody_who_applies_something() {
    let (root, shelf) = node();
    let path = root.path().join("web");
    let (coming, place) = bundle(path.clone());
    let folders = Folders::new(shelf, ids()[0]);
    folders
        .prepare(&own(&[coming], Some(&place), true))
        .expect("room");
    // As one whose storage does not answer.
    let stage = folders.lock()[0].staging.clone().expect("a stage");
    let applying = stage.lock().expect("not poisoned");
    let taking = {
        let folders = folders.clone();
        std::thread::spawn(move || folders.take_back())
    };
    let (said, heard) = std::sync::mpsc::channel();
    let saying = folders.clone();
    std::thread::spawn(move || {
        // The other has begun.
        std::thread::sleep(std::time::Duration::from_millis(200));
        saying.stay("of a test");
        let _ = said.send(());
    });
    let limit = std::time::Duration::from_secs(30);
    heard.recv_timeout(limit).expect("it does not wait");
    assert!(path.exists() && !taking.is_finished());
    drop(applying);
    taking.join().expect("no panic").expect("taken back");
    assert!(!path.exists());
}
