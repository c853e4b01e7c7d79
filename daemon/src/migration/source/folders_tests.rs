use super::*;

#[test]
fn what_cannot_go_aside_does_so_when_a_daemon_starts() {
    let root = tempfile::tempdir().expect("a folder");
    let keep = Keep::new(root.path().join("state"));
    let path = root.path().join("data");
    fs::create_dir(&path).expect("a folder");
    let here = fs::symlink_metadata(&path).expect("it is there");
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let gone = Gone {
        path: path.clone(),
        inode: (here.dev(), here.ino()),
        digest: Some([7; 32]),
    };
    let bytes = serde_json::to_vec(&[gone]).expect("JSON");
    keep.write(&note(&keep, id), &bytes).expect("a note");
    // What is in the way of the folder that it goes to.
    let hidden = root.path().join(pageferry_files::HIDDEN);
    fs::write(&hidden, "").expect("a file");
    Folders::recovered(keep.clone(), id).set_aside();
    assert!(path.exists() && !note(&keep, id).exists());
    set_aside_left(&keep);
    assert!(path.exists());
    fs::remove_file(&hidden).expect("removed");
    set_aside_left(&keep);
    assert!(!path.exists());
    assert!(keep.has(&path, &[7; 32]).is_some());
    // Another one that comes there is not touched.
    fs::create_dir(&path).expect("a folder");
    set_aside_left(&keep);
    assert!(path.exists());
}

#[test]
fn a_bundle_does_not_leave_that_somebody_else_has_mounted() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    let root = tempfile::tempdir().expect("a folder");
    let keep = Keep::new(root.path().join("state"));
    let (bundle, elsewhere) = (root.path().join("web"), root.path().join("elsewhere"));
    fs::create_dir_all(bundle.join("rootfs")).expect("a folder");
    fs::create_dir(&elsewhere).expect("a folder");
    let files = RootFiles::Bundle {
        root: bundle.join("rootfs"),
        bundle: bundle.clone(),
    };
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let open = || {
        let alone = [(Vec::new(), Some(files.clone()))];
        Folders::open(keep.clone(), id, &alone, &[]).map(drop)
    };
    open().expect("nobody uses it");
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("needs root");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("needs root");
    let from = bundle.join("rootfs");
    mount(Some(&from), &elsewhere, none, MsFlags::MS_BIND, none).expect("needs root");
    let refused = open().expect_err("it is mounted elsewhere");
    assert_eq!(refused.code(), ErrorCode::FolderUnfit);
    assert!(refused.text().contains("/elsewhere"), "{refused}");
}
