//! A datagram that waited in a socket, made the frame again that it came in.
//!
//! Absent: what would not be one frame, and what is not from another host to one address.

use std::net::{IpAddr, SocketAddr};

use pageferry_proto::wire::description::LinkDescription;
use pageferry_proto::wire::parked::ParkedFrame;
use pageferry_sys::tap::VNET_BYTES;
use pageferry_sys::unread::Datagram;

/// The frame in which it comes by the workload's link that has its address; none if it cannot.
pub fn frame(datagram: &Datagram, port: u16, links: &[LinkDescription]) -> Option<ParkedFrame> {
    let Datagram { from, to, bytes } = datagram;
    let has = |link: &LinkDescription, ip: IpAddr| link.addresses.iter().any(|own| own.ip == ip);
    let place = links.iter().position(|link| has(link, *to))?;
    let link = &links[place];
    // The kernel takes none from outside that says that it is from within.
    let is_own = from.ip().is_loopback() || links.iter().any(|link| has(link, from.ip()));
    let packet = packet(*from, SocketAddr::new(*to, port), bytes)?;
    if is_own || usize::try_from(link.mtu).ok()? < packet.len() {
        return None;
    }
    let mut frame = vec![0; VNET_BYTES];
    frame.extend(link.mac);
    // Of whoever has passed it on last; nobody looks at it.
    frame.extend([0x02, 0, 0, 0, 0, 0]);
    frame.extend(match to {
        IpAddr::V4(_) => [0x08, 0x00],
        IpAddr::V6(_) => [0x86, 0xdd],
    });
    frame.extend(packet);
    Some(ParkedFrame {
        link: u8::try_from(place).ok()?,
        bytes: frame,
    })
}

fn packet(from: SocketAddr, to: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_BYTES + bytes.len()).ok()?;
    let mut datagram = from.port().to_be_bytes().to_vec();
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0; 2]);
    datagram.extend(bytes);
    let mut header = Vec::new();
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = length.checked_add(20)?.to_be_bytes();
            header.extend([0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOPS, UDP, 0, 0]);
            let addresses = [from.octets(), to.octets()].concat();
            header.extend(&addresses);
            let sum = checksum(&[&header]).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            addresses
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let [high, low] = length.to_be_bytes();
            header.extend([0x60, 0, 0, 0, high, low, UDP, HOPS]);
            let addresses = [from.octets(), to.octets()].concat();
            header.extend(&addresses);
            addresses
        }
        _ => return None,
    };
    let pseudo = [0, UDP, length.to_be_bytes()[0], length.to_be_bytes()[1]];
    let sum = match checksum(&[&addresses, &pseudo, &datagram]) {
        // That there is none is said by 0.
        0 => u16::MAX,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    header.extend(datagram);
    Some(header)
}

/// That of RFC 1071, over parts of which all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let pairs = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = pairs
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

const UDP: u8 = 17;
const UDP_BYTES: usize = 8;
const HOPS: u8 = 64;

#[cfg(test)]
mod tests {
    use pageferry_proto::migration::parked::travels;
    use pageferry_proto::wire::description::LinkAddress;

    use super::*;

    fn links() -> Vec<LinkDescription> {
        let address = |text: &str| LinkAddress {
            ip: text.parse().unwrap(),
            prefix: 24,
        };
        let link = |last: u8, addresses: Vec<LinkAddress>| LinkDescription {
            name: format!("eth{last}"),
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1500,
            addresses,
            bridge: None,
        };
        let first = vec![address("10.0.0.1")];
        vec![
            link(0, first),
            link(1, vec![address("10.1.0.1"), address("fd00::1")]),
        ]
    }

    fn made(from: &str, to: &str, bytes: usize) -> Option<ParkedFrame> {
        let datagram = Datagram {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            bytes: vec![7; bytes],
        };
        frame(&datagram, 53, &links())
    }

    #[test]
    fn a_datagram_comes_again_by_the_link_that_has_its_address() {
        for (from, to, header) in [
            ("10.1.0.9:5", "10.1.0.1", 20),
            ("[fd00::9]:5", "fd00::1", 40),
        ] {
            for length in [0, 3, 1500 - 8 - header] {
                let frame = made(from, to, length).unwrap();
                assert_eq!(frame.link, 1);
                assert!(travels(&frame.bytes, [2, 0, 0, 0, 0, 1]));
                let packet = &frame.bytes[VNET_BYTES + 14..];
                assert_eq!(packet.len(), header + 8 + length);
                let (head, datagram) = packet.split_at(header);
                if header == 20 {
                    assert_eq!(checksum(&[head]), 0);
                }
                assert_eq!(datagram[..4], [0, 5, 0, 53]);
                let addresses = &head[head.len() - if header == 20 { 8 } else { 32 }..];
                let pseudo = [0, UDP, datagram[4], datagram[5]];
                assert_eq!(checksum(&[addresses, &pseudo, datagram]), 0);
            }
        }
    }

    #[test]
    fn what_is_no_one_frame_from_another_host_does_not_come_again() {
        assert_eq!(made("10.1.0.9:5", "10.1.0.1", 1500 - 27), None);
        assert_eq!(made("10.1.0.9:5", "10.9.0.1", 3), None);
        assert_eq!(made("10.1.0.9:5", "224.0.0.1", 3), None);
        assert_eq!(made("10.0.0.1:5", "10.1.0.1", 3), None);
        assert_eq!(made("127.0.0.1:5", "10.1.0.1", 3), None);
        assert_eq!(made("[fd00::9]:5", "10.1.0.1", 3), None);
    }
}
