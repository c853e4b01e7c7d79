use super::*;

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

#[test]
fn one_that_cannot_be_taken_back_leaves_no_other() {
    let (root, shelf) = node();
    let paths = ["one", "two"].map(|name| root.path().join(name));
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let folders = Folders::new(shelf.clone(), id);
    let all = paths.each_ref().map(|path| coming(path, 0, None));
    folders.prepare(&all, None).expect("room");
    let places: Vec<PathBuf> = {
        let all = folders.lock();
        all.iter()
            .map(|folder| folder.placed.place.clone())
            .collect()
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
fn what_is_missing_of_a_folder_that_is_kept_must_have_room() {
    let (root, shelf) = node();
    let path = root.path().join("data");
    fs::create_dir(&path).expect("a folder");
    let digest = [7; 32];
    shelf.keep().set_aside(&path, &digest).expect("aside");
    let id: MigrationId = "0123456789abcdef0123456789abcdef".parse().expect("an id");
    let refused =
        Folders::new(shelf.clone(), id).prepare(&[coming(&path, 1 << 60, Some(digest))], None);
    let code = refused.map_err(|failure| failure.code());
    assert_eq!(code, Err(ErrorCode::DiskShort));
    let folders = Folders::new(shelf, id);
    folders
        .prepare(&[coming(&path, 0, Some(digest))], None)
        .expect("room");
    assert_eq!(folders.kept(), [0]);
}
