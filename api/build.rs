//! Generates the control API from its schema. protox parses it in process, so no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=schema/control.proto");
    let descriptors = protox::compile(["control.proto"], ["schema"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
