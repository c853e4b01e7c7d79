//! Who is in a network of podman's, and which addresses they have of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use serde::Deserialize;

use super::command::{podman_within, told};

/// How long podman may take to say who is in a network. It waits for a lock of each of them, which
/// whoever comes or leaves at the moment has.
const MEMBERS_MAX: Duration = Duration::from_secs(3);

/// Who is in one, as `podman network inspect` tells.
#[derive(Debug, Deserialize)]
pub(super) struct Members {
    #[serde(default)]
    containers: BTreeMap<String, Member>,
}

/// Who is in a network.
#[derive(Debug, Deserialize)]
struct Member {
    #[serde(default)]
    name: String,
    #[serde(default)]
    interfaces: BTreeMap<String, Interface>,
}

/// A link of a container in a network.
#[derive(Debug, Deserialize)]
pub(super) struct Interface {
    #[serde(default)]
    pub(super) subnets: Vec<Given>,
}

/// An address that was given out.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Given {
    pub(super) ipnet: Prefix,
    #[serde(default)]
    pub(super) gateway: Option<IpAddr>,
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Prefix {
    pub(super) ip: IpAddr,
    pub(super) length: u8,
}

impl Members {
    /// Asks podman; none if it does not say. The import gives no address out twice, but does not
    /// name who has it.
    pub(super) fn of(network: &str) -> Option<Self> {
        let question = ["network", "inspect", network].map(str::to_owned);
        let printed = podman_within(MEMBERS_MAX, question.to_vec());
        let printed = printed.map_err(|error| told(&error));
        let all = printed.and_then(|printed| {
            serde_json::from_str::<Vec<Self>>(&printed).map_err(|error| error.to_string())
        });
        match all {
            Ok(all) => all.into_iter().next(),
            Err(why) => {
                tracing::debug!(network, why, "podman does not say who is in it");
                None
            }
        }
    }

    pub(super) fn check_free(&self, network: &str, given: &[Given]) -> Result<(), Failure> {
        for member in self.containers.values() {
            let has = member.interfaces.values().flat_map(|has| &has.subnets);
            let mut has = has.map(|has| has.ipnet.ip);
            if let Some(ip) = has.find(|ip| given.iter().any(|given| given.ipnet.ip == *ip)) {
                return Err(Failure::new(
                    ErrorCode::NetworkUnfit,
                    format!(
                        "the address {ip} of podman's network {network} is taken at the target, by \
                     the container {}: the nodes are to give out different ones (--ip-range)",
                        member.name
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl Prefix {
    /// Whether the other one is an address of this subnet.
    pub(super) fn holds(self, other: Self) -> bool {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, 32),
            IpAddr::V6(ip) => (ip.to_bits(), 128),
        };
        let ((own, width), (others, other_width)) = (bits(self.ip), bits(other.ip));
        let mask = u128::MAX
            .checked_shl(128 - u32::from(self.length.min(128)))
            .unwrap_or(0);
        width == other_width && self.length == other.length && own & mask == others & mask
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(ip, length)| {
            let (ip, length): (IpAddr, u8) = (ip.parse().ok()?, length.parse().ok()?);
            let width = if ip.is_ipv4() { 32 } else { 128 };
            (length <= width).then_some(Self { ip, length })
        });
        parsed.ok_or_else(|| format!("{text:?} is no subnet"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn given(ipnet: &str) -> Vec<Given> {
        serde_json::from_value(json!([{"ipnet": ipnet, "gateway": "10.88.0.1"}])).unwrap()
    }

    #[test]
    fn an_address_that_somebody_has_is_named_with_whose_it_is() {
        let members: Members = serde_json::from_value(json!({
            "containers": {"0a": {"name": "db", "interfaces": {"eth0": {
                "subnets": [{"ipnet": "10.88.0.7/16", "gateway": "10.88.0.1"}],
                "mac_address": "7a:ef:77:49:09:b1"}}}},
        }))
        .unwrap();
        members
            .check_free("podman", &given("10.88.0.2/16"))
            .unwrap();
        let taken = members
            .check_free("podman", &given("10.88.0.7/16"))
            .unwrap_err()
            .to_string();
        assert!(
            taken.contains("10.88.0.7") && taken.contains("container db"),
            "{taken}"
        );
    }
}
