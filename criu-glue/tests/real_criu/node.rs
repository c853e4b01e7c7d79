//! A node of its own: overlay over the image, private `/proc`, `/run` and `/tmp`.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

/// Where this program and the view lie inside.
pub const PROGRAM: &str = "/opt/criu-glue/test";
pub const LIBRARY: &str = "/opt/criu-glue/libcriu_view.so";

/// Makes the image the root of this process, writable, with our program and the view in it.
pub fn enter(image: &Path, base: &Path, library: &Path) {
    let none = None::<&str>;
    let tmpfs = |at: &Path| mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), none);
    tmpfs(base).expect("a tmpfs for what is written");
    let root = base.join("root");
    for name in ["upper", "work", "root"] {
        fs::create_dir(base.join(name)).expect("an empty tmpfs");
    }
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        base.join("upper").display(),
        base.join("work").display()
    );
    let flags = MsFlags::empty();
    mount(
        Some("overlay"),
        &root,
        Some("overlay"),
        flags,
        Some(layers.as_str()),
    )
    .expect("overlay");
    let ours = root.join("opt/criu-glue");
    fs::create_dir_all(&ours).expect("a writable root");
    fs::copy("/proc/self/exe", ours.join("test")).expect("room for the program");
    fs::copy(library, ours.join("libcriu_view.so")).expect("room for the library");
    for name in ["sys", "dev"] {
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(
            Some(&Path::new("/").join(name)),
            &root.join(name),
            none,
            bind,
            none,
        )
        .expect(name);
    }
    mount(Some("proc"), &root.join("proc"), Some("proc"), flags, none).expect("proc");
    tmpfs(&root.join("run")).expect("run");
    tmpfs(&root.join("tmp")).expect("tmp");
    chdir(&root).expect("the new root");
    fs::create_dir("old").expect("a writable root");
    pivot_root(".", "old").expect("a mount of its own");
    umount2("/old", MntFlags::MNT_DETACH).expect("the old root");
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.expect("iproute2 in the image").success());
}
