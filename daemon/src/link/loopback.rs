//! A gate on the loopback link of a workload's network: while it is shut nothing passes but what
//! CRIU sends itself.
//!
//! Processes of a workload that talk TCP to each other, by 127.0.0.1 or an address of their own, do
//! so by `lo`. A dump takes one socket after the other, and a restore makes one after the other.
//! Between the two ends of a connection the kernel sends by itself, whoever is frozen: corked bytes
//! when their time is over, probes, retransmissions. What is sent from a socket that is not dumped
//! yet to one that is, and that acknowledges it, is in neither image. And what is sent to one that
//! is not there yet is answered with a reset.
//!
//! So a program decides about what leaves by `lo` (TCX, Linux 6.6). A dropped segment counts as not
//! sent; at its arrival it would be lost, and come again after a retransmission timeout only. CRIU
//! marks the packets by which it gives a socket its last state, and they pass.
//!
//! Invariants: what others have attached stays, and is asked too; whoever holds the gate last opens
//! it by its end, be that a death. Absent: an own gate for the loopback of the node, which is not
//! the workload's alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use pageferry_sys::gate::Gate;
use pageferry_sys::namespace::{NamespaceKind, run_inside};

use super::LinkError;

/// The gate of one network namespace.
#[derive(Debug)]
pub struct LoGate(Gate);

impl LoGate {
    /// Makes one in the network namespace `net`; it is open. Blocks for some 16 ms.
    pub fn make(net: impl AsFd) -> Result<Self, LinkError> {
        let make = || {
            let net = [(NamespaceKind::Net, net.as_fd())];
            run_inside(&net, || Gate::attach(LO, CRIU_MARK))?
        };
        make().map(Self).map_err(failed(
            "holding back what passes loopback (TCX, Linux 6.6, CAP_BPF, CAP_NET_ADMIN)",
        ))
    }

    /// From here on nothing passes. Takes some microseconds.
    pub fn shut(&self) -> Result<(), LinkError> {
        self.0.shut().map_err(failed("shutting loopback"))
    }

    /// From here on everything passes. Doing it twice does no harm.
    pub fn open(&self) -> Result<(), LinkError> {
        self.0.open().map_err(failed("opening loopback"))
    }

    /// What another process needs to hold it in our place.
    pub fn descriptors(&self) -> Result<[BorrowedFd<'_>; 2], LinkError> {
        self.0.descriptors().map_err(failed("handing on loopback"))
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> LinkError {
    move |source| LinkError::Io { action, source }
}

/// `LOOPBACK_IFINDEX`: the same in every network namespace.
const LO: u32 = 1;
/// `SOCCR_MARK` of CRIU.
const CRIU_MARK: i32 = 0xc114;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use nix::sys::socket::{setsockopt, sockopt};
    use pageferry_sys::namespace::create;

    use super::super::netlink::Netlink;
    use super::super::prepare::up;
    use super::*;

    /// Runs `test` on a thread in a network namespace of its own, of which `lo` is up.
    fn in_a_network(test: impl FnOnce(&OwnedFd) + Send) {
        let net = create(&[NamespaceKind::Net]).expect("root may unshare");
        run_inside(&[(NamespaceKind::Net, net[0].as_fd())], || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async {
                let netlink = Netlink::open(None).expect("netlink");
                up(&netlink, "lo").await.expect("lo");
            });
            test(&net[0]);
        })
        .expect("enter");
    }

    /// Whether a datagram that is marked so arrives. What is sent over `lo` is there at once.
    fn passes(mark: u32, address: &str) -> bool {
        let to = UdpSocket::bind((address, 0)).expect("a socket");
        to.set_nonblocking(true).expect("a socket");
        let from = UdpSocket::bind((address, 0)).expect("a socket");
        setsockopt(&from, sockopt::Mark, &mark).expect("CAP_NET_ADMIN");
        let there = to.local_addr().expect("an address");
        // A dropped one is an error, or it is none.
        let _ = from.send_to(b"x", there);
        to.recv(&mut [0]).is_ok()
    }

    #[test]
    fn what_is_not_marked_by_criu_passes_only_while_the_gate_is_open() {
        in_a_network(|net| {
            let gate = LoGate::make(net).expect("TCX");
            for address in ["127.0.0.1", "::1"] {
                let both = || [passes(0, address), passes(0xc114, address)];
                assert_eq!(both(), [true, true], "{address}: made");
                gate.shut().expect("shut");
                assert_eq!(both(), [false, true], "{address}: shut");
                gate.open().expect("open");
                assert_eq!(both(), [true, true], "{address}: open");
            }
        });
    }

    #[test]
    fn tcp_goes_on_where_it_was_held_back() {
        in_a_network(|net| {
            let gate = LoGate::make(net).expect("TCX");
            let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
            let address = listener.local_addr().expect("an address");
            let mut here = TcpStream::connect(address).expect("a connection");
            let (mut there, _) = listener.accept().expect("a connection");
            gate.shut().expect("shut");
            here.write_all(b"held back").expect("room");
            there.set_nonblocking(true).expect("a socket");
            assert!(there.read(&mut [0; 9]).is_err(), "nothing has come");
            gate.open().expect("open");
            there.set_nonblocking(false).expect("a socket");
            let long = Some(Duration::from_secs(30));
            there.set_read_timeout(long).expect("a socket");
            let mut read = [0; 9];
            there.read_exact(&mut read).expect("it comes");
            assert_eq!(&read, b"held back");
        });
    }

    #[test]
    fn where_there_is_no_network_there_is_no_gate() {
        let file = std::fs::File::open("/proc/self/exe").expect("a file");
        let refused = LoGate::make(&file).expect_err("no namespace");
        assert!(refused.to_string().contains("TCX"), "{refused}");
    }
}
