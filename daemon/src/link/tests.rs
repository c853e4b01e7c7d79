//! The whole way of a network, on real links in namespaces of the test's own.

use std::os::fd::{AsFd, OwnedFd};

use futures_util::TryStreamExt;
use pageferry_proto::wire::description::{LinkAddress, LinkDescription, RouteDescription};
use pageferry_sys::namespace::{NamespaceKind, create, run_inside};
use rtnetlink::packet_route::link::{
    BridgePortState, InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo,
};
use rtnetlink::{LinkBridge, LinkUnspec};

use super::LinkError;
use super::describe::describe;
use super::join::JoinedNetwork;
use super::netlink::Netlink;
use super::port::{Port, index_of};
use super::prepare::PreparedNetwork;
use super::route;

/// Runs `test` on a thread that lives in a network namespace of its own: the test's node.
pub(super) fn at_a_node(test: impl AsyncFnOnce() + Send) {
    let node = create(&[NamespaceKind::Net]).expect("root may unshare");
    run_inside(&[(NamespaceKind::Net, node[0].as_fd())], || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(test());
    })
    .expect("enter");
}

fn workload_links() -> Vec<LinkDescription> {
    let address = |text: &str, prefix| LinkAddress {
        ip: text.parse().expect("ip"),
        prefix,
    };
    vec![LinkDescription {
        name: "eth0".to_owned(),
        mac: [0x02, 0, 0, 0, 0, 0x65],
        mtu: 1400,
        addresses: vec![address("10.90.0.101", 24), address("fd00::65", 64)],
        bridge: None,
    }]
}

pub(super) async fn bridge(name: &str) {
    let node = Netlink::open(None).expect("netlink");
    let message = LinkBridge::new(name).up().build();
    node.handle()
        .link()
        .add(message)
        .execute()
        .await
        .expect("a bridge");
    let lo = index_of(&node, "lo").await.expect("lo");
    let up = LinkUnspec::new_with_index(lo).up().build();
    node.handle().link().set(up).execute().await.expect("lo up");
}

pub(super) async fn workload(prefix: &str) -> (OwnedFd, PreparedNetwork) {
    let net = create(&[NamespaceKind::Net])
        .expect("a namespace")
        .remove(0);
    let prepared = PreparedNetwork::build(&net, &workload_links(), &[], "br0", prefix)
        .await
        .expect("build");
    (net, prepared)
}

/// The state of the port of the first test workload.
async fn state(node: &Netlink) -> BridgePortState {
    let mut query = node.handle().link().get().match_name("pfa0").execute();
    let message = query.try_next().await.expect("a link").expect("a link");
    let infos = message
        .attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
    let ports = infos
        .expect("link info")
        .into_iter()
        .find_map(|info| match info {
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => Some(port),
            _ => None,
        });
    let state = ports
        .expect("a bridge port")
        .into_iter()
        .find_map(|info| match info {
            InfoBridgePort::State(state) => Some(state),
            _ => None,
        });
    state.expect("a state")
}

#[test]
fn what_was_built_and_attached_is_described_as_it_was_asked_for() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let found = describe(&net).await.expect("describe");
        assert_eq!(found.links.len(), 1);
        let link = &found.links[0];
        assert_eq!((link.name.as_str(), link.mtu), ("eth0", 1400));
        assert_eq!(link.mac, workload_links()[0].mac);
        assert_eq!(link.bridge.as_deref(), Some("br0"));
        for address in &workload_links()[0].addresses {
            assert!(link.addresses.contains(address), "{address:?}");
        }
        let again = create(&[NamespaceKind::Net])
            .expect("a namespace")
            .remove(0);
        let copy = PreparedNetwork::build(&again, &found.links, &found.routes, "br0", "pfb").await;
        copy.expect("the description can be built again")
            .delete()
            .await
            .expect("delete");
    });
}

#[test]
fn a_link_that_is_not_attached_to_a_bridge_is_refused() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, _prepared) = workload("pfa").await;
        let refused = describe(&net).await.expect_err("not attached");
        assert!(matches!(refused, LinkError::Unfit(_)), "{refused}");
    });
}

#[test]
fn a_missing_bridge_is_refused_by_name_before_anything_is_made() {
    at_a_node(async || {
        let net = create(&[NamespaceKind::Net])
            .expect("a namespace")
            .remove(0);
        let refused = PreparedNetwork::build(&net, &workload_links(), &[], "br7", "pfa").await;
        assert!(refused.expect_err("no bridge").to_string().contains("br7"));
    });
}

#[test]
fn a_closed_port_opens_again_and_a_deleted_one_stays_deleted() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let node = Netlink::open(None).expect("netlink");
        let port = describe(&net).await.expect("describe").ports.remove(0);
        assert_eq!(state(&node).await, BridgePortState::Forwarding);
        port.close(&node).await.expect("close");
        assert_eq!(state(&node).await, BridgePortState::Listening);
        port.open(&node).await.expect("open");
        assert_eq!(state(&node).await, BridgePortState::Forwarding);
        port.delete(&node).await.expect("delete");
        port.delete(&node)
            .await
            .expect("deleting twice does no harm");
        assert!(index_of(&node, "pfa0").await.is_err());
    });
}

#[test]
fn a_port_is_found_again_by_its_ends_and_not_by_its_name() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let node = Netlink::open(None).expect("netlink");
        let port = describe(&net).await.expect("describe").ports.remove(0);
        let again = Port::again(&node, port.ends(), "br0").await;
        assert_eq!(again.expect("found"), Some(port.clone()));
        // A link can be made with an index that was free again.
        let (index, peer) = port.ends();
        let again = Port::again(&node, (index, peer + 1), "br0").await;
        assert_eq!(again.expect("looked for"), None);
        port.delete(&node).await.expect("delete");
        // Another workload's link has the name now.
        let (other, prepared) = workload("pfa").await;
        prepared.attach(&other).await.expect("attach");
        assert!(index_of(&node, port.name()).await.is_ok());
        let again = Port::again(&node, port.ends(), "br0").await;
        assert_eq!(again.expect("looked for"), None);
    });
}

#[test]
fn a_port_whose_link_is_gone_is_closed_and_open() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let node = Netlink::open(None).expect("netlink");
        let port = describe(&net).await.expect("describe").ports.remove(0);
        port.close(&node).await.expect("close");
        port.delete(&node).await.expect("delete");
        port.close(&node).await.expect("there is nothing to close");
        port.open(&node).await.expect("there is nothing to open");
    });
}

#[test]
fn a_port_that_was_taken_out_of_its_bridge_is_no_reason_to_try_for_ever() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let node = Netlink::open(None).expect("netlink");
        let port = describe(&net).await.expect("describe").ports.remove(0);
        let out = LinkUnspec::new_with_index(port.ends().0)
            .controller(0)
            .build();
        node.handle().link().set(out).execute().await.expect("out");
        port.open(&node).await.expect("there is nothing to open");
        // Elsewhere it may forward to others.
        port.close(&node).await.expect_err("it is not closed");
    });
}

/// What this node's end of the first workload's link is attached to.
async fn controller(node: &Netlink) -> Option<u32> {
    let mut query = node.handle().link().get().match_name("pfa0").execute();
    let message = query.try_next().await.expect("a link").expect("a link");
    message
        .attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(index),
            _ => None,
        })
}

#[test]
fn what_somebody_else_has_made_is_joined_as_it_is_and_left_as_it_was() {
    at_a_node(async || {
        bridge("br0").await;
        let node = Netlink::open(None).expect("netlink");
        let (net, _made) = workload("pfa").await;
        let mut wanted = workload_links();
        // Neighbours are told of another one.
        wanted[0].mac = [0x02, 0, 0, 0, 0, 0x66];
        let joined = JoinedNetwork::compare(&net, &wanted, &[], "br0").await;
        let joined = joined.expect("it has all that is wanted");
        assert_eq!(controller(&node).await, None);
        assert_eq!(joined.links()[0].mac, workload_links()[0].mac);
        joined.attach(&net).await.expect("attach");
        assert_eq!(state(&node).await, BridgePortState::Forwarding);
        joined.attach(&net).await.expect("attach again");
        // As a restarted daemon finds it.
        let port = &joined.ports()[0];
        let again = Port::again(&node, port.ends(), port.bridge()).await;
        let again = again.expect("it can be looked for").expect("it is there");
        let again = JoinedNetwork::recovered(vec![again], joined.links().to_vec());
        again.detach().await.expect("detach");
        assert_eq!(controller(&node).await, None);
    });
}

/// Joining `net` with what the first workload has, changed, is refused, and the text says why.
async fn not_joined(
    net: &OwnedFd,
    change: impl Fn(&mut LinkDescription),
    (routes, bridge): (&[RouteDescription], &str),
    text: &str,
) {
    let mut wanted = workload_links();
    change(&mut wanted[0]);
    let compared = JoinedNetwork::compare(net, &wanted, routes, bridge).await;
    let error = compared.expect_err(text).to_string();
    assert!(error.contains(text), "{error}");
}

#[test]
fn what_a_network_lacks_that_is_to_be_joined_is_named() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, _made) = workload("pfa").await;
        let route = RouteDescription {
            destination: LinkAddress {
                ip: "10.91.0.0".parse().expect("ip"),
                prefix: 16,
            },
            gateway: Some("10.90.0.1".parse().expect("ip")),
            device: "eth0".to_owned(),
            metric: 0,
            source: None,
        };
        let usual: (&[_], _) = (&[], "br0");
        let named = |link: &mut LinkDescription| link.name = "eth1".to_owned();
        not_joined(&net, named, usual, "has no link eth1").await;
        let ip = "10.90.0.7".parse().expect("ip");
        let addressed = |link: &mut LinkDescription| link.addresses[0].ip = ip;
        let text = "has no address 10.90.0.7/24 on link eth0";
        not_joined(&net, addressed, usual, text).await;
        let wider = |link: &mut LinkDescription| link.mtu = 1500;
        let text = "has an MTU of 1400 on link eth0, less than 1500";
        not_joined(&net, wider, usual, text).await;
        let text = "no route to 10.91.0.0/16 by 10.90.0.1 and eth0";
        not_joined(&net, |_| (), (&[route], "br0"), text).await;
        not_joined(&net, |_| (), (&[], "br7"), "br7").await;
        let none = JoinedNetwork::compare(&net, &[], &[], "br0").await;
        let none = none.expect_err("a link more").to_string();
        assert!(none.contains("has a link eth0 more"), "{none}");
    });
}

#[test]
fn a_network_in_which_nothing_could_be_restored_or_too_much_be_heard_is_not_joined() {
    at_a_node(async || {
        bridge("br0").await;
        let (net, made) = workload("pfa").await;
        let usual: (&[_], _) = (&[], "br0");
        let inside = Netlink::open(Some(net.as_fd())).expect("netlink");
        let index = index_of(&inside, "eth0").await.expect("the link");
        // Whether somebody else has it is found out in a second or two.
        let ip = "fd00::77".parse().expect("ip");
        let adding = inside.handle().address().add(index, ip, 64).execute();
        adding.await.expect("an address");
        let more = |link: &mut LinkDescription| link.addresses.push(LinkAddress { ip, prefix: 64 });
        let text = "address fd00::77 of the network is being checked";
        not_joined(&net, more, usual, text).await;
        made.attach(&net).await.expect("attach");
        not_joined(&net, |_| (), usual, "is attached already").await;
        made.detach().await.expect("detach");
        let node = Netlink::open(None).expect("netlink");
        let index = index_of(&node, "pfa0").await.expect("this node's end");
        let down = LinkUnspec::new_with_index(index).down().build();
        let down = node.handle().link().set(down).execute();
        down.await.expect("down");
        not_joined(&net, |_| (), usual, "link eth0 of the network is down").await;
    });
}

#[test]
fn ways_to_pods_that_have_moved_go_when_nobody_has_a_use_for_them() {
    at_a_node(async || {
        bridge("br0").await;
        let node = Netlink::open(None).expect("netlink");
        let index = index_of(&node, "br0").await.expect("the bridge");
        let own = "10.90.0.1".parse().expect("ip");
        let adding = node.handle().address().add(index, own, 24).execute();
        adding.await.expect("an address");
        let (net, prepared) = workload("pfa").await;
        prepared.attach(&net).await.expect("attach");
        let network = describe(&net).await.expect("describe");
        let (links, ports) = (&network.links, &network.ports);
        let address: std::net::Ipv4Addr = "10.90.0.101".parse().expect("ip");
        // Of somebody else.
        let other: std::net::Ipv4Addr = "10.90.0.102".parse().expect("ip");
        let foreign = rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(other, 32)
            .output_interface(index)
            .build();
        let foreign = node.handle().route().add(foreign).execute();
        foreign.await.expect("a route");

        let led = async || -> Vec<route::Led> { route::led().await.expect("ways") };
        assert!(led().await.is_empty());
        route::lead_here(links, ports).await.expect("led");
        let mut ways = led().await;
        assert_eq!(ways.len(), 1);
        assert_eq!(ways[0].address, address);
        let way = ways.remove(0);
        way.clone().end().await.expect("ended");
        assert!(led().await.is_empty());
        way.end().await.expect("ended before");

        route::lead_here(links, ports).await.expect("led");
        for _ in 0..2 {
            let no_more = route::lead_here_no_more(links, ports).await;
            no_more.expect("twice does no harm");
            assert!(led().await.is_empty());
        }

        // What leads elsewhere stays when one that was to come does not.
        let peer = "10.91.0.9".parse().expect("ip");
        bridge("br1").await;
        let index = index_of(&node, "br1").await.expect("the bridge");
        let own = "10.91.0.1".parse().expect("ip");
        let adding = node.handle().address().add(index, own, 24).execute();
        adding.await.expect("an address");
        route::lead_away(&network, peer).await.expect("led");
        let no_more = route::lead_here_no_more(links, ports).await;
        no_more.expect("it was not led here");
        assert_eq!(led().await.len(), 1);
    });
}
