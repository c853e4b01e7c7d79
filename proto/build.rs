//! Compiles the schemas. protox parses them in process, so no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=schema");
    let schemas = ["schema/wire.proto", "schema/journal.proto"];
    let descriptors = protox::compile(schemas, ["schema"])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
