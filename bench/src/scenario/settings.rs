//! What the command line may change about a scenario, and the lab that it gets.

use anyhow::{Result, ensure};

use crate::lab::layer::LayerPlan;
use crate::lab::network::{BRIDGE, Link};
use crate::lab::{Lab, LabOptions};
use crate::mover::Mover;
use crate::workload::container::Runtime;

/// What the command line may change about a scenario.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Absent: what the scenario is defined with.
    pub link: Option<Link>,
    /// Leave the lab up afterwards.
    pub keep: bool,
    /// Who moves; by stock CRIU, the scenario itself is checked.
    pub mover: &'static dyn Mover,
    /// Of a scenario with cases, only this one.
    pub only: Option<String>,
    /// Move a container of this runtime.
    pub container: Option<Runtime>,
}

impl Settings {
    /// Brings up the lab of a scenario, with what its mover needs.
    pub fn lab(&self, nodes: usize) -> Result<Lab> {
        self.lab_for(self.mover, nodes)
    }

    /// As [`Settings::lab`], with a layer over the node image.
    pub fn lab_with(&self, layer: &'static LayerPlan, nodes: usize) -> Result<Lab> {
        self.bring_up(self.mover, Some(layer), nodes)
    }

    /// Brings up the lab of a scenario that has a mover of its own.
    pub fn lab_for(&self, mover: &dyn Mover, nodes: usize) -> Result<Lab> {
        self.bring_up(mover, None, nodes)
    }

    fn bring_up(
        &self,
        mover: &dyn Mover,
        layer: Option<&'static LayerPlan>,
        nodes: usize,
    ) -> Result<Lab> {
        let link = self.link.clone().unwrap_or(Link::Unshaped);
        Lab::up(&LabOptions {
            nodes,
            link,
            daemons: mover.needs_daemons(),
            bridge: BRIDGE,
            layer,
            programs: None,
            keep: self.keep,
        })
    }

    /// # Errors
    /// `otherwise`, when another mover than pageferry is asked for.
    pub fn need_pageferry(&self, otherwise: &'static str) -> Result<()> {
        ensure!(self.mover.needs_daemons(), otherwise);
        Ok(())
    }
}

/// The other one of a scenario's two nodes.
pub fn other(node: &str) -> &'static str {
    if node == "a" { "b" } else { "a" }
}
