//! Telling the neighbourhood where an address lives now.
//!
//! A gratuitous ARP request (RFC 5227 section 3) for each IPv4 address and an unsolicited neighbour
//! advertisement (RFC 4861 section 7.2.6) for each IPv6 address, sent from inside the workload's
//! network namespace. Bridges learn the new port from the frame's source, hosts correct their
//! neighbour tables. Sent whole through a packet socket, so that no socket of the workload and no
//! rate limit of the kernel is involved.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use pageferry_proto::wire::description::LinkDescription;
use pageferry_sys::namespace::{NamespaceKind, run_inside};
use pageferry_sys::packet::PacketSocket;

use super::LinkError;

/// Sends one announcement for each address of `links` from inside `net`. Blocks for microseconds.
pub fn announce(net: BorrowedFd<'_>, links: &[LinkDescription]) -> Result<(), LinkError> {
    let io = |source| LinkError::Io {
        action: "announcing the workload's addresses",
        source,
    };
    let sockets = run_inside(&[(NamespaceKind::Net, net)], || {
        let mut sockets = Vec::with_capacity(links.len());
        for link in links {
            let index = nix::net::if_::if_nametoindex(link.name.as_str())?;
            let socket = PacketSocket::open(index)?;
            for address in &link.addresses {
                match address.ip {
                    IpAddr::V4(ip) => socket.send(&arp_frame(link.mac, ip))?,
                    IpAddr::V6(ip) => socket.send(&neighbour_frame(link.mac, ip))?,
                }
            }
            sockets.push(socket);
        }
        Ok(sockets)
    });
    let sockets = sockets.flatten().map_err(io)?;
    // Closing one waits until no processor can still be using it (`synchronize_net` in
    // `packet_release`): 8 to 18 ms in which the workload would stand still. Without a thread to
    // spare it is closed here.
    let closer = std::thread::Builder::new().name("close-packet".to_owned());
    drop(closer.spawn(move || drop(sockets)));
    Ok(())
}

fn arp_frame(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06]);
    // Ethernet, IPv4, address lengths 6 and 4, operation 1 (request).
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend([0; 6]);
    frame.extend(ip.octets());
    frame
}

fn neighbour_frame(mac: [u8; 6], ip: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0];
    // Override, not solicited, not a router.
    message.extend([0x20, 0, 0, 0]);
    message.extend(ip.octets());
    // Option 2: target link-layer address, one unit of eight bytes.
    message.extend([2, 1]);
    message.extend(mac);
    let sum = checksum(ip, all_nodes, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = Vec::with_capacity(14 + 40 + message.len());
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(mac);
    frame.extend([0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
    frame.extend(ip.octets());
    frame.extend(all_nodes.octets());
    frame.extend(message);
    frame
}

/// The checksum of RFC 4443 section 2.3, over the pseudo-header and the message.
fn checksum(source: Ipv6Addr, target: Ipv6Addr, message: &[u8]) -> u16 {
    let length = [0, 0, 0, message.len() as u8, 0, 0, 0, 58];
    let mut sum: u32 = [&source.octets()[..], &target.octets(), &length, message]
        .iter()
        .flat_map(|part| part.chunks(2))
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arp_announcement_asks_for_its_own_address() {
        let frame = arp_frame([2, 0, 0, 0, 0, 7], Ipv4Addr::new(10, 90, 0, 101));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(frame[20..22], [0, 1]);
    }

    #[test]
    fn a_neighbour_advertisement_has_a_checksum_that_sums_to_zero() {
        let ip: Ipv6Addr = "fd00::101".parse().expect("an address");
        let frame = neighbour_frame([2, 0, 0, 0, 0, 7], ip);
        let all_nodes: Ipv6Addr = "ff02::1".parse().expect("an address");
        assert_eq!(checksum(ip, all_nodes, &frame[54..]), 0);
    }
}
