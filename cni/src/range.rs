//! The range of a node, as its delegate's configuration says it, and what a pod is given that comes
//! with an address of another one.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::failure::{CONFIG, Failure, VERSION};

/// The addresses of a node's pods, by the network that they see themselves in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    network: Ipv4Addr,
    prefix: u32,
    pub gateway: Ipv4Addr,
}

impl Range {
    /// That of a delegate with `ranges` or one `subnet`, as host-local has them.
    pub fn of(delegate: &Value) -> Result<Self, Failure> {
        let sets = delegate["ranges"].as_array();
        let range = match sets.map(Vec::as_slice) {
            None => delegate,
            Some([set]) => &set[0],
            // Each set gives a pod one address.
            Some(sets) => {
                let text = format!(
                    "the delegate gives a pod {} addresses: a pod that comes has one",
                    sets.len()
                );
                return Err(Failure::new(CONFIG, text));
            }
        };
        let wrong = || {
            let text = "the delegate's configuration has no subnet of version 4 in its first \
                        range, by which pods that come are connected";
            Failure::new(CONFIG, text)
        };
        let (address, prefix) = range["subnet"]
            .as_str()
            .and_then(|text| text.split_once('/'))
            .ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix: u32 = prefix.parse().map_err(|_| wrong())?;
        if 32 < prefix {
            return Err(wrong());
        }
        let network = masked(address, prefix);
        let gateway = match range["gateway"].as_str() {
            Some(text) => text.parse().map_err(|_| wrong())?,
            None => Ipv4Addr::from_bits(network.to_bits().wrapping_add(1)),
        };
        Ok(Self {
            network,
            prefix,
            gateway,
        })
    }

    /// Whether a delegate may give an address to a pod of its node: a network may be several
    /// nodes', of which each has a part. What is not understood is taken to be all of its network.
    pub fn gives(delegate: &Value, address: Ipv4Addr) -> bool {
        let sets = delegate["ranges"].as_array().into_iter().flatten();
        let ranges = sets.filter_map(Value::as_array).flatten();
        let mut ranges = ranges.chain([delegate]);
        ranges.any(|one| {
            let within =
                Self::of(&json!({"ranges": [[one]]})).is_ok_and(|range| range.contains(address));
            let bound = |key: &str| one[key].as_str().and_then(|text| text.parse().ok());
            within
                && bound("rangeStart").is_none_or(|start: Ipv4Addr| start <= address)
                && bound("rangeEnd").is_none_or(|end: Ipv4Addr| address <= end)
        })
    }

    fn contains(self, address: Ipv4Addr) -> bool {
        masked(address, self.prefix) == self.network
    }

    /// What the network plugin is told for a pod that comes with `address`, and reaches others by
    /// `gateway`.
    ///
    /// The plugin gives its bridge the gateway's address with the prefix of the pod's: another one
    /// than that of the pods that are there it refuses. So a pod of elsewhere has that prefix too,
    /// with which it would take its old neighbours to be on the bridge: routes to both halves of
    /// that network are more specific, and lead by the gateway as all others do.
    pub fn result(
        self,
        address: Ipv4Addr,
        gateway: Ipv4Addr,
        (version, delegate): (&str, &Value),
    ) -> Result<Value, Failure> {
        let mut routes = Vec::new();
        if !self.contains(address) {
            if version == "1.0.0" {
                let text = format!(
                    "{address} is not of this node's range: that takes a route by link alone, \
                     which cniVersion 1.1.0 has, and the configuration's is {version}"
                );
                return Err(Failure::new(VERSION, text));
            }
            // No gateway, or the plugin puts in that of the address.
            routes.push(json!({
                "dst": format!("{gateway}/32"), "gw": Ipv4Addr::UNSPECIFIED, "scope": SCOPE_LINK,
            }));
            let by_gateway = |dst: String| json!({"dst": dst, "gw": gateway});
            routes.extend(halves(masked(address, self.prefix), self.prefix).map(by_gateway));
        }
        let given = delegate["routes"].as_array().into_iter().flatten();
        for route in given {
            let mut route = route.clone();
            if route["gw"].is_null() {
                route["gw"] = json!(gateway);
            }
            routes.push(route);
        }
        if !routes.iter().any(|route| route["dst"] == ANYWHERE) {
            routes.push(json!({"dst": ANYWHERE, "gw": gateway}));
        }
        Ok(json!({
            "cniVersion": version,
            "ips": [{"address": format!("{address}/{}", self.prefix), "gateway": gateway}],
            "routes": routes,
            "dns": {},
        }))
    }
}

fn masked(address: Ipv4Addr, prefix: u32) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    Ipv4Addr::from_bits(address.to_bits() & mask)
}

/// Both halves of a network, unless it is one address.
fn halves(network: Ipv4Addr, prefix: u32) -> impl Iterator<Item = String> {
    let bit = 1_u32.checked_shl(31_u32.wrapping_sub(prefix)).unwrap_or(0);
    let halves = [network.to_bits(), network.to_bits() | bit];
    let halves = halves.into_iter().filter(move |_| prefix < 32);
    halves.map(move |half| format!("{}/{}", Ipv4Addr::from_bits(half), prefix + 1))
}

const ANYWHERE: &str = "0.0.0.0/0";
/// `RT_SCOPE_LINK`: what is at the end of it is there, and a gateway may be.
const SCOPE_LINK: u32 = 253;

#[cfg(test)]
mod tests {
    use super::*;

    fn range(config: &Value) -> Range {
        Range::of(config).expect("a range")
    }

    #[test]
    fn a_pod_of_elsewhere_reaches_all_by_the_gateway() {
        let config = json!({"ranges": [[{"subnet": "10.244.12.0/24"}]],
                            "routes": [{"dst": "0.0.0.0/0"}]});
        let range = range(&config);
        let address = Ipv4Addr::new(10, 244, 11, 200);
        let result = range.result(address, range.gateway, ("1.1.0", &config));
        let result = result.expect("a result");
        assert_eq!(
            result["ips"],
            json!([{"address": "10.244.11.200/24", "gateway": "10.244.12.1"}])
        );
        assert_eq!(
            result["routes"],
            json!([
                {"dst": "10.244.12.1/32", "gw": "0.0.0.0", "scope": 253},
                {"dst": "10.244.11.0/25", "gw": "10.244.12.1"},
                {"dst": "10.244.11.128/25", "gw": "10.244.12.1"},
                {"dst": "0.0.0.0/0", "gw": "10.244.12.1"},
            ])
        );
        let old = range.result(address, range.gateway, ("1.0.0", &config));
        let old = old.expect_err("1.0.0 has no such route").to_string();
        assert!(old.contains("1.1.0"), "{old}");
    }

    #[test]
    fn a_pod_of_this_node_is_given_what_others_are() {
        let config = json!({"subnet": "10.244.12.0/24", "gateway": "10.244.12.254"});
        let range = range(&config);
        let address = Ipv4Addr::new(10, 244, 12, 7);
        let result = range.result(address, range.gateway, ("1.0.0", &config));
        assert_eq!(
            result.expect("a result")["routes"],
            json!([{"dst": "0.0.0.0/0", "gw": "10.244.12.254"}])
        );
    }

    #[test]
    fn a_delegate_gives_what_is_of_any_of_its_ranges() {
        let part = |start: u8| {
            json!({"subnet": "10.1.0.0/16", "rangeStart": format!("10.1.{start}.2"),
                   "rangeEnd": format!("10.1.{start}.254")})
        };
        let set = json!({"ranges": [[part(3), part(5)]]});
        for (address, given) in [
            ([10, 1, 3, 2], true),
            ([10, 1, 5, 254], true),
            ([10, 1, 4, 7], false),
            ([10, 1, 3, 1], false),
        ] {
            assert_eq!(Range::gives(&set, address.into()), given, "{address:?}");
        }
        let whole = json!({"subnet": "10.1.3.0/24"});
        assert!(Range::gives(&whole, [10, 1, 3, 9].into()));
        assert!(!Range::gives(&whole, [10, 1, 4, 9].into()));
    }

    #[test]
    fn halves_make_up_the_whole() {
        let of = |prefix| -> Vec<String> {
            halves(masked(Ipv4Addr::new(10, 1, 2, 3), prefix), prefix).collect()
        };
        assert_eq!(of(0), ["0.0.0.0/1", "128.0.0.0/1"]);
        assert_eq!(of(31), ["10.1.2.2/32", "10.1.2.3/32"]);
        assert!(of(32).is_empty());
    }

    #[test]
    fn a_delegate_without_one_range_of_version_4_is_refused() {
        for wrong in [
            json!({"type": "dhcp"}),
            json!({"subnet": "fd00::/64"}),
            json!({"subnet": "10.0.0.0/33"}),
            json!({"subnet": "10.0.0.0/24", "gateway": "it"}),
            json!({"ranges": []}),
            json!({"ranges": [[]]}),
            json!({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64"}]]}),
        ] {
            assert!(Range::of(&wrong).is_err(), "{wrong}");
        }
    }
}
