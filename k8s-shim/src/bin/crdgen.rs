//! Writes the definitions of the resources to their file in the repository.

use std::error::Error;
use std::path::Path;

use pageferry_k8s::manifest;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::write(root.join(manifest::PATH), manifest::text()?)?;
    Ok(())
}
