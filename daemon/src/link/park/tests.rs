//! What waits and what does not, on real links in namespaces of the test's own.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use pageferry_proto::id::Generation;
use pageferry_proto::wire::parked::Parked as Stream;
use pageferry_sys::namespace::{NamespaceKind, run_inside};
use pageferry_sys::unread::Datagram;

use super::*;
use crate::link::describe::{Network, describe};
use crate::link::prepare::PreparedNetwork;
use crate::link::tests::{at_a_node, bridge, workload};

/// A node with addresses on its bridge, and a workload's network that may become a port of that.
async fn place() -> (OwnedFd, PreparedNetwork) {
    bridge("br0").await;
    let node = Netlink::open(None).expect("netlink");
    let index = index_of(&node, "br0").await.expect("it was made");
    for (address, prefix) in [("10.90.0.1", 24), ("fd00::1", 64)] {
        let address: IpAddr = address.parse().expect("an address");
        let mut added = node.handle().address().add(index, address, prefix);
        if address.is_ipv6() {
            use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
            let nodad = AddressAttribute::Flags(AddressFlags::Nodad);
            added.message_mut().attributes.push(nodad);
        }
        added.execute().await.expect("an address");
    }
    workload("pfa").await
}

/// Sockets of the workload, and of who sends to it, of one family.
fn sockets(net: &OwnedFd, six: bool) -> (UdpSocket, UdpSocket, SocketAddr) {
    let (own, other) = match six {
        false => ("10.90.0.101:7", "10.90.0.1:0"),
        true => ("[fd00::65]:7", "[fd00::1]:0"),
    };
    let net = [(NamespaceKind::Net, net.as_fd())];
    let bound = run_inside(&net, || UdpSocket::bind(own)).expect("enter");
    let to = bound.expect("an address of the workload");
    let from = UdpSocket::bind(other).expect("an address of the node");
    for socket in [&to, &from] {
        socket.set_nonblocking(true).expect("a socket");
    }
    (to, from, own.parse().expect("an address"))
}

/// What has come.
fn arrived(socket: &UdpSocket) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4]);
    while let Ok(length) = socket.recv(&mut buffer) {
        all.extend(&buffer[..length]);
    }
    all
}

/// Waits until so much has come.
fn comes(socket: &UdpSocket, wanted: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut all = Vec::new();
    while all.len() < wanted.len() && Instant::now() < deadline {
        all.extend(arrived(socket));
        std::thread::yield_now();
    }
    assert_eq!(all, wanted);
}

fn keeps(means: Means, six: bool) {
    at_a_node(async || {
        let (net, prepared) = place().await;
        prepared.attach(&net).await.expect("attach");
        let Network { ports, links, .. } = describe(&net).await.expect("describe");
        let node = Netlink::open(None).expect("netlink");
        let parked = [Parked {
            port: &ports[0],
            mac: links[0].mac,
        }];
        let park = Park::make(means, &parked).await.expect("a park");
        let park = park.expect("it has a link");
        assert_eq!(park.is_whole(), means == Means::Auto);
        let (to, from, target) = sockets(&net, six);
        let send = |byte: u8| drop(from.send_to(&[byte], target));
        send(1);
        comes(&to, &[1]);
        // The attempt is given up, and tried again.
        for _ in 0..2 {
            if !park.is_whole() {
                ports[0].close(&node).await.expect("close");
            }
            park.hold().expect("hold");
            (2..5).for_each(send);
            assert!(arrived(&to).is_empty());
            park.shut().expect("shut");
            let _ = to.send_to(&[9], from.local_addr().expect("an address"));
            assert!(arrived(&from).is_empty());
            let lot = park.lot();
            let mut carried = Vec::new();
            while carried.len() < 3 {
                match lot.stream(Generation::FIRST) {
                    Some(body) => carried.extend(Stream::decode(&body).expect("frames").frames),
                    None => lot.came().await,
                }
            }
            let last = |frame: &ParkedFrame| frame.bytes.last().copied();
            let carried: Vec<_> = carried.iter().filter_map(last).collect();
            assert_eq!(carried, [2, 3, 4]);
            park.deliver().expect("deliver");
            ports[0].open(&node).await.expect("open");
            comes(&to, &[2, 3, 4]);
            send(5);
            comes(&to, &[5]);
        }
        // A daemon dies: where a program diverts, nothing passes until somebody takes it off.
        park.hold().expect("hold");
        drop(park);
        let deadline = Instant::now() + Duration::from_secs(30);
        if means == Means::Auto {
            send(6);
            assert!(arrived(&to).is_empty());
            end(&ports).await.expect("take off");
        }
        loop {
            send(7);
            if arrived(&to).contains(&7) {
                break;
            }
            assert!(Instant::now() < deadline, "it passes again");
        }
        end(&ports).await.expect("there is none any more");
    });
}

#[test]
fn what_comes_by_a_port_waits_and_is_given_back_in_order() {
    keeps(Means::Auto, false);
    keeps(Means::Auto, true);
}

#[test]
fn what_passes_a_bridge_for_a_closed_port_waits_and_is_given_back_in_order() {
    keeps(Means::Capture, false);
    keeps(Means::Capture, true);
}

fn awaits(six: bool) {
    at_a_node(async || {
        let (net, prepared) = place().await;
        let index = prepared.ends().await.expect("ends")[0];
        let mac = prepared.links()[0].mac;
        // The source's had another hardware address.
        let mut offered = prepared.links().to_vec();
        offered[0].mac[5] = 1;
        let awaited = [Awaited {
            link: 0,
            index,
            macs: (offered[0].mac, mac),
        }];
        let mut here = Await::make(&awaited).expect("links");
        prepared.attach(&net).await.expect("attach");
        let (to, from, target) = sockets(&net, six);
        for byte in [3, 4] {
            from.send_to(&[byte], target).expect("room");
        }
        let sender = from.local_addr().expect("an address");
        let other = SocketAddr::new(sender.ip(), 7);
        for byte in [1, 2] {
            let kept = Datagram {
                from: other,
                to: target.ip(),
                bytes: vec![byte],
            };
            let frame = datagram::frame(&kept, 7, &offered).expect("it is one frame");
            let stray = ParkedFrame {
                link: 1,
                bytes: frame.bytes.clone(),
            };
            here.inject(stray);
            here.inject(frame);
        }
        // They come at once, and what came here waits for its turn.
        comes(&to, &[1, 2]);
        here.deliver().expect("deliver");
        comes(&to, &[3, 4]);
        from.send_to(&[5], target).expect("room");
        comes(&to, &[5]);
    });
}

#[test]
fn what_its_source_kept_comes_before_what_came_here() {
    awaits(false);
    awaits(true);
}
