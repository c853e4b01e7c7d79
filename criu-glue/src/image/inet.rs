//! `files.img`: connections of the tree that have both their ends in it.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use super::{FormatError, ImageError, MAGIC_COMMON, at, decode, read_file, records};

/// An open file, as far as it is a socket.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
struct File {
    #[prost(message, optional, tag = "4")]
    socket: Option<Socket>,
}

/// The fields of use to us.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
struct Socket {
    #[prost(uint32, required, tag = "5")]
    protocol: u32,
    #[prost(uint32, required, tag = "6")]
    state: u32,
    #[prost(uint32, required, tag = "7")]
    port: u32,
    #[prost(uint32, required, tag = "8")]
    peer_port: u32,
    /// One word of an IPv4 address, four of an IPv6 address; each as it is in memory.
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    address: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    peer_address: Vec<u32>,
}

/// A TCP connection of which both ends are among the sockets of these images directories, those of
/// one tree each that all are in one network, if there is one: the lesser end first.
///
/// # Errors
/// [`ImageError`] with the file's path.
pub fn pair<P: AsRef<Path>>(images: &[P]) -> Result<Option<(SocketAddr, SocketAddr)>, ImageError> {
    let mut all = HashSet::new();
    for folder in images {
        let path = folder.as_ref().join("files.img");
        let bytes = match read_file(&path) {
            // No process has a file open.
            Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                continue;
            }
            read => read?,
        };
        all.extend(ends(&bytes).map_err(at(&path))?);
    }
    Ok(within(&all))
}

/// Both ends of each connection, its own first.
type Ends = HashSet<(SocketAddr, SocketAddr)>;

fn ends(image: &[u8]) -> Result<Ends, FormatError> {
    let mut ends = HashSet::new();
    for (index, record) in records(image, &[MAGIC_COMMON, MAGIC])?.iter().enumerate() {
        let file: File = decode(record, index)?;
        let socket = file.socket.filter(Socket::is_connection);
        let Some(socket) = socket else { continue };
        let wrong = || FormatError::Value { index };
        ends.insert(socket.ends().ok_or_else(wrong)?);
    }
    Ok(ends)
}

fn within(ends: &Ends) -> Option<(SocketAddr, SocketAddr)> {
    let is_within = |(here, there): &&(SocketAddr, SocketAddr)| ends.contains(&(*there, *here));
    ends.iter().filter(is_within).min().copied()
}

impl Socket {
    fn is_connection(&self) -> bool {
        self.protocol == TCP && ![CLOSE, LISTEN].contains(&self.state)
    }

    fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        let place = |address: &[u32], port: u32| {
            let ip = ip(address)?;
            Some(SocketAddr::new(ip, u16::try_from(port).ok()?))
        };
        let here = place(&self.address, self.port)?;
        Some((here, place(&self.peer_address, self.peer_port)?))
    }
}

/// An IPv6 address that maps an IPv4 one is that one.
fn ip(words: &[u32]) -> Option<IpAddr> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Some(IpAddr::V4(Ipv4Addr::from(bytes))),
        Err(_) => {
            let bytes = <[u8; 16]>::try_from(bytes.as_slice()).ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical())
        }
    }
}

const MAGIC: u32 = 0x5630_3138;
const TCP: u32 = 6;
/// In `include/net/tcp_states.h`.
const CLOSE: u32 = 7;
const LISTEN: u32 = 10;

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    const A: [u8; 4] = [127, 0, 0, 1];

    fn v4(address: [u8; 4]) -> Vec<u32> {
        vec![u32::from_ne_bytes(address)]
    }

    fn mapped(address: [u8; 4]) -> Vec<u32> {
        let marker = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
        vec![0, 0, marker, u32::from_ne_bytes(address)]
    }

    fn socket(state: u32, address: Vec<u32>, port: u32, peer: Vec<u32>, peer_port: u32) -> File {
        let socket = Socket {
            protocol: TCP,
            state,
            port,
            peer_port,
            address,
            peer_address: peer,
        };
        File {
            socket: Some(socket),
        }
    }

    fn image(files: &[File]) -> Vec<u8> {
        let mut image = [MAGIC_COMMON, MAGIC].map(u32::to_le_bytes).concat();
        for file in files {
            let record = file.encode_to_vec();
            image.extend(u32::try_from(record.len()).expect("short").to_le_bytes());
            image.extend(record);
        }
        image
    }

    #[test]
    fn a_connection_is_within_when_both_its_ends_are() {
        let here = socket(1, v4(A), 40000, v4(A), 80);
        let there = socket(8, v4(A), 80, v4(A), 40000);
        let listener = socket(10, v4(A), 80, v4([0; 4]), 0);
        let other = File { socket: None };
        let found = |files: &[File]| within(&ends(&image(files)).expect("well formed"));
        assert_eq!(found(&[]), None);
        assert_eq!(
            found(&[here.clone(), listener.clone(), other.clone()]),
            None
        );
        let (a, b) = ("127.0.0.1:80", "127.0.0.1:40000");
        let pair = (a.parse().expect("a"), b.parse().expect("b"));
        let all = [here.clone(), other, listener, there.clone()];
        assert_eq!(found(&all), Some(pair));
        // One of them is an IPv6 socket.
        let there = socket(1, mapped(A), 80, mapped(A), 40000);
        assert_eq!(found(&[here.clone(), there.clone()]), Some(pair));
        // Datagrams may be lost.
        let mut datagrams = [here, there];
        for file in &mut datagrams {
            file.socket.as_mut().expect("a socket").protocol = 17;
        }
        assert_eq!(found(&datagrams), None);
    }

    #[test]
    fn an_address_that_is_none_is_malformed() {
        let odd = socket(1, vec![0, 0], 1, v4(A), 2);
        assert!(ends(&image(&[odd])).is_err());
        let port = socket(1, v4(A), 1 << 16, v4(A), 2);
        assert!(ends(&image(&[port])).is_err());
    }

    #[test]
    fn the_ends_may_be_in_two_trees() {
        let folders = [(); 3].map(|()| tempfile::tempdir().expect("a folder"));
        let paths = folders.each_ref().map(tempfile::TempDir::path);
        assert_eq!(pair(&paths).expect("no file"), None);
        let here = socket(1, v4(A), 40000, v4(A), 80);
        let there = socket(1, v4(A), 80, v4(A), 40000);
        for (path, file) in paths[1..].iter().zip([here, there]) {
            std::fs::write(path.join("files.img"), image(&[file])).expect("written");
        }
        assert!(pair(&paths).expect("well formed").is_some());
        assert_eq!(pair(&paths[..2]).expect("well formed"), None);
    }
}
