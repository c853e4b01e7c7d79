//! This node's ends of links, as journals keep them.

use serde::{Deserialize, Serialize};

use crate::link::LinkError;
use crate::link::netlink::Netlink;
use crate::link::port::Port;

/// This node's end of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// Its index, and that of the workload's end.
    ends: (u32, u32),
    /// For whoever reads the journal.
    name: String,
    bridge: String,
}

impl PortState {
    /// Of this port.
    pub fn of(port: &Port) -> Self {
        Self {
            ends: port.ends(),
            name: port.name().to_owned(),
            bridge: port.bridge().to_owned(),
        }
    }

    /// Those of `known` that are still there. Only in the boot in which they were written: after
    /// another one the same numbers mean other links.
    pub async fn again(known: &[Self]) -> Result<Vec<Port>, LinkError> {
        if known.is_empty() {
            return Ok(Vec::new());
        }
        let netlink = Netlink::open(None)?;
        let mut ports = Vec::new();
        for Self { ends, name, bridge } in known {
            let port = Port::again(&netlink, *ends, bridge).await?;
            if port.is_none() {
                tracing::debug!(name, "the link is gone");
            }
            ports.extend(port);
        }
        Ok(ports)
    }
}
