//! The node image: a Debian testing root made by debootstrap, made once and shared by all labs.
//!
//! Invariants: a folder with the final name is complete (built under another name, then renamed),
//! its name is a hash of everything that went into it, and nobody writes into it (nodes put an
//! overlay on top). Two builders at once wait for each other on a lock file for each kind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use xxhash_rust::xxh3::xxh3_64;

use crate::sys;

/// Where the image is, building it first when the cache does not have it. Returns its root folder.
///
/// # Errors
/// Without an apt source to take packages from, offline, or when debootstrap fails.
pub fn ensure_image() -> Result<PathBuf> {
    cached("image", inputs_hash(), build)
}

/// The folder `KIND-HASH` of the cache. When there is none, `build` makes it in the folder that it
/// is given, with the log that it is given, and returns which folder below is to be kept. Others
/// who want one of that kind wait.
pub fn cached(
    kind: &str,
    hash: u64,
    build: impl FnOnce(&Path, &Path) -> Result<PathBuf>,
) -> Result<PathBuf> {
    let cache = cache_folder()?;
    let complete = cache.join(format!("{kind}-{hash:016x}"));
    if complete.is_dir() {
        return Ok(complete);
    }
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let lock = cache.join(format!("{kind}.lock"));
    let file = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("locking {}", lock.display()))?;
    // Another builder may have finished while this one waited.
    if complete.is_dir() {
        return Ok(complete);
    }
    let partial = cache.join(format!("{kind}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("removing {}", partial.display()))?;
    }
    let built = build(&partial, &cache.join(format!("{kind}.log")))?;
    fs::rename(&built, &complete).with_context(|| format!("renaming to {}", complete.display()))?;
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("removing {}", partial.display()))?;
    }
    Ok(complete)
}

fn build(partial: &Path, log_path: &Path) -> Result<PathBuf> {
    require_tool("debootstrap", "debootstrap")?;
    let mirror = debian_mirror()?;
    let log = File::create(log_path).with_context(|| format!("creating {}", log_path.display()))?;
    eprintln!("lab: building the node image (Debian {SUITE} from {mirror}; once, some minutes)");
    let mut command = Command::new("debootstrap");
    // It must not go on by itself when the lab is interrupted.
    sys::before_exec(&mut command, || Ok(set_pdeathsig(Signal::SIGTERM)?));
    let status = command
        .arg(format!("--variant={VARIANT}"))
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(SUITE)
        .arg(partial)
        .arg(&mirror)
        .arg(SCRIPT)
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("starting debootstrap")?;
    ensure!(
        status.success(),
        "debootstrap failed (offline, or {mirror} lacks {SUITE}?); its log: {}",
        log_path.display()
    );
    let archives = partial.join("var/cache/apt/archives");
    if archives.is_dir() {
        fs::remove_dir_all(&archives).context("removing the downloaded packages")?;
    }
    Ok(partial.to_owned())
}

/// Installs the Debian package that holds a host tool, if the tool is missing, saying so.
pub fn require_tool(tool: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    if std::env::split_paths(&path)
        .chain(sbin)
        .any(|folder| folder.join(tool).is_file())
    {
        return Ok(());
    }
    eprintln!("lab: {tool} is missing: apt-get install {package}");
    let install = |arguments: &[&str]| -> Result<bool> {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(std::process::Stdio::null())
            .status()
            .context("starting apt-get")?;
        Ok(status.success())
    };
    let arguments = ["install", "-qq", "-y", "--no-install-recommends", package];
    // A fresh machine may have no package lists yet.
    if !install(&arguments)? {
        install(&["update", "-qq"])?;
        ensure!(install(&arguments)?, "apt-get could not install {package}");
    }
    Ok(())
}

/// The first Debian archive of this machine's own apt configuration.
fn debian_mirror() -> Result<String> {
    if let Some(mirror) = configured_archive()? {
        return Ok(mirror);
    }
    // Origins are known only once the package lists are there.
    let update = Command::new("apt-get").args(["update", "-qq"]).status();
    update.context("starting apt-get")?;
    match configured_archive()? {
        Some(mirror) => Ok(mirror),
        None => bail!("no Debian archive among this machine's apt sources to build the image from"),
    }
}

fn configured_archive() -> Result<Option<String>> {
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)"])
        .output()
        .context("asking apt-get for its archives")?;
    Ok(first_archive(&String::from_utf8_lossy(&targets.stdout)))
}

/// The first address of lines "ADDRESS ORIGIN LABEL" that belongs to the Debian archive proper:
/// third-party archives and the security archive carry no complete suite.
fn first_archive(lines: &str) -> Option<String> {
    lines.lines().find_map(|line| {
        let mut words = line.splitn(3, ' ');
        let (address, origin, label) = (words.next()?, words.next()?, words.next()?);
        (origin == "Debian" && label == "Debian").then(|| address.to_owned())
    })
}

fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("PAGEFERRY_CACHE") {
        return Ok(folder.into());
    }
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => match std::env::var_os("HOME") {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => bail!("neither PAGEFERRY_CACHE, XDG_CACHE_HOME nor HOME is set"),
        },
    };
    Ok(base.join("pageferry"))
}

fn inputs_hash() -> u64 {
    let inputs = format!(
        "{IMAGE_FORMAT} {SUITE} {SCRIPT} {VARIANT} {} {}",
        std::env::consts::ARCH,
        PACKAGES.join(",")
    );
    xxh3_64(inputs.as_bytes())
}

/// Raised when [`build`] does something different with the same inputs.
const IMAGE_FORMAT: u32 = 1;
const SUITE: &str = "testing";
/// Older debootstraps know no script for the present code name; that of sid serves every suite.
const SCRIPT: &str = "/usr/share/debootstrap/scripts/sid";
const VARIANT: &str = "minbase";
const PACKAGES: [&str; 10] = [
    "criu",
    "crun",
    "iproute2",
    "nftables",
    "nginx",
    "procps",
    "redis-server",
    "redis-tools",
    "runc",
    "tcpdump",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_first_archive_of_debian_itself() {
        let lines = "https://deb.example/node . Node\n\
                     http://mirror.example/security Debian Debian-Security\n\
                     http://mirror.example/debian Debian Debian\n\
                     http://other.example/debian Debian Debian\n";
        assert_eq!(
            first_archive(lines).as_deref(),
            Some("http://mirror.example/debian")
        );
        assert_eq!(first_archive("https://deb.example/node . Node\n"), None);
    }
}
