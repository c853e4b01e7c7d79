//! The loopback of the workload's network, which is shut while the workload is frozen: of two ends
//! of a connection one is dumped before the other, and what the kernel sends meanwhile would be in
//! neither image.
//!
//! Invariants: it is shut before the first look at a frozen tree, and opened before CRIU lets go of
//! one, whose sockets have much to say then. That of the node, which a workload without a network
//! of its own has, is never touched; such a workload is refused if it has an inet socket.

use std::sync::Arc;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_sys::namespace::{self, NamespaceKind};
use tokio::task::block_in_place;

use super::network::Sockets;
use super::workload::Workload;
use crate::link::loopback::LoGate;
use crate::migration::text::{chain, internal, network_unfit};

/// What shuts and opens it.
#[derive(Debug, Default)]
pub(super) enum Loopback {
    /// There is nothing to shut: it is the node's, or the tree is not tracked; or it cannot be shut
    /// here, and a workload that uses it is refused.
    #[default]
    None,
    Gate(LoGate),
    /// It could not be opened, for that reason, and was given up.
    Broken(Arc<str>),
}

impl Loopback {
    /// Makes what shuts it, before the first freeze would have to wait for that. Where it cannot be
    /// made, `sockets` are told.
    pub(super) fn of(workload: &Workload, sockets: &mut Sockets) -> Result<Self, Failure> {
        if !workload.own.contains(&NamespaceKind::Net) {
            return Ok(Self::None);
        }
        let net = namespace::open(workload.root(), NamespaceKind::Net);
        let net = net.map_err(|error| internal(&error))?;
        workload.check_root()?;
        match block_in_place(|| LoGate::make(&net)) {
            Ok(gate) => Ok(Self::Gate(gate)),
            Err(error) => {
                let why = chain(&error);
                tracing::info!(
                    root = workload.root(),
                    "a workload with connections over \
                    loopback could not be moved: {why}"
                );
                sockets.ungated(&why);
                Ok(Self::None)
            }
        }
    }

    /// From here on nothing passes but what CRIU sends itself.
    pub(super) fn shut(&self) -> Result<(), Failure> {
        match self {
            Self::None => Ok(()),
            Self::Gate(gate) => gate.shut().map_err(|error| network_unfit(&error)),
            Self::Broken(why) => {
                let text = format!("the loopback of the workload cannot be shut again: {why}");
                Err(Failure::new(ErrorCode::Internal, text))
            }
        }
    }

    /// From here on everything passes. A gate that cannot be opened is given up, which opens it.
    pub(super) fn open(&mut self) {
        if let Self::Gate(gate) = self
            && let Err(error) = gate.open()
        {
            let why = chain(&error);
            tracing::warn!("the gate of a workload's loopback is given up: {why}");
            *self = Self::Broken(why.into());
        }
    }
}
