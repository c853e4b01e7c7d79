//! Records what builds this.

use std::error::Error;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let profile = std::env::var("PROFILE")?;
    println!("cargo::rustc-env=PAGEFERRY_PROFILE={profile}");
    let compiler = Command::new(std::env::var("RUSTC")?)
        .arg("--version")
        .output()?;
    let version = String::from_utf8(compiler.stdout)?;
    let short: Vec<&str> = version.split_whitespace().take(2).collect();
    println!("cargo::rustc-env=PAGEFERRY_RUSTC={}", short.join(" "));
    Ok(())
}
