//! A lab: nodes of its own on one machine, their network, and the daemons on them.
//!
//! Invariants: the host's files, namespaces and interfaces stay as they are, apart from the run
//! folder, the cache and cgroups named `pageferry-lab`. There is one lab at a time. Whatever way
//! the process ends (success, error, panic, a signal), the lab comes down, unless it was asked to
//! stay; after a SIGKILL the next `lab` command finds the leftovers by cgroup and removes them.

pub mod cgroup;
pub mod containerd;
pub mod daemon;
pub mod image;
pub mod init;
pub mod inside;
pub mod layer;
pub mod network;
pub mod node;
pub mod pids;
pub mod state;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::Flock;
use nix::sys::signal::{SigSet, Signal};

use daemon::{Daemon, DaemonPlan};
use layer::LayerPlan;
use network::Link;
use node::{Holder, Node, NodePlan};
use state::{RunFolder, State};

/// What a lab is to have.
#[derive(Debug)]
pub struct LabOptions {
    pub nodes: usize,
    pub link: Link,
    /// Start `pageferryd` on each node.
    pub daemons: bool,
    /// Of which bridge the links of workloads are ports, to the daemons.
    pub bridge: &'static str,
    /// What nodes have besides the node image, made when it is first asked for.
    pub layer: Option<&'static LayerPlan>,
    /// A folder that lies over all of that: programs that were not installed.
    pub programs: Option<PathBuf>,
    /// Leave it up when this process ends.
    pub keep: bool,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    pub folder: RunFolder,
    pub nodes: Vec<Node>,
    pub switch: Holder,
    pub client: Holder,
    /// By index of their nodes; none in a lab without daemons, or of another process.
    pub daemons: Vec<Daemon>,
    state: State,
    /// Held by the process that may change the lab.
    _lock: Option<Flock<File>>,
}

impl Lab {
    /// Brings a lab up; it comes down again when the value is dropped, unless it is to be kept.
    pub fn up(options: &LabOptions) -> Result<Self> {
        let lab_binary = lab_binary()?;
        let built = lab_binary.parent();
        Self::up_with(options, built.context("the lab's binary is in a folder")?)
    }

    /// The same with the programs under test from another folder than that of the lab's own.
    pub fn up_with(options: &LabOptions, built: &Path) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab needs root");
        ensure!(
            (1..=NODES_MAX).contains(&options.nodes),
            "a lab has 1 to {NODES_MAX} nodes"
        );
        let folder = RunFolder::new();
        let lock = folder.lock()?;
        refuse_or_clean(&folder)?;
        clean_on_exit(&folder);
        let mut layers = vec![image::ensure_image()?];
        if let Some(plan) = options.layer {
            layers.insert(0, layer::ensure_layer(&layers[0], plan)?);
        }
        if let Some(programs) = &options.programs {
            layers.insert(0, programs.clone());
        }
        folder.clear_logs()?;
        let mut state = State {
            kept: options.keep,
            link: options.link.to_string(),
            daemons: options.daemons,
            bridge: options.bridge.to_owned(),
            programs: options.programs.clone(),
            hierarchies: cgroup::hierarchies()?,
            ..State::default()
        };
        folder.store(&state)?;
        match build(&folder, (layers, built), options, &mut state) {
            Ok(Built {
                nodes,
                switch,
                client,
                daemons,
            }) => Ok(Self {
                folder,
                nodes,
                switch,
                client,
                daemons,
                state,
                _lock: Some(lock),
            }),
            Err(error) => {
                clean_once(&folder);
                Err(error)
            }
        }
    }

    /// A lab that another process brought up and left; it stays up when the value is dropped.
    pub fn attach() -> Result<Self> {
        let folder = RunFolder::new();
        let Some(state) = folder.load()? else {
            bail!("no lab is up (lab up)")
        };
        let holder = |pid: Option<i32>| Holder::open(pid.context("the lab is not complete")?);
        let nodes = state
            .nodes
            .iter()
            .cloned()
            .map(Node::open)
            .collect::<Result<Vec<_>>>();
        Ok(Self {
            nodes: nodes.context("the lab is broken (lab down)")?,
            switch: holder(state.switch_pid)?,
            client: holder(state.client_pid)?,
            daemons: Vec::new(),
            folder,
            state,
            _lock: None,
        })
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        let node = self.nodes.iter().find(|node| node.name() == name);
        node.with_context(|| format!("the lab has no node {name:?}"))
    }

    /// The daemon of a node, to be killed or restarted.
    pub fn daemon(&mut self, name: &str) -> Result<&mut Daemon> {
        let index = self.nodes.iter().position(|node| node.name() == name);
        let index = index.with_context(|| format!("the lab has no node {name:?}"))?;
        self.daemons
            .get_mut(index)
            .context("this lab has no daemons")
    }

    /// Starts the daemon of a node anew, after it was killed, and waits until it answers.
    pub fn restart_daemon(&mut self, name: &str) -> Result<()> {
        let index = self.nodes.iter().position(|node| node.name() == name);
        let index = index.with_context(|| format!("the lab has no node {name:?}"))?;
        let node = &self.nodes[index];
        let mut daemon = Daemon::start(node, &self.folder.logs())?;
        daemon.wait_ready(node)?;
        self.daemons[index] = daemon;
        Ok(())
    }

    /// Replaces all daemons by others. No migration may be under way.
    pub fn restart_daemons(&mut self, plan: &DaemonPlan) -> Result<()> {
        let names: Vec<String> = self
            .nodes
            .iter()
            .map(|node| node.name().to_owned())
            .collect();
        for name in names {
            let bridge = &self.state.bridge;
            daemon::write_config(self.node(&name)?, &self.nodes, bridge, plan)?;
            self.daemon(&name)?.kill()?;
            self.restart_daemon(&name)?;
        }
        Ok(())
    }

    /// Whether moves are pageferry's or those of stock CRIU.
    pub fn has_daemons(&self) -> bool {
        self.state.daemons
    }

    /// The folder that lies over the nodes' image and layer, if any.
    pub fn programs(&self) -> Option<&Path> {
        self.state.programs.as_deref()
    }

    /// Leaves it up when the value is dropped.
    pub fn keep(&mut self) -> Result<()> {
        self.state.kept = true;
        self.folder.store(&self.state)
    }

    /// Cgroups of the lab that are no node's, made when they are first asked for.
    pub fn cgroups(&self, name: &str) -> Result<Vec<PathBuf>> {
        cgroup::create(&self.state.hierarchies, name)
    }

    /// Gives its links another speed.
    pub fn reshape(&mut self, link: &Link) -> Result<()> {
        network::reshape(&self.switch.net, &self.nodes, link)?;
        self.state.link = link.to_string();
        self.folder.store(&self.state)
    }

    pub fn link(&self) -> &str {
        &self.state.link
    }

    /// How many workloads were started: the number of the next one.
    pub fn workloads(&self) -> usize {
        self.state.workloads
    }

    /// A number for a workload that no other workload of this lab has: its address and the name of
    /// its link are made of it.
    pub fn next_workload(&mut self) -> Result<usize> {
        let number = self.state.workloads;
        ensure!(
            number < WORKLOADS_MAX,
            "a lab has addresses for {WORKLOADS_MAX} workloads"
        );
        self.state.workloads += 1;
        self.folder.store(&self.state)?;
        Ok(number)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self._lock.is_none() {
            return;
        }
        for node in &self.nodes {
            if let Err(error) = daemon::keep_logs(node, &self.folder.logs()) {
                eprintln!("lab: keeping the logs of node {}: {error:#}", node.name());
            }
        }
        if !self.state.kept {
            clean_once(&self.folder);
        }
    }
}

/// What is made when a lab is brought up.
struct Built {
    nodes: Vec<Node>,
    switch: Holder,
    client: Holder,
    daemons: Vec<Daemon>,
}

fn build(
    folder: &RunFolder,
    (mut layers, built): (Vec<PathBuf>, &Path),
    options: &LabOptions,
    state: &mut State,
) -> Result<Built> {
    let lab_binary = lab_binary()?;
    make_layer(&folder.layer(), (&lab_binary, built), options.daemons)?;
    layers.insert(0, folder.layer());
    let (scratch, shared) = (folder.scratch(), folder.shared());
    std::fs::create_dir_all(&shared).context("creating the shared folder")?;
    let plan = NodePlan {
        lab_binary: &lab_binary,
        nodes: options.nodes,
        layers: &layers,
        scratch: &scratch,
        shared: &shared,
        hierarchies: &state.hierarchies,
    };
    let mut nodes = Vec::new();
    for index in 0..options.nodes {
        let name = node_name(index);
        let cgroups = cgroup::create(&state.hierarchies, &name)?;
        let address = network::node_address(index);
        nodes.push(Node::start(&plan, &name, index, address, cgroups)?);
    }
    let cgroups = cgroup::create(&state.hierarchies, "network")?;
    let switch = Holder::start(&lab_binary, &cgroups)?;
    let client = Holder::start(&lab_binary, &cgroups)?;
    network::build(&switch.net, &client.net, &nodes, &options.link)?;
    state.nodes = nodes.iter().map(|node| node.record.clone()).collect();
    state.switch_pid = Some(switch.pid);
    state.client_pid = Some(client.pid);
    folder.store(state)?;
    let daemons = if options.daemons {
        start_daemons(&nodes, folder, options.bridge)?
    } else {
        Vec::new()
    };
    Ok(Built {
        nodes,
        switch,
        client,
        daemons,
    })
}

fn start_daemons(nodes: &[Node], folder: &RunFolder, bridge: &str) -> Result<Vec<Daemon>> {
    daemon::configure(nodes, bridge)?;
    let start = |node| Daemon::start(node, &folder.logs());
    let mut daemons = nodes.iter().map(start).collect::<Result<Vec<_>>>()?;
    for (daemon, node) in daemons.iter_mut().zip(nodes) {
        daemon.wait_ready(node)?;
    }
    Ok(daemons)
}

/// Takes down a lab that another process left.
pub fn down() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the lab needs root");
    let folder = RunFolder::new();
    let _lock = folder.lock()?;
    folder.clean()
}

/// A kept lab is somebody's; anything else whose maker holds no lock any more is a leftover.
fn refuse_or_clean(folder: &RunFolder) -> Result<()> {
    match folder.load() {
        Ok(Some(state)) if state.kept => {
            bail!("a lab is up already (lab status); take it down first: lab down")
        }
        Ok(None) => {}
        Ok(Some(_)) | Err(_) => eprintln!("lab: removing what a killed lab left"),
    }
    folder.clean()
}

/// Takes the lab down when this process ends by a panic or a signal. To be called first before
/// other threads are started: they inherit the blocked signals, so that only one thread gets them.
fn clean_on_exit(folder: &RunFolder) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| install_clean_up(folder));
}

fn install_clean_up(folder: &RunFolder) {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .expect("blocking valid signals cannot fail");
    let at_signal = folder.clone();
    std::thread::spawn(move || {
        let signal = signals
            .wait()
            .expect("waiting for valid signals cannot fail");
        eprintln!("lab: {signal}: taking the lab down");
        clean_once(&at_signal);
        std::process::exit(128 + signal as i32);
    });
    let at_panic = folder.clone();
    let earlier = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        earlier(panic);
        clean_once(&at_panic);
        // A lab without its driver is of no use: other threads must not go on in it.
        std::process::exit(101);
    }));
}

fn clean_once(folder: &RunFolder) {
    static CLEANING: Mutex<()> = Mutex::new(());
    let _turn = CLEANING.lock();
    if let Err(error) = folder.clean() {
        eprintln!("lab: clean-up: {error:#}");
    }
}

/// The `lab` binary: this one, or (in tests) the one beside it.
fn lab_binary() -> Result<PathBuf> {
    std::env::current_exe().context("finding the lab's own binary")
}

/// Copies the binaries under test to where nodes see them. A copy, so that a build during a run
/// changes nothing in a running lab.
fn make_layer(layer: &Path, (lab_binary, built): (&Path, &Path), daemons: bool) -> Result<()> {
    for (name, folder, need) in BINARIES {
        let source = match need {
            Need::Always => lab_binary.with_file_name(name),
            _ => built.join(name),
        };
        if !source.is_file() {
            let needed = match need {
                Need::Always => true,
                Need::WithDaemons => daemons,
                Need::WithKubernetes => false,
            };
            ensure!(
                !needed,
                "{} is not built (cargo build --workspace)",
                source.display()
            );
            continue;
        }
        let folder = layer.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let target = folder.join(name);
        fs::copy(&source, &target).with_context(|| format!("copying {}", source.display()))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Which labs are useless without a binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Always,
    WithDaemons,
    /// Who starts it says so.
    WithKubernetes,
}

fn node_name(index: usize) -> String {
    let letter = u8::try_from(index).map(|index| b'a' + index);
    char::from(letter.expect("the lab bounds its nodes")).to_string()
}

/// One letter and one address each; more nodes than this say nothing new on one machine.
const NODES_MAX: usize = 8;
/// Addresses 10.90.0.101 to 10.90.0.250.
const WORKLOADS_MAX: usize = 150;
/// Name, folder in the node, need.
const BINARIES: [(&str, &str, Need); 13] = [
    ("lab", "usr/local/bin", Need::Always),
    ("lab-writer", "usr/local/bin", Need::Always),
    ("lab-cases", "usr/local/bin", Need::Always),
    ("pageferry", "usr/local/bin", Need::WithDaemons),
    ("pageferryd", "usr/local/bin", Need::WithDaemons),
    ("pageferry-pager", "usr/local/bin", Need::WithDaemons),
    ("pageferry-criu", "usr/local/bin", Need::WithDaemons),
    ("pageferry-oci", "usr/local/bin", Need::WithDaemons),
    ("pageferry-containerd", "usr/local/bin", Need::WithDaemons),
    ("pageferry-agent", "usr/local/bin", Need::WithKubernetes),
    // The set-up puts it where CNI's plugins are.
    ("pageferry-ipam", "usr/local/bin", Need::WithDaemons),
    // What is in the images of a cluster's own pods.
    (
        "pageferry-controller",
        "usr/local/bin",
        Need::WithKubernetes,
    ),
    ("libcriu_view.so", "usr/lib/pageferry", Need::WithDaemons),
];
