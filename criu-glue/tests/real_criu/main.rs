//! A real criu dumps and restores a real process through this crate.
//!
//! Needs root. The criu is that of the lab's node image, which the lab makes when this machine has
//! none yet; `PAGEFERRY_NODE_IMAGE` names another root file system with criu and iproute2.
//! Everything happens in namespaces of its own over an overlay of the image, so neither host nor
//! image is changed, and the kernel takes all of it down when the test ends, however it ends.

mod cases;
mod gated;
mod killed;
mod lazy;
mod node;
mod stopped;
mod sys;
mod threads;
mod workload;
mod wrapped;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["--workload", directory, mebibytes, threads] => {
            let number = |text: &str| text.parse().expect("a number");
            workload::run(Path::new(directory), number(mebibytes), number(threads))
        }
        ["--case", name, folder] => {
            nix::unistd::setsid().expect("a child is no group leader");
            pageferry_bench::cases::be(name, Path::new(folder))
        }
        ["--runtime", gate, pid, folder, told, no_to] => {
            let pid = pid.parse().expect("a number");
            gated::be_runtime(Path::new(gate), pid, Path::new(folder), told, no_to)
        }
        ["--stand-in", gate, "swrk", fd] => {
            gated::be_stand_in(Path::new(gate), fd.parse().expect("a number"))
        }
        ["--inside", image, base, library, filter @ ..] => {
            node::enter(Path::new(image), Path::new(base), Path::new(library));
            cases::run(filter)
        }
        filter => outside(filter),
    }
}

fn outside(filter: &[&str]) -> ExitCode {
    assert!(
        nix::unistd::geteuid().is_root(),
        "namespaces and criu need root"
    );
    let image = match std::env::var_os("PAGEFERRY_NODE_IMAGE") {
        Some(image) => PathBuf::from(image),
        None => match pageferry_bench::lab::image::ensure_image() {
            Ok(image) => image,
            Err(error) => {
                eprintln!("no node image to take criu from: {error:#}");
                return ExitCode::FAILURE;
            }
        },
    };
    let program = std::env::current_exe().expect("procfs");
    let library = program.with_file_name("libcriu_view.so");
    assert!(
        library.exists(),
        "cargo builds {} with this test",
        library.display()
    );
    let base = tempfile::tempdir().expect("temporary directory");
    let status = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
        ])
        .args(["--net", "--uts", "--ipc", "--"])
        .arg(&program)
        .arg("--inside")
        .args([
            image.as_os_str(),
            base.path().as_os_str(),
            library.as_os_str(),
        ])
        .args(filter.iter().filter(|argument| !argument.starts_with('-')))
        .status()
        .expect("unshare of util-linux");
    if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
