//! kubectl, as the administrator of the lab's cluster.
//!
//! It runs in the network of the lab's client, with the files of this machine.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::inside::Inside;

/// Runs kubectl.
#[derive(Debug)]
pub struct Kubectl {
    pub(super) program: PathBuf,
    pub(super) config: PathBuf,
    /// What it remembers of the API goes with the lab.
    pub(super) cache: PathBuf,
    pub(super) net: OwnedFd,
    pub(super) cgroups: Vec<PathBuf>,
}

impl Kubectl {
    /// A command with all that it needs to reach the cluster.
    pub fn command(&self) -> Result<Inside> {
        self.plugin(&self.program)
    }

    /// The same for another program that reaches the cluster as kubectl does.
    pub fn plugin(&self, program: &Path) -> Result<Inside> {
        Inside::new(&program.display().to_string())
            .env("KUBECONFIG", &self.config.display().to_string())
            .env("KUBECACHEDIR", &self.cache.display().to_string())
            .cgroups(&self.cgroups)
            .enter(&self.net)
    }

    /// What it printed. It is ended, with an error, when the API server does not answer.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let command = self.command()?.arg(TIME_MAX).args(arguments);
        command
            .run()
            .with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// As [`Kubectl::run`], as JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let printed = self.run(&all)?;
        serde_json::from_str(&printed)
            .with_context(|| format!("reading what kubectl {} printed", arguments.join(" ")))
    }

    /// Makes or changes objects, in YAML or JSON.
    pub fn apply(&self, objects: &str) -> Result<String> {
        let command = self
            .command()?
            .arg(TIME_MAX)
            .args(["apply", "--filename", "-"]);
        command.run_with_input(objects).context("kubectl apply")
    }

    /// Has the API server forget a pod at once, if it is still the one of this UID.
    pub fn delete_pod(&self, name: &str, uid: &str) -> Result<()> {
        let options = json!({
            "apiVersion": "v1", "kind": "DeleteOptions",
            "gracePeriodSeconds": 0, "preconditions": {"uid": uid},
        });
        let path = format!("/api/v1/namespaces/default/pods/{name}");
        let command =
            self.command()?
                .arg(TIME_MAX)
                .args(["delete", "--raw", &path, "--filename", "-"]);
        command
            .run_with_input(&options.to_string())
            .with_context(|| format!("deleting the pod {name}"))?;
        Ok(())
    }
}

const TIME_MAX: &str = "--request-timeout=20s";
