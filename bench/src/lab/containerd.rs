//! The containerd of a node.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::node::Node;

/// A containerd at work. It stays as long as its lab.
#[derive(Debug)]
pub struct Engine {
    child: Child,
    config: String,
    log: PathBuf,
}

impl Engine {
    /// Starts the containerd of a node with a configuration that the node has. Its output is
    /// appended to its log in the folder of logs.
    pub fn start(node: &Node, config: &str, logs: &Path) -> Result<Self> {
        let mounts = format!("mkdir -p {STORE} && mount -t tmpfs tmpfs {STORE}");
        node.command("sh")?.args(["-ec", &mounts]).run()?;
        let folder = logs.join(node.name());
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        Self::run(node, config, folder.join("containerd.log"))
    }

    fn run(node: &Node, config: &str, log: PathBuf) -> Result<Self> {
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let command = node.command("containerd")?.args(["--config", config]);
        let command = command.stdin(Stdio::null()).stdout(output.try_clone()?);
        let mut engine = Self {
            child: command.stderr(output).spawn()?,
            config: config.to_owned(),
            log,
        };
        engine.wait(node)?;
        Ok(engine)
    }

    fn wait(&mut self, node: &Node) -> Result<()> {
        let deadline = Instant::now() + READY_TIME_MAX;
        while ctr(node, &["version"]).is_err() {
            let ended = self.child.try_wait().context("watching containerd")?;
            let (name, log) = (node.name(), self.log.display());
            if let Some(status) = ended {
                bail!("containerd of node {name} ended at its start: {status} (log: {log})");
            }
            ensure!(
                Instant::now() < deadline,
                "containerd of node {name} does not answer (log: {log})"
            );
            std::thread::sleep(READY_POLL);
        }
        Ok(())
    }

    /// `kill -9`, and a new one.
    pub fn restart(&mut self, node: &Node) -> Result<()> {
        self.kill()?;
        *self = Self::run(node, &self.config, self.log.clone())?;
        Ok(())
    }

    /// `kill -9`. Shims and containers go on.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("killing containerd")?;
        self.child.wait().context("reaping containerd")?;
        Ok(())
    }
}

/// Has the containerd of a node do something.
pub fn ctr(node: &Node, arguments: &[&str]) -> Result<String> {
    node.command("ctr")?.args(arguments).run()
}

/// Gives the containerd of a node the images of a file of that node, in one of its namespaces.
pub fn import(node: &Node, namespace: &str, file: &str) -> Result<()> {
    let import = ["images", "import", "--snapshotter", SNAPSHOTTER, file];
    let arguments = [&["--namespace", namespace], &import[..]].concat();
    ctr(node, &arguments).with_context(|| format!("importing the image {file}"))?;
    Ok(())
}

pub const SNAPSHOTTER: &str = "overlayfs";
/// Where containerd keeps images and snapshots: an overlay has none of its own on top.
const STORE: &str = "/var/lib/containerd";
const READY_TIME_MAX: Duration = Duration::from_secs(20);
const READY_POLL: Duration = Duration::from_millis(20);
