//! Layers over the node image: packages and files that only some scenarios need.
//!
//! A layer is the upper folder of an overlay over the image, in which apt installed packages. It is
//! cached as the image is: made when it is first asked for, named by a hash of all that went into
//! it, complete if it has that name, and never written to again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{chdir, chroot};
use xxhash_rust::xxh3::xxh3_64;

use super::image;
use crate::sys;

/// What a layer consists of.
#[derive(Debug)]
pub struct LayerPlan {
    /// In the cache: `NAME-HASH`.
    pub name: &'static str,
    /// Of the image's suite, with all that they depend on.
    pub packages: &'static [&'static str],
    /// Paths at the node and contents.
    pub files: &'static [(&'static str, &'static str)],
    /// What is run at the end, by `sh`, in the root of the layer over the image.
    pub script: &'static str,
}

/// Where the layer is, building it first when the cache does not have it. Returns its folder, to be
/// put over `image`.
///
/// # Errors
/// Offline, or when apt or the script fails.
pub fn ensure_layer(image: &Path, plan: &LayerPlan) -> Result<PathBuf> {
    let inputs = format!("{LAYER_FORMAT} {SCRIPT} {} {plan:?}", image.display());
    image::cached(plan.name, xxh3_64(inputs.as_bytes()), |partial, log| {
        build(image, plan, partial, log)
    })
}

fn build(image: &Path, plan: &LayerPlan, partial: &Path, log_path: &Path) -> Result<PathBuf> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| partial.join(name));
    for folder in [&upper, &work, &root] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    // It stands for the root itself, whatever the umask of whoever makes it.
    fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
    for (path, text) in plan.files {
        write_below(&upper, path, text)?;
    }
    let guests = guests()?;
    for (path, text) in &guests {
        write_below(&upper, path, text)?;
    }
    eprintln!("lab: building the layer {} (once, some minutes)", plan.name);
    let log = File::create(log_path).with_context(|| format!("creating {}", log_path.display()))?;
    let status = in_overlay(image, &upper, &work, &root)
        .args(["-ec", &format!("{SCRIPT}{}", plan.script), "sh"])
        .args(plan.packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("starting sh in the layer")?;
    ensure!(
        status.success(),
        "building the layer {} failed (offline, or the archive is newer than the image {}?); its \
         log: {}",
        plan.name,
        image.display(),
        log_path.display()
    );
    // Taken from the upper folder itself: what the image has there is seen again.
    for path in guests.iter().map(|(path, _)| *path).chain(LEFTOVERS) {
        remove_below(&upper, path)?;
    }
    Ok(upper)
}

/// `sh` with the overlay as its root, in a mount namespace that ends with it.
fn in_overlay(image: &Path, upper: &Path, work: &Path, root: &Path) -> Command {
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=off,metacopy=off,index=off",
        image.display(),
        upper.display(),
        work.display()
    );
    let (root, proc) = (root.to_owned(), root.join("proc"));
    let mut command = Command::new("/bin/sh");
    sys::before_exec(&mut command, move || {
        let none: Option<&str> = None;
        // It must not go on by itself when the lab is interrupted.
        set_pdeathsig(Signal::SIGTERM)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let overlay = Some("overlay");
        mount(overlay, &root, overlay, MsFlags::empty(), Some(&*options))?;
        mount(Some("proc"), &proc, Some("proc"), MsFlags::empty(), none)?;
        chroot(&root)?;
        Ok(chdir("/")?)
    });
    command
}

/// What apt needs of the host to reach the archive, by the paths in the layer.
fn guests() -> Result<Vec<(&'static str, String)>> {
    let read = |path: &str| match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("reading {path}")),
    };
    let settings = Command::new("apt-config")
        .arg("dump")
        .output()
        .context("asking apt for its settings")?;
    let settings = String::from_utf8_lossy(&settings.stdout).into_owned();
    let wanted = |line: &&str| REACHING.iter().any(|start| line.starts_with(start));
    let settings: Vec<&str> = settings.lines().filter(wanted).collect();
    Ok(vec![
        ("/etc/resolv.conf", read("/etc/resolv.conf")?),
        ("/etc/hosts", read("/etc/hosts")?),
        ("/etc/apt/apt.conf.d/99host", settings.join("\n") + "\n"),
        // No server is started while its package is installed.
        ("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n".to_owned()),
    ])
}

fn below(folder: &Path, path: &str) -> PathBuf {
    folder.join(path.trim_start_matches('/'))
}

fn write_below(folder: &Path, path: &str, text: &str) -> Result<()> {
    let path = below(folder, path);
    let parent = path.parent().context("a path of a layer has a folder")?;
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(&path, text))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", path.display()))
}

fn remove_below(folder: &Path, path: &str) -> Result<()> {
    let path = below(folder, path);
    let removed = if path.is_dir() {
        fs::remove_dir_all(&path)
    } else {
        fs::remove_file(&path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Raised when [`build`] does something different with the same inputs.
const LAYER_FORMAT: u32 = 1;
/// Packages are the script's arguments. What nobody reads in a node is left out.
const SCRIPT: &str = "\
apt-get update -qq
apt-get install -qq -y --no-install-recommends \
    -o Dpkg::Options::=--path-exclude=/usr/share/doc/* \
    -o Dpkg::Options::=--path-exclude=/usr/share/man/* \
    -o Dpkg::Options::=--path-exclude=/usr/share/locale/* \
    -- \"$@\"
";
/// Settings of apt by which this machine reaches its archive.
const REACHING: [&str; 3] = ["Acquire::http", "Acquire::Check-", "Acquire::Retries"];
/// What apt leaves and nobody needs.
const LEFTOVERS: [&str; 2] = ["/var/cache/apt", "/var/lib/apt/lists"];
