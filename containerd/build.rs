//! Generates containerd's API from its schema. protox parses it in process, so no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=schema");
    let files = [
        "containers.proto",
        "images.proto",
        "namespaces.proto",
        "options.proto",
        "snapshots.proto",
        "task.proto",
        "tasks.proto",
        "types.proto",
    ];
    let descriptors = protox::compile(files, ["schema"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
