//! Programs of other crates, which cargo does not build for these tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The pager beside these tests, as `cargo build --workspace` leaves it. One that is older than its
/// source would be tested in place of what is there now, so it is refused.
pub fn pager() -> PathBuf {
    let own = std::env::current_exe().expect("procfs");
    let folder = own.parent().and_then(Path::parent).expect("cargo's folder");
    let program = folder.join("pageferry-pager");
    let built = changed(&program).unwrap_or_else(|| {
        let program = program.display();
        panic!("{program} is missing: build it by `cargo build --workspace`, with this profile")
    });
    // What it was made of here, as cargo lists it: the program, a colon, and every file.
    let listed = fs::read_to_string(program.with_extension("d")).expect("cargo's list of sources");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let workspace = workspace.expect("a workspace");
    let sources = listed.split_ascii_whitespace().skip(1).map(Path::new);
    let sources = sources.filter(|source| source.starts_with(workspace));
    let newer = sources.filter(|source| changed(source).is_none_or(|then| built < then));
    let newer: Vec<&Path> = newer.collect();
    assert!(
        newer.is_empty(),
        "{} is older than {newer:?}: build it again by `cargo build --workspace`",
        program.display()
    );
    program
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|found| found.modified()).ok()
}
