//! Tables that are told, and real connections in a network namespace of their own.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use pageferry_proto::wire::code::ErrorCode;
use pageferry_sys::namespace::{self, NamespaceKind};

use super::*;

fn line(local: &str, remote: &str, state: u8, inode: u64) -> Connection {
    (
        local.parse().unwrap(),
        remote.parse().unwrap(),
        state,
        inode,
    )
}

fn tables(connections: &[Connection]) -> Tables {
    let mut tables = Tables::default();
    connections.iter().for_each(|one| tables.add(*one));
    tables
}

fn others(tables: &Tables, held: &[u64]) -> Vec<u64> {
    let pairs = tables.pairs(|inode| held.contains(&inode));
    pairs.iter().map(|pair| pair.other).collect()
}

const NONE: [u64; 0] = [];
const A: &str = "127.0.0.1:40000";
const B: &str = "127.0.0.1:8080";

#[test]
fn both_ends_of_a_connection_must_be_in_the_tree() {
    let both = tables(&[line(A, B, 1, 11), line(B, A, 1, 22)]);
    assert_eq!(others(&both, &[11, 22]), NONE);
    assert_eq!(others(&both, &[11]), [22]);
    assert_eq!(others(&both, &[22]), [11]);
    // Of others alone, and with a peer that is elsewhere.
    assert_eq!(others(&both, &[]), NONE);
    assert_eq!(others(&tables(&[line(A, B, 1, 11)]), &[11]), NONE);
}

#[test]
fn a_connection_within_the_tree_has_both_its_ends_in_it() {
    let both = tables(&[line(A, B, 1, 11), line(B, A, 1, 22)]);
    let ends = |held: &[u64]| both.within(|inode| held.contains(&inode));
    let (a, b) = (A.parse().unwrap(), B.parse().unwrap());
    assert_eq!(ends(&[11, 22]), Some((b, a)));
    assert_eq!(ends(&[11]), None);
    assert_eq!(ends(&[22]), None);
    // To itself: a socket that is connected with its own address.
    let own = tables(&[line(A, A, 1, 11)]);
    assert_eq!(own.within(|inode| inode == 11), Some((a, a)));
}

#[test]
fn a_connection_that_waits_to_be_accepted_is_held_by_its_listener() {
    let any = "0.0.0.0:8080";
    let waits = tables(&[
        line(A, B, 1, 11),
        line(B, A, 1, 0),
        line(any, "0.0.0.0:0", 10, 33),
    ]);
    assert_eq!(others(&waits, &[11, 33]), NONE);
    assert_eq!(others(&waits, &[11]), [33]);
    assert_eq!(others(&waits, &[33]), [11]);
    // Closed by its owner: nobody has it.
    let closed = tables(&[
        line(A, B, 1, 11),
        line(B, A, 5, 0),
        line(any, "0.0.0.0:0", 10, 33),
    ]);
    assert_eq!(others(&closed, &[11]), NONE);
}

#[test]
fn an_address_of_either_kind_is_the_same_address() {
    let record = |family: i32, from: Ipv6Addr, to: Ipv6Addr| {
        let mut record = vec![u8::try_from(family).unwrap(), 1, 0, 0];
        record.extend([0x1f, 0x90, 0, 80]);
        record.extend(from.octets());
        record.extend(to.octets());
        record.extend([0; 28]);
        record.extend(77_u32.to_ne_bytes());
        record
    };
    let expected = ("127.0.0.1:8080", "127.0.0.2:80");
    let expected = (
        expected.0.parse().unwrap(),
        expected.1.parse().unwrap(),
        1,
        77,
    );
    let mapped = |last: u8| Ipv4Addr::new(127, 0, 0, last).to_ipv6_mapped();
    let six = record(libc::AF_INET6, mapped(1), mapped(2));
    assert_eq!(parse(&six), Some(expected));
    let four = |last: u8| {
        let mut octets = [0; 16];
        octets[..4].copy_from_slice(&[127, 0, 0, last]);
        Ipv6Addr::from(octets)
    };
    let mut four = record(libc::AF_INET, four(1), four(2));
    assert_eq!(parse(&four), Some(expected));
    four.pop();
    assert_eq!(parse(&four), None);
    assert_eq!(parse(&record(libc::AF_UNIX, mapped(1), mapped(2))), None);
}

/// A process in a network namespace of its own, which holds what it was given.
struct Holder(Child);

impl Holder {
    fn new(net: &OwnedFd, input: OwnedFd, output: Option<OwnedFd>) -> Self {
        let child = inside(net, || {
            let output = output.map_or_else(Stdio::null, Stdio::from);
            let mut command = Command::new("sleep");
            command.arg("1000").stdin(Stdio::from(input)).stdout(output);
            command.spawn().unwrap()
        });
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn inside<T: Send>(net: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    namespace::run_inside(&[(NamespaceKind::Net, net.as_fd())], work).unwrap()
}

/// A namespace whose loopback is up, with both ends of a connection in it.
fn connected() -> (OwnedFd, TcpStream, TcpStream) {
    let net = namespace::create(&[NamespaceKind::Net]).unwrap().remove(0);
    let (client, server) = inside(&net, || {
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    });
    (net, client, server)
}

fn sockets(holder: &Holder) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{}/fd", holder.pid())).unwrap();
    let inode = |entry: fs::DirEntry| Some(fs::metadata(entry.path()).ok()?.ino());
    entries.flatten().filter_map(inode).collect()
}

#[test]
fn a_peer_outside_the_tree_is_named_with_both_ends() {
    let (net, client, server) = connected();
    let (here, there) = (client.local_addr().unwrap(), server.local_addr().unwrap());
    let tree = Holder::new(&net, client.into(), None);
    let held = sockets(&tree);
    let seen = Connections::of(tree.pid()).unwrap();
    let refused = check(&seen, tree.pid(), &[tree.pid()], |inode| {
        held.contains(&inode)
    })
    .unwrap_err();
    assert_eq!(refused.code(), ErrorCode::LoopbackPeer);
    let (own, peer) = (tree.pid(), std::process::id());
    for part in [
        format!("process {own} "),
        format!("{here} to {there}"),
        format!("process {peer} ("),
    ] {
        assert!(refused.text().contains(&part), "{refused}");
    }
    drop(server);
    // The tree still has its end, and nobody has the other.
    check(&seen, tree.pid(), &[tree.pid()], |inode| {
        held.contains(&inode)
    })
    .unwrap();
}

#[test]
fn a_connection_within_the_tree_is_no_objection_even_if_it_is_new() {
    let (net, client, server) = connected();
    let client_inode = inode(&client);
    let tree = Holder::new(&net, client.into(), Some(server.into()));
    let seen = Connections::of(tree.pid()).unwrap();
    // As if the other end had come into being after the tree was asked what it holds.
    check(&seen, tree.pid(), &[tree.pid()], |inode| {
        inode == client_inode
    })
    .unwrap();
}

#[test]
fn a_connection_within_the_tree_is_refused_where_loopback_cannot_be_shut() {
    let (net, client, server) = connected();
    let (here, there) = (client.local_addr().unwrap(), server.local_addr().unwrap());
    let client_inode = inode(&client);
    let tree = Holder::new(&net, client.into(), Some(server.into()));
    let mut seen = Connections::of(tree.pid()).unwrap();
    seen.ungated("there is no TCX");
    let held = sockets(&tree);
    let looks: [&dyn Fn(u64) -> bool; 2] = [&|inode| held.contains(&inode), &|inode| {
        inode == client_inode
    }];
    for holds in looks {
        let refused = check(&seen, tree.pid(), &[tree.pid()], holds).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::NodeUnfit);
        for part in [here.to_string(), there.to_string(), "no TCX".to_owned()] {
            assert!(refused.text().contains(&part), "{refused}");
        }
    }
}

fn inode(stream: &TcpStream) -> u64 {
    let path = format!("/proc/self/fd/{}", stream.as_raw_fd());
    fs::metadata(path).unwrap().ino()
}
