//! A link whose frames are read from a descriptor: what a program of the kernel diverts to it waits
//! there until somebody reads it.
//!
//! Each frame is read whole, behind a `struct virtio_net_hdr` of [`VNET_BYTES`] that says what of
//! it a card would do yet (checksum, segments): so it can be as large as what the kernel hands from
//! one namespace to another, and is sent on by [`crate::packet::Injector`] as it was.
//!
//! Invariants: the link is there for as long as the descriptor; it has no address, and says
//! nothing by itself. Absent: writing.

#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Length of what precedes each frame.
pub const VNET_BYTES: usize = 10;

/// The link.
#[derive(Debug)]
pub struct Tap {
    file: File,
    index: u32,
}

impl Tap {
    /// Makes one in the network namespace of the calling thread, which is up. So many frames may
    /// wait in it; more are lost. Takes some milliseconds.
    pub fn make(frames_max: u16) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true);
        let file = options.custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        let mut request = request();
        // The kernel makes a number of it that is free.
        for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request takes and fills a `struct ifreq`, which lives here.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header = VNET_LENGTH;
        // SAFETY: the request reads an int, which lives here.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        let offload = libc::c_ulong::from(offload);
        // SAFETY: the request takes its flags by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) })?;
        let index = bring_up(request, frames_max)?;
        Ok(Self { file, index })
    }

    /// Its number in that network namespace.
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// The next frame that waits, with what precedes it; none if none does. One that is longer than
    /// `buffer` is cut.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Takes the new link up, which is to be silent. Returns its number.
fn bring_up(mut request: libc::ifreq, frames_max: u16) -> io::Result<u32> {
    let name = request.ifr_name.iter().flat_map(|byte| byte.to_ne_bytes());
    let name: Vec<u8> = name.collect();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    // Where there is no IPv6 nothing is said in it.
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // SAFETY: socket(2) takes no pointers; a negative result is an error, checked below.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let index = nix::net::if_::if_nametoindex(name.as_str())?;
    request.ifr_ifru.ifru_metric = libc::c_int::from(frames_max);
    // SAFETY: the request reads a `struct ifreq`, which lives here; the length is an int.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFTXQLEN as _,
            &raw mut request,
        )
    })?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: as above.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    })?;
    Ok(index)
}

fn request() -> libc::ifreq {
    // SAFETY: `struct ifreq` is a plain C struct for which all-zero is a valid value.
    unsafe { zeroed() }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

const VNET_LENGTH: libc::c_int = 10;
const DEVICE: &str = "/dev/net/tun";
/// With the zero that ends it.
const NAME: &[u8] = b"pfpark%d\0";

const _: () = assert!(VNET_LENGTH as usize == VNET_BYTES);
const _: () = assert!(NAME.len() <= libc::IFNAMSIZ);
const _: () = assert!(size_of::<libc::ifreq>() == 40);
