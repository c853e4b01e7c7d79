//! Every clause of PROTOCOL.md is named by a test, and every clause that a test names exists.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A clause begins a line of the document as `**R-3**`; a test names it as below.
fn clauses_of_the_protocol() -> BTreeSet<String> {
    let document = fs::read_to_string(root().join("PROTOCOL.md")).unwrap();
    let clause = |line: &str| Some(line.strip_prefix("- **")?.split_once("**")?.0.to_owned());
    let clauses: Vec<String> = document.lines().filter_map(clause).collect();
    let unique: BTreeSet<String> = clauses.iter().cloned().collect();
    assert_eq!(
        clauses.len(),
        unique.len(),
        "a clause has two texts: {clauses:?}"
    );
    unique
}

fn clauses_of_the_tests() -> BTreeSet<String> {
    let marker = concat!("// clause", ": ");
    let mut clauses = BTreeSet::new();
    let folders = ["src", "tests", "sim"];
    for file in folders
        .iter()
        .flat_map(|folder| sources(&root().join(folder)))
    {
        let text = fs::read_to_string(&file).unwrap();
        let named = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(marker));
        clauses.extend(named.map(str::to_owned));
    }
    clauses
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_clause_is_named_by_a_test_and_the_other_way_round() {
    let protocol = clauses_of_the_protocol();
    let tests = clauses_of_the_tests();
    assert!(!protocol.is_empty());
    let untested: Vec<&String> = protocol.difference(&tests).collect();
    assert!(untested.is_empty(), "no test names {untested:?}");
    let unwritten: Vec<&String> = tests.difference(&protocol).collect();
    assert!(unwritten.is_empty(), "PROTOCOL.md lacks {unwritten:?}");
}
