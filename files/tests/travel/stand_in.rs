//! Empty folders that stand in for what comes.

use std::fs;

use pageferry_files::{ErrorKind, Keep, Placed, Source, Suspects};

use crate::{FILE_SYSTEMS, Nodes, assert_same, identity, put, send};

#[test]
fn a_folder_takes_the_place_of_the_one_that_stands_in_for_it() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), b"bytes").expect("a file");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    let mut placed = Placed {
        path: nodes.there(),
        place: staging.place().to_owned(),
        inode: Some(identity(&staging)),
        was_there: false,
        stand_in: None,
    };
    placed.stand_in = Some(Keep::stand_in(&placed).expect("made"));
    Keep::put_stand_in(&placed).expect("put");
    // Whoever looks for it may make something in it.
    fs::create_dir(nodes.there().join("place")).expect("a folder");
    send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
    Keep::put(&staging, &placed).expect("put");
    assert_same(&nodes.here(), &nodes.there());
    Keep::undo(&placed).expect("undone");
    assert!(!nodes.there().exists() && !placed.place.exists());
}

#[test]
fn what_somebody_has_put_into_an_empty_folder_is_his() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    fs::write(nodes.here().join("file"), b"bytes").expect("a file");
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    let mut placed = Placed {
        path: nodes.there(),
        place: staging.place().to_owned(),
        inode: Some(identity(&staging)),
        was_there: false,
        stand_in: None,
    };
    placed.stand_in = Some(Keep::stand_in(&placed).expect("made"));
    Keep::put_stand_in(&placed).expect("put");
    fs::create_dir(nodes.there().join("place")).expect("a folder");
    fs::write(nodes.there().join("mine"), b"bytes").expect("a file");
    send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
    let refused = Keep::put(&staging, &placed).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Unfit));
    assert!(nodes.there().join("mine").exists());
    let left = Keep::undo(&placed).expect_err("it is not empty");
    assert!(left.to_string().contains("is not empty"), "{left}");
    assert!(nodes.there().join("mine").exists() && !placed.place.exists());
    fs::remove_file(nodes.there().join("mine")).expect("removed");
    Keep::undo(&placed).expect("undone");
    assert!(!nodes.there().exists());
    // One of the same number that somebody has made since.
    let mut source = Source::open(&nodes.here(), None).expect("a source");
    let mut staging = nodes.staging();
    send(&mut source, &mut staging, &Suspects::default(), true).expect("a difference");
    let mut placed = put(&mut staging, &nodes.there());
    let (device, number, made) = placed.inode.expect("it is there");
    placed.inode = Some((device, number, made + 1));
    Keep::undo(&placed).expect("nothing of it");
    assert!(nodes.there().join("file").exists());
}

#[test]
fn what_is_hidden_of_a_volume_is_found_when_that_is_gone() {
    let nodes = Nodes::at(FILE_SYSTEMS[0]);
    let volume = nodes.there().join("volume");
    fs::create_dir_all(&volume).expect("a folder");
    let place = || Keep::place(&volume.join("_data"), "m", 0);
    let before = place();
    assert!(before.starts_with(nodes.there().join(pageferry_files::HIDDEN)));
    fs::remove_dir(&volume).expect("removed");
    assert_eq!(place(), before);
}
