//! The file that people apply is what the types say.

use std::path::Path;

use pageferry_k8s::manifest;

#[test]
fn the_definitions_in_the_repository_are_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(manifest::PATH);
    let there = std::fs::read_to_string(&path).expect("the file of definitions");
    let fresh = manifest::text().expect("definitions");
    assert!(
        there == fresh,
        "{} is not what the types say: cargo run -p pageferry-k8s --bin crdgen",
        manifest::PATH
    );
}
