//! The programs of a cluster, built from Go modules once and kept in the lab's cache.
//!
//! What is kept is a layer of the nodes' root: `usr/local/bin` with one program for all parts,
//! under the name of each, and the program that holds a pod's namespaces.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use xxhash_rust::xxh3::xxh3_64;

use crate::lab::image;
use crate::lab::layer::{self, LayerPlan};
use crate::sys;

/// The version of Kubernetes, such as `1.37.2`.
pub fn version() -> &'static str {
    let line = MODULE
        .lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes v"));
    line.expect("go.mod requires Kubernetes")
}

/// Where the programs are, building them first when the cache does not have them. Returns the
/// folder to be put over a node's root.
///
/// # Errors
/// Offline, or when the build fails.
pub fn ensure_programs() -> Result<PathBuf> {
    let inputs = [FORMAT, MODULE, MAIN, PAUSE, std::env::consts::ARCH].join("\0");
    let kind = format!("kubernetes-{}", version());
    image::cached(&kind, xxh3_64(inputs.as_bytes()), build)
}

fn build(partial: &Path, log_path: &Path) -> Result<PathBuf> {
    let (sources, root) = (partial.join("go"), partial.join("root"));
    let programs = root.join(PROGRAMS);
    write(&sources.join("go.mod"), MODULE)?;
    write(&sources.join("main.go"), MAIN)?;
    write(&sources.join("pause/main.go"), PAUSE)?;
    fs::create_dir_all(&programs).with_context(|| format!("creating {}", programs.display()))?;
    // They stand for those of the root itself, whatever the umask of whoever makes them.
    for folder in programs
        .ancestors()
        .take(Path::new(PROGRAMS).iter().count() + 1)
    {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    let go = Go::find(sources, log_path)?;
    eprintln!(
        "lab: building Kubernetes {} from Go modules (once, some ten minutes; log: {})",
        version(),
        log_path.display()
    );
    let started = Instant::now();
    go.run(&["mod", "download", "k8s.io/kubernetes"], None)?;
    let packages = go.packages()?;
    let flags = linker_flags();
    for (package, name) in [("./pause", PAUSE_NAME), (".", PARTS[0])] {
        let target = programs.join(name).display().to_string();
        let arguments = [
            "build",
            "-v",
            "-trimpath",
            "-ldflags",
            &flags,
            "-o",
            &target,
            package,
        ];
        go.run(&arguments, Some(packages))?;
    }
    for part in &PARTS[1..] {
        symlink(PARTS[0], programs.join(part)).context("naming a part of Kubernetes")?;
    }
    eprintln!("lab: built Kubernetes in {} s", started.elapsed().as_secs());
    Ok(root)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().context("a source file has a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("writing {}", path.display()))
}

/// What the programs say their version is; without symbols they are two thirds of the size.
fn linker_flags() -> String {
    let version = version();
    let mut flags = "-s -w".to_owned();
    for package in [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ] {
        let mut numbers = version.split('.').map(str::to_owned);
        for (name, value) in [
            ("gitVersion", Some(format!("v{version}"))),
            ("gitMajor", numbers.next()),
            ("gitMinor", numbers.next()),
        ] {
            flags += &format!(" -X {package}.{name}={}", value.unwrap_or_default());
        }
    }
    flags
}

/// The Go of this machine, at work in a folder of sources.
struct Go {
    program: PathBuf,
    sources: PathBuf,
    log: PathBuf,
}

impl Go {
    fn find(sources: PathBuf, log: &Path) -> Result<Self> {
        let program = match installed_go() {
            Some(program) => program,
            None => debian_go()?,
        };
        File::create(log).with_context(|| format!("creating {}", log.display()))?;
        Ok(Self {
            program,
            sources,
            log: log.to_owned(),
        })
    }

    /// Behind all others who use the processor.
    fn start(&self, arguments: &[&str], stdout: Stdio) -> Result<Child> {
        let log = File::options().append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = Command::new("nice");
        // It must not go on by itself when the lab is interrupted.
        sys::before_exec(&mut command, || Ok(set_pdeathsig(Signal::SIGTERM)?));
        command
            .args(["-n", "19"])
            .arg(&self.program)
            .args(arguments)
            .current_dir(&self.sources)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=mod -buildvcs=false")
            .env("GOWORK", "off")
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))
    }

    /// Runs it to its end, and says from time to time how far it is, if it builds `packages` at
    /// most.
    fn run(&self, arguments: &[&str], packages: Option<usize>) -> Result<()> {
        let mut child = self.start(arguments, Stdio::null())?;
        let (started, mut said) = (Instant::now(), Instant::now());
        loop {
            if let Some(status) = child.try_wait().context("watching go")? {
                ensure!(
                    status.success(),
                    self.failure(arguments, &status.to_string())
                );
                return Ok(());
            }
            if BUILD_TIME_MAX < started.elapsed() {
                child.kill().context("ending go")?;
                child.wait().context("ending go")?;
                bail!(self.failure(arguments, "it took too long and was ended"));
            }
            if let Some(packages) = packages.filter(|_| PROGRESS_PERIOD < said.elapsed()) {
                said = Instant::now();
                eprintln!(
                    "lab: {} s, {} of {packages} packages",
                    started.elapsed().as_secs(),
                    self.compiled()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// How many packages the programs consist of. Fetches the modules.
    fn packages(&self) -> Result<usize> {
        let arguments = ["list", "-deps", "."];
        let mut child = self.start(&arguments, Stdio::piped())?;
        let mut listed = String::new();
        let mut stdout = child.stdout.take().context("stdout was just asked for")?;
        stdout.read_to_string(&mut listed).context("hearing go")?;
        let status = child.wait().context("waiting for go")?;
        ensure!(
            status.success(),
            self.failure(&arguments, &status.to_string())
        );
        Ok(listed.lines().count())
    }

    /// How many packages are built, as the log says: a line each, beside those of modules.
    fn compiled(&self) -> usize {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| !line.contains(' ')).count()
    }

    fn failure(&self, arguments: &[&str], how: &str) -> String {
        format!(
            "go {} failed: {how} (offline, or a Go older than go.mod asks for?); its log: {}",
            arguments[0],
            self.log.display()
        )
    }
}

/// The Go of this machine, if it has one.
fn installed_go() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = PathBuf::from("/usr/local/go/bin");
    std::env::split_paths(&path)
        .chain([usual])
        .map(|folder| folder.join("go"))
        .find(|program| program.is_file())
}

/// Debian's, in the lab's cache.
fn debian_go() -> Result<PathBuf> {
    let layer = layer::ensure_layer(&image::ensure_image()?, &GO_LAYER)?;
    let link = layer.join("usr/bin/go");
    let inside = fs::read_link(&link).with_context(|| format!("reading {}", link.display()))?;
    // Relative to where the link is, whichever version that is.
    Ok(layer.join("usr/bin").join(inside))
}

/// Where programs are below the root of a node.
pub const PROGRAMS: &str = "usr/local/bin";
/// Process 1 of pods.
pub const PAUSE_NAME: &str = "pause";
/// The program's names; the first one is its own.
const PARTS: [&str; 6] = [
    "kubelet",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
];
/// For machines without Go: the compiler alone.
const GO_LAYER: LayerPlan = LayerPlan {
    name: "golang",
    packages: &["golang-go"],
    files: &[],
    script: "",
};
/// Raised when [`build`] does something different with the same inputs.
const FORMAT: &str = "1";
/// The one place that names versions.
const MODULE: &str = include_str!("go/go.mod");
const MAIN: &str = include_str!("go/main.go");
const PAUSE: &str = include_str!("go/pause/main.go");
/// Six minutes on two idle cores.
const BUILD_TIME_MAX: Duration = Duration::from_secs(60 * 60);
const PROGRESS_PERIOD: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_modules_of_kubernetes_are_of_one_version() {
        let own = format!("v{}", version());
        let staging = format!("v0.{}", version().split_once('.').expect("a version").1);
        let replaced: Vec<&str> = MODULE.lines().filter(|line| line.contains("=>")).collect();
        assert!(!replaced.is_empty());
        for line in replaced {
            assert!(line.ends_with(&staging), "{line}");
        }
        assert!(linker_flags().contains(&format!("gitVersion={own}")));
    }
}
