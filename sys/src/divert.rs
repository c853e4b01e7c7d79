//! A program of the kernel that decides about every packet that passes one end of a link: it lets
//! all of them pass, drops them, or diverts them to another link.
//!
//! What it does is a number, which whoever has it changes for the next packet on. To what it is
//! attached, and for how long, its owner decides: by [`Divert::hold`] for as long as somebody has
//! the descriptor, or by [`Divert::attach`] for as long as the link is there. No packet is lost or
//! doubled by that.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::bpf::{self, Name, Number, Way, attach_egress, load_classifier};
use crate::gate::{EXIT, TCX_DROP, TCX_NEXT, instruction};

/// The program and its number: it lets everything pass at the beginning.
#[derive(Debug)]
pub struct Divert {
    program: OwnedFd,
    number: Number,
}

/// A program that is attached for as long as this is there.
#[derive(Debug)]
pub struct Held(Option<OwnedFd>);

impl Divert {
    /// Loads one, which is attached to nothing.
    pub fn load() -> io::Result<Self> {
        let number = Number::new()?;
        let program = load_classifier(&program(&number), c"MIT", NAME)?;
        Ok(Self { program, number })
    }

    /// Attaches it, by TCX, to what passes the link `index` of the network namespace that the
    /// calling thread is in, until [`detach`], or until the link is gone. Blocks for some 8 ms.
    pub fn attach(&self, index: u32, way: Way) -> io::Result<()> {
        bpf::attach(&self.program, index, way)
    }

    /// Attaches it, by TCX, to what leaves by the link `index` of the network namespace that the
    /// calling thread is in. Blocks for some 8 ms.
    pub fn hold(&self, index: u32) -> io::Result<Held> {
        attach_egress(&self.program, index).map(Some).map(Held)
    }

    /// From here on everything passes.
    pub fn pass(&self) -> io::Result<()> {
        self.number.set(PASS)
    }

    /// From here on nothing passes.
    pub fn drop_all(&self) -> io::Result<()> {
        self.number.set(DROP)
    }

    /// From here on everything leaves by the link of that number instead; as long as there is none,
    /// nothing passes.
    pub fn divert_to(&self, index: u32) -> io::Result<()> {
        if index <= DROP {
            return Err(io::Error::other("nothing is diverted to loopback"));
        }
        self.number.set(index)
    }
}

/// Takes off the link `index` what [`Divert::attach`] has attached, in whichever process. That
/// there is no such link, and that the kernel has no TCX, is no error. Blocks for some 16 ms if
/// there is something to take off.
pub fn detach(index: u32) -> io::Result<()> {
    for way in [Way::In, Way::Out] {
        match bpf::detach(&NAME, index, way) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => {}
            detached => detached?,
        }
    }
    Ok(())
}

impl Drop for Held {
    /// Detaches it; on a thread of its own, for it takes some 8 ms. Without one it is detached
    /// here.
    fn drop(&mut self) {
        let link = self.0.take();
        let detach = std::thread::Builder::new().name("detach".to_owned());
        if let Err(error) = detach.spawn(move || drop(link)) {
            tracing::debug!(%error, "no thread to detach a program");
        }
    }
}

/// `number == 0 ? TCX_NEXT : number == 1 ? TCX_DROP : bpf_redirect(number, 0)`.
fn program(number: &Number) -> [u64; 17] {
    let number = number.as_fd().as_raw_fd();
    [
        // The key 0 on the stack, and where it is.
        instruction(0x62, (10, 0), -4, 0),
        instruction(0xbf, (2, 10), 0, 0),
        instruction(0x07, (2, 0), 0, -4),
        // r1 = the map (two words); r0 = bpf_map_lookup_elem(r1, r2).
        instruction(0x18, (1, 1), 0, number),
        0,
        instruction(0x85, (0, 0), 0, 1),
        // There is always one, but the verifier does not know. If it is PASS: next. If it is DROP:
        // drop.
        instruction(0x15, (0, 0), 8, 0),
        instruction(0x61, (1, 0), 0, 0),
        instruction(0x15, (1, 0), 6, PASS.cast_signed()),
        instruction(0x15, (1, 0), 3, DROP.cast_signed()),
        // r0 = bpf_redirect(r1, r2): TC_ACT_REDIRECT.
        instruction(0xb7, (2, 0), 0, 0),
        instruction(0x85, (0, 0), 0, 23),
        EXIT,
        // Drop.
        instruction(0xb7, (0, 0), 0, TCX_DROP),
        EXIT,
        // Next.
        instruction(0xb7, (0, 0), 0, TCX_NEXT),
        EXIT,
    ]
}

const NAME: Name = *b"pageferry_port\0\0";
const PASS: u32 = 0;
/// The number of loopback in every network namespace, which nothing is diverted to.
const DROP: u32 = 1;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::namespace::{NamespaceKind, create, run_inside};
    use crate::packet::Injector;
    use crate::tap::{Tap, VNET_BYTES};

    fn ip(arguments: &str) {
        let run = Command::new("ip").args(arguments.split(' ')).status();
        assert!(run.expect("iproute2").success(), "ip {arguments}");
    }

    /// Runs `test` in a network namespace with a link `v0`, whose other end is in another one with
    /// a socket at 10.9.0.2:7: the test is given the link's number and that socket.
    fn with_a_link(test: impl FnOnce(u32, UdpSocket) + Send) {
        let here = create(&[NamespaceKind::Net]).expect("root may unshare");
        let there = create(&[NamespaceKind::Net]).expect("root may unshare");
        let pid = std::process::id();
        let fd = there[0].as_fd().as_raw_fd();
        let inside = |work: &mut (dyn FnMut() + Send)| {
            run_inside(&[(NamespaceKind::Net, there[0].as_fd())], work).expect("enter");
        };
        run_inside(&[(NamespaceKind::Net, here[0].as_fd())], || {
            ip("link add v0 address 02:00:00:00:00:01 type veth peer name v1");
            ip(&format!("link set v1 netns /proc/{pid}/fd/{fd}"));
            ip("addr add 10.9.0.1/24 dev v0");
            ip("link set v0 up");
            // Nothing but what the test sends.
            ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev v0");
            let mut socket = None;
            inside(&mut || {
                ip("link set v1 address 02:00:00:00:00:02");
                ip("addr add 10.9.0.2/24 dev v1");
                ip("link set v1 up");
                socket = Some(UdpSocket::bind("10.9.0.2:7").expect("an address"));
            });
            let index = nix::net::if_::if_nametoindex("v0").expect("it was made");
            test(index, socket.expect("it was made"));
        })
        .expect("enter");
    }

    /// What arrives at the other end: it is there at once, or never.
    fn arrived(socket: &UdpSocket) -> Vec<u8> {
        socket.set_nonblocking(true).expect("a socket");
        let mut datagrams = Vec::new();
        let mut buffer = [0; 4];
        while let Ok(length) = socket.recv(&mut buffer) {
            datagrams.extend(&buffer[..length]);
        }
        datagrams
    }

    #[test]
    fn what_is_diverted_waits_and_is_sent_on_as_it_was() {
        with_a_link(|index, socket| {
            let divert = Divert::load().expect("BPF");
            let held = divert.hold(index).expect("TCX");
            let tap = Tap::make(16).expect("a tap");
            let from = UdpSocket::bind("10.9.0.1:0").expect("an address");
            let send = |byte: u8| drop(from.send_to(&[byte], "10.9.0.2:7"));
            send(1);
            divert.divert_to(tap.index()).expect("set");
            send(2);
            send(3);
            assert_eq!(arrived(&socket), [1]);
            let injector = Injector::open(index).expect("a socket");
            let mut frame = [0; 2048];
            for byte in [2, 3] {
                let length = tap.read(&mut frame).expect("read").expect("it waits");
                assert_eq!(length, VNET_BYTES + 14 + 20 + 8 + 1);
                injector.send(&frame[..length]).expect("past the program");
                assert_eq!(arrived(&socket), [byte]);
            }
            assert_eq!(tap.read(&mut frame).expect("read"), None);
            divert.drop_all().expect("set");
            send(4);
            assert_eq!(arrived(&socket), [0; 0]);
            divert.pass().expect("set");
            send(5);
            // Where what it was diverted to is gone, nothing passes.
            divert.divert_to(tap.index()).expect("set");
            drop(tap);
            send(6);
            assert_eq!(arrived(&socket), [5]);
            assert!(divert.divert_to(1).is_err());
            drop(held);
        });
    }

    #[test]
    fn what_is_attached_stays_until_it_is_taken_off_and_loses_nothing_by_that() {
        with_a_link(|index, socket| {
            let from = UdpSocket::bind("10.9.0.1:0").expect("an address");
            let send = |byte: u8| drop(from.send_to(&[byte], "10.9.0.2:7"));
            let is_over = AtomicBool::new(false);
            let attached = |divert: &Divert| {
                for way in [Way::Out, Way::In] {
                    divert.attach(index, way).expect("TCX");
                }
            };
            // One after the other: the other end has it at once, or never. A link that has just
            // been taken up may not pass the first.
            let passes = |number: u8| {
                let deadline = Instant::now() + Duration::from_secs(10);
                while arrived(&socket).last() != Some(&number) && Instant::now() < deadline {
                    if number == 0 {
                        send(0);
                    }
                    std::thread::yield_now();
                }
                assert!(Instant::now() < deadline, "number {number} is lost");
            };
            passes(0);
            std::thread::scope(|scope| {
                let sender = scope.spawn(|| {
                    let mut number = 1;
                    while !is_over.load(Ordering::Relaxed) {
                        send(number);
                        passes(number);
                        number = number.checked_add(1).unwrap_or(1);
                    }
                });
                for _ in 0..4 {
                    attached(&Divert::load().expect("BPF"));
                    detach(index).expect("taken off");
                }
                is_over.store(true, Ordering::Relaxed);
                sender.join().expect("none is lost");
            });
            // It outlives whoever has it.
            let divert = Divert::load().expect("BPF");
            attached(&divert);
            divert.drop_all().expect("set");
            drop(divert);
            send(1);
            assert_eq!(arrived(&socket), [0; 0]);
            // Those that end by themselves stay.
            let other = Divert::load().expect("BPF");
            let held = other.hold(index).expect("TCX");
            detach(index).expect("taken off");
            send(2);
            assert_eq!(arrived(&socket), [2]);
            other.drop_all().expect("set");
            send(3);
            assert_eq!(arrived(&socket), [0; 0]);
            drop(held);
            detach(u32::MAX).expect("there is none");
        });
    }

    #[test]
    fn no_more_wait_than_there_is_room_for() {
        with_a_link(|index, socket| {
            let divert = Divert::load().expect("BPF");
            let _held = divert.hold(index).expect("TCX");
            let tap = Tap::make(4).expect("a tap");
            divert.divert_to(tap.index()).expect("set");
            let from = UdpSocket::bind("10.9.0.1:0").expect("an address");
            for byte in 0..9 {
                drop(from.send_to(&[byte], "10.9.0.2:7"));
            }
            let mut frame = [0; 2048];
            let mut read = 0;
            while tap.read(&mut frame).expect("read").is_some() {
                read += 1;
            }
            assert_eq!(read, 4);
            assert_eq!(arrived(&socket), [0; 0]);
        });
    }
}
