//! A gate on what leaves by a link: while it is shut, only what bears a mark passes.
//!
//! It is a program of the kernel, attached by TCX, that looks at a number. Whoever has both,
//! program and number, holds the gate; both can be handed to another process.
//!
//! Invariant: when the last of those who hold it ends, it is gone, and everything passes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::bpf::{Number, attach_egress, load_classifier};

/// The gate of one link.
#[derive(Debug)]
pub struct Gate {
    /// Detaches the program when the last descriptor of its kind is closed.
    link: Option<OwnedFd>,
    /// 0: it is open.
    is_shut: Number,
}

impl Gate {
    /// Attaches one, which is open, to the link `index` of the network namespace that the calling
    /// thread is in. What bears the mark `passes` always does. Blocks for some 16 ms.
    pub fn attach(index: u32, passes: i32) -> io::Result<Self> {
        let is_shut = Number::new()?;
        let program = load_classifier(&program(&is_shut, passes), c"MIT", [0; 16])?;
        let link = Some(attach_egress(&program, index)?);
        Ok(Self { link, is_shut })
    }

    /// That of another process, by [`Gate::descriptors`].
    pub fn from_descriptors([link, is_shut]: [OwnedFd; 2]) -> io::Result<Self> {
        let (link, is_shut) = (Some(link), Number::from_fd(is_shut)?);
        Ok(Self { link, is_shut })
    }

    /// What another process needs to hold it, too.
    pub fn descriptors(&self) -> io::Result<[BorrowedFd<'_>; 2]> {
        let link = self.link.as_ref();
        let link = link.ok_or_else(|| io::Error::other("it is detached"))?;
        Ok([link.as_fd(), self.is_shut.as_fd()])
    }

    /// From here on nothing passes. Takes some microseconds.
    pub fn shut(&self) -> io::Result<()> {
        self.is_shut.set(1)
    }

    /// From here on everything passes. Doing it twice does no harm.
    pub fn open(&self) -> io::Result<()> {
        self.is_shut.set(0)
    }
}

impl Drop for Gate {
    /// Detaches it, unless another process holds it, too; on a thread of its own, for it takes some
    /// 8 ms. Without one it is detached here.
    fn drop(&mut self) {
        let link = self.link.take();
        let detach = std::thread::Builder::new().name("detach".to_owned());
        if let Err(error) = detach.spawn(move || drop(link)) {
            tracing::debug!(%error, "no thread to detach a gate");
        }
    }
}

/// `mark == passes || is_shut == 0 ? TCX_NEXT : TCX_DROP`.
fn program(is_shut: &Number, passes: i32) -> [u64; 16] {
    let is_shut = is_shut.as_fd().as_raw_fd();
    [
        // r0 = context->mark; if it is that: next.
        instruction(0x61, (0, 1), MARK_OFFSET, 0),
        instruction(0x15, (0, 0), 10, passes),
        // The key 0 on the stack, and where it is.
        instruction(0x62, (10, 0), -4, 0),
        instruction(0xbf, (2, 10), 0, 0),
        instruction(0x07, (2, 0), 0, -4),
        // r1 = the map (two words); r0 = bpf_map_lookup_elem(r1, r2).
        instruction(0x18, (1, 1), 0, is_shut),
        0,
        instruction(0x85, (0, 0), 0, 1),
        // There is always one, but the verifier does not know. If it is 0: next. Else: drop.
        instruction(0x15, (0, 0), 3, 0),
        instruction(0x61, (0, 0), 0, 0),
        instruction(0x15, (0, 0), 1, 0),
        instruction(0x05, (0, 0), 2, 0),
        // Next.
        instruction(0xb7, (0, 0), 0, TCX_NEXT),
        EXIT,
        // Drop.
        instruction(0xb7, (0, 0), 0, TCX_DROP),
        EXIT,
    ]
}

/// `struct bpf_insn`.
pub(crate) fn instruction(code: u8, (to, from): (u8, u8), offset: i16, number: i32) -> u64 {
    let [low, high] = offset.to_ne_bytes();
    let [a, b, c, d] = number.to_ne_bytes();
    let registers = match cfg!(target_endian = "little") {
        true => from << 4 | to,
        false => to << 4 | from,
    };
    u64::from_ne_bytes([code, registers, low, high, a, b, c, d])
}

pub(crate) const EXIT: u64 = u64::from_ne_bytes([0x95, 0, 0, 0, 0, 0, 0, 0]);

/// Of `mark` in `struct __sk_buff`.
const MARK_OFFSET: i16 = 8;
pub(crate) const TCX_NEXT: i32 = -1;
pub(crate) const TCX_DROP: i32 = 2;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;
    use crate::namespace::{NamespaceKind, create, run_inside};

    const MARK: u32 = 0x77;

    /// Runs `test` on a thread in a network namespace of its own, of which `lo` is up.
    fn in_a_network(test: impl FnOnce() + Send) {
        let net = create(&[NamespaceKind::Net]).expect("root may unshare");
        run_inside(&[(NamespaceKind::Net, net[0].as_fd())], || {
            let mut up = std::process::Command::new("ip");
            let up = up.args(["link", "set", "lo", "up"]).status();
            assert!(up.expect("iproute2").success());
            test();
        })
        .expect("enter");
    }

    /// Whether a datagram that is marked so arrives. What is sent over `lo` is there at once.
    fn passes(mark: u32) -> bool {
        let made = || UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let (from, to) = (made(), made());
        to.set_nonblocking(true).expect("a socket");
        setsockopt(&from, sockopt::Mark, &mark).expect("CAP_NET_ADMIN");
        // That a packet is dropped may be an error here, or not.
        let _ = from.send_to(b"x", to.local_addr().expect("an address"));
        to.recv(&mut [0]).is_ok()
    }

    #[test]
    fn only_what_is_marked_passes_a_gate_that_is_shut() {
        in_a_network(|| {
            let gate = Gate::attach(1, 0x77).expect("TCX");
            let all = || [passes(0), passes(MARK), passes(MARK + 1)];
            assert_eq!(all(), [true, true, true]);
            gate.shut().expect("shut");
            assert_eq!(all(), [false, true, false]);
            gate.open().expect("open");
            assert_eq!(all(), [true, true, true]);
        });
    }

    #[test]
    fn whoever_has_its_descriptors_holds_it_and_its_end_opens_it() {
        in_a_network(|| {
            let gate = Gate::attach(1, 0x77).expect("TCX");
            let other = Gate::attach(1, 0x77).expect("a second one beside it");
            gate.shut().expect("shut");
            drop(other);
            let theirs = gate.descriptors().expect("it is attached");
            let theirs = theirs.map(|fd| fd.try_clone_to_owned().expect("a descriptor"));
            drop(gate);
            assert!(!passes(0));
            let theirs = Gate::from_descriptors(theirs).expect("a gate");
            theirs.open().expect("open");
            assert!(passes(0));
            theirs.shut().expect("shut");
            drop(theirs);
            // The threads that detach need their time.
            let deadline = Instant::now() + Duration::from_secs(30);
            while !passes(0) {
                assert!(Instant::now() < deadline, "nobody holds it");
                std::thread::yield_now();
            }
        });
    }
}
