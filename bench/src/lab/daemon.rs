//! The daemons of a lab: certificates, configuration, start, death and restart.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::node::Node;

/// The `pageferryd` of one node, started by this process.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

/// How a daemon is to be, where that may differ.
#[derive(Clone, Copy, Debug)]
pub struct DaemonPlan {
    /// Whether its CRIU has a tracer.
    pub tracer: bool,
    /// How it keeps what comes for a frozen workload.
    pub parking: &'static str,
    /// Whether it says what it counts. Builds before the endpoint know no such key.
    pub metrics: bool,
}

impl Default for DaemonPlan {
    /// As one is by itself.
    fn default() -> Self {
        Self {
            tracer: true,
            parking: "auto",
            metrics: false,
        }
    }
}

/// Makes one authority for the lab and gives each node its certificate and its configuration.
///
/// The authority's key stays in the first node's folder of the lab, where nobody else looks.
pub fn configure(nodes: &[Node], bridge: &str) -> Result<()> {
    let first = nodes.first().context("a lab has at least one node")?;
    first.command("mkdir")?.args(["-p", CONFIG_FOLDER]).run()?;
    pageferry(first, &["ca", "init", "--dir", AUTHORITY])?;
    for node in nodes {
        pageferry(first, &["ca", "issue", node.name(), "--dir", AUTHORITY])?;
        let issued = first.path(AUTHORITY).join(node.name());
        let config = node.path(CONFIG_FOLDER);
        fs::create_dir_all(&config).with_context(|| format!("creating {}", config.display()))?;
        for file in ["ca.pem", "node.pem", "node.key"] {
            fs::copy(issued.join(file), config.join(file))
                .with_context(|| format!("giving node {} its {file}", node.name()))?;
        }
        write_config(node, nodes, bridge, &DaemonPlan::default())?;
    }
    Ok(())
}

/// Says how the daemon of a node is to be, from its next start on.
pub fn write_config(node: &Node, nodes: &[Node], bridge: &str, plan: &DaemonPlan) -> Result<()> {
    let path = node.path(CONFIG_FOLDER).join("pageferryd.toml");
    let text = config_text(node, nodes, bridge, plan);
    fs::write(path, text).context("writing the configuration")
}

fn pageferry(node: &Node, arguments: &[&str]) -> Result<String> {
    node.command("pageferry")?
        .args(arguments)
        .run()
        .context("making certificates")
}

fn config_text(node: &Node, nodes: &[Node], bridge: &str, plan: &DaemonPlan) -> String {
    let DaemonPlan {
        tracer, parking, ..
    } = plan;
    let metrics = match plan.metrics {
        true => format!("metrics = \"{METRICS}\"\n"),
        false => String::new(),
    };
    let mut text = format!(
        "node = \"{}\"\nlisten = \"{}:{PORT}\"\npostcopy = true\n{metrics}\n\
         [network]\nbridge = \"{bridge}\"\nparking = \"{parking}\"\n\
         \n[criu]\ntracer = {tracer}\n",
        node.name(),
        node.address()
    );
    for peer in nodes.iter().filter(|peer| peer.name() != node.name()) {
        text += &format!(
            "\n[[peer]]\nname = \"{}\"\naddress = \"{}:{PORT}\"\n",
            peer.name(),
            peer.address()
        );
    }
    text
}

impl Daemon {
    /// Starts the daemon of a node; its output is appended to its log. [`Daemon::wait_ready`] says
    /// when it can be used.
    pub fn start(node: &Node, logs: &Path) -> Result<Self> {
        let folder = logs.join(node.name());
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let log = folder.join("pageferryd.log");
        let output = OpenOptions::new().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let filter = std::env::var("PAGEFERRY_LOG").unwrap_or_else(|_| LOG_FILTER.to_owned());
        let command = node.command("pageferryd")?.env("PAGEFERRY_LOG", &filter);
        let command = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Self {
            child: command.spawn()?,
            log,
        })
    }

    /// Waits until its API answers.
    pub fn wait_ready(&mut self, node: &Node) -> Result<()> {
        let deadline = Instant::now() + READY_TIME_MAX;
        loop {
            if let Some(status) = self.child.try_wait().context("watching a daemon")? {
                bail!(
                    "pageferryd of node {} ended at its start: {status} (log: {})",
                    node.name(),
                    self.log.display()
                );
            }
            let list = node.command("pageferry")?.arg("list").output()?;
            if list.status.success() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "pageferryd of node {} does not answer: {} (log: {})",
                node.name(),
                String::from_utf8_lossy(&list.stderr).trim_end(),
                self.log.display()
            );
            std::thread::sleep(READY_POLL);
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("killing a daemon")?;
        self.child.wait().context("reaping a daemon")?;
        Ok(())
    }

    /// As the host sees it.
    pub fn host_pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// Keeps what CRIU and the daemons logged inside the nodes: it goes when they go.
pub fn keep_logs(node: &Node, logs: &Path) -> Result<()> {
    let into = logs.join(node.name());
    fs::create_dir_all(&into).with_context(|| format!("creating {}", into.display()))?;
    for folder in ["/run/pageferry", "/var/lib/pageferry"] {
        let from = node.path(folder);
        if from.is_dir() {
            copy_logs(&from, &into, "")?;
        }
    }
    Ok(())
}

/// Copies every `*.log` below `from`, its path in its name.
fn copy_logs(from: &Path, into: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let entry = entry.context("listing logs")?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().context("listing logs")?;
        if kind.is_dir() {
            copy_logs(&entry.path(), into, &format!("{name}-"))?;
        } else if kind.is_file() && name.ends_with(".log") {
            let target = into.join(&name);
            let mut source = File::open(entry.path()).context("opening a log")?;
            let mut copy = File::create(&target).context("keeping a log")?;
            std::io::copy(&mut source, &mut copy).context("keeping a log")?;
        }
    }
    Ok(())
}

const CONFIG_FOLDER: &str = "/etc/pageferry";
const AUTHORITY: &str = "/etc/pageferry/authority";
const PORT: u16 = 7440;
/// Where each daemon says what it counts, in the network of its node.
pub const METRICS: &str = "127.0.0.1:9464";
/// What daemons log unless the environment's `PAGEFERRY_LOG` says otherwise.
const LOG_FILTER: &str = "info";
/// A cold start probes the kernel through CRIU first.
const READY_TIME_MAX: Duration = Duration::from_secs(20);
const READY_POLL: Duration = Duration::from_millis(20);
