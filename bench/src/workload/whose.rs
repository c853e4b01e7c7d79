//! Whose a container is: one of the runtimes' ([`Runtime`]), or containerd's. Scenarios that do the
//! same with each have here what differs.

use anyhow::{Result, bail};

use super::contained::{Plan, Runtime};
use super::{Workload, container, containerd, podman_pod, redis};
use crate::lab::Lab;
use crate::lab::containerd::Engine;
use crate::lab::layer::LayerPlan;
use crate::lab::node::Node;

/// Who runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    Runtime(Runtime),
    Containerd,
}

impl Whose {
    pub const ALL: [Self; 4] = [
        Self::Runtime(Runtime::Runc),
        Self::Runtime(Runtime::Crun),
        Self::Runtime(Runtime::Podman),
        Self::Containerd,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Runtime(runtime) => runtime.name(),
            Self::Containerd => "containerd",
        }
    }

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|whose| whose.name() == name)
    }

    /// The program that asks CRIU.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Runtime(runtime) => runtime.program(),
            Self::Containerd => "runc",
        }
    }

    /// What its nodes have besides the image.
    pub const fn layer(self) -> &'static LayerPlan {
        match self {
            Self::Runtime(_) => &container::LAYER,
            Self::Containerd => &containerd::LAYER,
        }
    }

    /// Starts the engine of each node, where there is one that must run.
    pub fn start_engines(self, lab: &Lab) -> Result<Vec<Engine>> {
        match self {
            Self::Runtime(_) => Ok(Vec::new()),
            Self::Containerd => containerd::start_engines(lab),
        }
    }

    /// Starts a container at a node, to be started again should it end, if an engine has it.
    pub fn start(self, lab: &mut Lab, at: &str, plan: &Plan) -> Result<Workload> {
        match self {
            Self::Runtime(runtime) => container::start_with(lab, runtime, at, plan),
            Self::Containerd => containerd::start_with(lab, at, &containerd::RESTARTED, plan),
        }
    }

    /// The same with Redis in it, which listens.
    pub fn start_redis(self, lab: &mut Lab, at: &str) -> Result<Workload> {
        let workload = self.start(lab, at, &Plan::redis())?;
        workload.wait_until_it_listens(lab, redis::PORT)?;
        Ok(workload)
    }
}

impl Workload {
    /// Whether the Redis in its container is here as its owner's own: as [`Workload::is_here_as`],
    /// with all that is known of Redis, and of who starts it again.
    pub fn is_here(&self, node: &Node) -> Result<()> {
        if self.pod.is_some() {
            return podman_pod::check_here(node, self);
        }
        match (&self.container, &self.containerd) {
            (Some(container), _) => container::check_here(node, container, self.pid),
            (_, Some(id)) => {
                containerd::check_here(node, id, self.pid)?;
                containerd::check_restarted(node, id)
            }
            (None, None) => bail!("it is in no container"),
        }
    }

    /// Whether it is here as its owner's own, with what `plan` says in it.
    pub fn is_here_as(&self, node: &Node, plan: &Plan) -> Result<()> {
        match (&self.container, &self.containerd) {
            (Some(container), _) => container::check_here_as(node, container, self.pid, plan),
            (_, Some(id)) => containerd::check_here_as(node, id, self.pid, plan),
            (None, None) => bail!("it is in no container"),
        }
    }

    /// Whether nothing of its container is left at a node.
    pub fn is_gone(&self, node: &Node) -> Result<()> {
        if self.pod.is_some() {
            return podman_pod::check_gone(node, self);
        }
        match (&self.container, &self.containerd) {
            (Some(container), _) => container::check_gone(node, container),
            (_, Some(id)) => containerd::check_gone(node, id),
            (None, None) => bail!("it is in no container"),
        }
    }

    /// Whether what its root file system is made of is whole, of one with Redis in it.
    pub fn is_whole(&self, node: &Node) -> Result<()> {
        if self.pod.is_some() {
            // Made of images, and unmade.
            return Ok(());
        }
        match (&self.container, &self.containerd) {
            (Some(container), _) => container::check_whole(node, container),
            (_, Some(_)) => containerd::check_whole(node),
            (None, None) => bail!("it is in no container"),
        }
    }

    /// Ends it as an operator would, and sees that nothing is left.
    pub fn end(&self, node: &Node) -> Result<()> {
        if self.pod.is_some() {
            return podman_pod::end(node, self);
        }
        match (&self.container, &self.containerd) {
            (Some(container), _) => container::end(node, container),
            (_, Some(id)) => containerd::end(node, id),
            (None, None) => bail!("it is in no container"),
        }
    }
}
