//! Frames that come for a workload while it stands still wait for it, instead of being dropped:
//! TCP would send them again after 200 ms, or after a second, and UDP never.
//!
//! ```text
//!             others ──► bridge ──► port ──┬──► the workload's end       passes
//!                                          └──► a link of ours ([`Lot`]) waits
//!                 the workload's end ──► port ──X                        after the freeze
//! ```
//!
//! At the source a program of the kernel at the workload's port diverts what would go to it
//! ([`filter`]): from one frame to the next, without one that is lost or doubled. It stays there
//! whoever dies, and lets nothing pass then, as a closed port would. Where the kernel has no such
//! programs, or no links to divert to, the port is closed, and what passes the bridge for the
//! workload is seen there ([`Park::hold`] says what that costs).
//!
//! At the target what comes by the workload's new links waits, too, until it has had what its
//! source kept. The program there ends with whoever holds it, and everything passes then.
//!
//! Invariants: what waits is given to the workload's own link, past bridge and programs, and to
//! nobody else; while anything waits, nothing of it has been given to the workload. Absent:
//! broadcasts and multicasts, which are given back at the source and not carried over.

pub mod datagram;
mod filter;
mod lot;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use pageferry_proto::wire::parked::ParkedFrame;
use pageferry_sys::divert::{Divert, Held};
use pageferry_sys::packet::{Capture, Injector};
use pageferry_sys::tap::Tap;
use tokio::task::spawn_blocking;

use super::LinkError;
use super::netlink::Netlink;
use super::port::{Port, index_of};
use filter::Filter;
pub use lot::Lot;
use lot::{Spot, Where};

/// How frames that come for a frozen workload are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// As well as the kernel can.
    Auto,
    /// By closed ports, and by looking at what passes the bridge.
    Capture,
    /// Not at all.
    Off,
}

/// One link of a workload at its source.
#[derive(Debug)]
pub struct Parked<'a> {
    /// This node's end.
    pub port: &'a Port,
    /// The hardware address of the workload's.
    pub mac: [u8; 6],
}

/// What keeps frames for a workload at its source.
#[derive(Debug)]
pub struct Park {
    lot: Arc<Lot>,
    /// Of each port; none where ports are closed instead.
    filters: Vec<Filter>,
}

/// One link of a workload at its target.
#[derive(Debug)]
pub struct Awaited {
    /// Its place in the offer.
    pub link: u8,
    /// This node's end.
    pub index: u32,
    /// The hardware address that it has at the source, and the one that it has here.
    pub macs: ([u8; 6], [u8; 6]),
}

/// What keeps frames for a workload at its target, and has those of its source.
#[derive(Debug)]
pub struct Await {
    lot: Lot,
    /// At what goes to the workload, until it has had what its source kept.
    gates: Vec<(Divert, Held)>,
}

impl Park {
    /// Makes what keeps frames for the workload behind `links`, in their order in the offer:
    /// nothing is kept yet. Takes some 20 ms for each, in which everything passes.
    pub async fn make(means: Means, links: &[Parked<'_>]) -> Result<Option<Self>, LinkError> {
        if links.is_empty() || means == Means::Off {
            return Ok(None);
        }
        if means == Means::Auto {
            match Self::with_filters(links).await {
                Ok(park) => return Ok(Some(park)),
                Err(error) => {
                    for link in links {
                        drop(filter::detach(link.port.ends().0).await);
                    }
                    let why = std::error::Error::source(&error);
                    tracing::info!(%error, why, "frames are kept by a look at the bridge");
                }
            }
        }
        let node = Netlink::open(None)?;
        let mut spots = Vec::new();
        for (link, Parked { port, mac }) in (0..).zip(links) {
            let bridge = index_of(&node, port.bridge()).await?;
            let seen = Capture::open(bridge, *mac, CAPTURE_BYTES_MAX).map_err(failed)?;
            let to = Injector::open(port.ends().0).map_err(failed)?;
            spots.push(Spot::new(link, Where::Bridge(seen), to, (*mac, *mac)));
        }
        let lot = Arc::new(Lot::new(spots).map_err(failed)?);
        let filters = Vec::new();
        Ok(Some(Self { lot, filters }))
    }

    async fn with_filters(links: &[Parked<'_>]) -> Result<Self, LinkError> {
        let (mut spots, mut filters) = (Vec::new(), Vec::new());
        for (link, Parked { port, mac }) in (0..).zip(links) {
            let index = port.ends().0;
            // One that a dead daemon has left would be asked behind it.
            filter::detach(index).await?;
            let made = spawn_blocking(move || {
                let tap = Tap::make(TAP_FRAMES_MAX)?;
                let filter = Filter::attach(index, tap.index())?;
                Ok::<_, std::io::Error>((tap, filter, Injector::open(index)?))
            });
            let made = made.await.map_err(std::io::Error::other);
            let (tap, filter, to) = made.flatten().map_err(failed)?;
            filters.push(filter);
            spots.push(Spot::new(link, Where::Tap(tap), to, (*mac, *mac)));
        }
        let lot = Arc::new(Lot::new(spots).map_err(failed)?);
        Ok(Self { lot, filters })
    }

    /// Whether it keeps what comes without anything that is lost, and by itself: no port need be
    /// closed, nor should be.
    pub const fn is_whole(&self) -> bool {
        !self.filters.is_empty()
    }

    /// From here on what comes is kept. Takes some microseconds, or where ports are closed, which
    /// must be done before, some more: what came in between is lost.
    pub fn hold(&self) -> Result<(), LinkError> {
        self.lot.hold().map_err(failed)?;
        self.filters.iter().try_for_each(Filter::park)
    }

    /// From here on nothing of the workload leaves either, which is frozen.
    pub fn shut(&self) -> Result<(), LinkError> {
        self.filters.iter().try_for_each(Filter::shut)
    }

    /// From here on what comes from the workload, which stays, passes.
    pub fn let_speak(&self) -> Result<(), LinkError> {
        let all = self.filters.iter().map(Filter::let_speak);
        all.fold(Ok(()), Result::and)
    }

    /// Where ports are closed, they are about to be opened: what is kept stays, and what comes from
    /// here on is not seen any more.
    pub fn stop(&self) {
        if !self.is_whole() {
            self.lot.stop();
        }
    }

    /// Gives the workload, which runs, and whose ports are open, what was kept; from here on
    /// everything passes.
    pub fn deliver(&self) -> Result<(), LinkError> {
        // What it answers must not be lost.
        let speaks = self.let_speak();
        let passed = self.lot.deliver(|| {
            let passed = self.filters.iter().map(Filter::pass);
            passed.fold(Ok(()), Result::and)
        });
        speaks.and(passed)
    }

    /// The target is about to be told to run the workload. Where ports are closed a frame may reach
    /// it there, too, and is seen here all the same: only what may come twice is kept then.
    pub fn commit(&self) {
        if !self.is_whole() {
            self.lot.keep_repeatable();
        }
    }

    /// What waits, and says when something comes.
    pub fn lot(&self) -> Arc<Lot> {
        Arc::clone(&self.lot)
    }
}

/// Lets what passes the ports pass for good, whoever has kept it.
pub async fn end(ports: &[Port]) -> Result<(), LinkError> {
    let mut all = Ok(());
    for port in ports {
        all = all.and(filter::detach(port.ends().0).await);
    }
    all
}

impl Await {
    /// Makes what keeps what comes by these links, from here on. Where the kernel cannot divert it,
    /// it passes; then it may overtake what was kept at the source. Blocks for some 10 ms.
    pub fn make(links: &[Awaited]) -> Result<Self, LinkError> {
        let diverted = links.iter().map(divert).collect::<Result<Vec<_>, _>>();
        let diverted = diverted.inspect_err(|error| {
            tracing::info!(%error, "what comes for a workload may overtake what was kept for it");
        });
        let mut taps = Vec::new();
        let mut gates = Vec::new();
        for (tap, divert, held) in diverted.unwrap_or_default() {
            taps.push(Where::Tap(tap));
            gates.push((divert, held));
        }
        taps.resize_with(links.len(), || Where::Nowhere);
        let mut spots = Vec::new();
        for (Awaited { link, index, macs }, from) in links.iter().zip(taps) {
            let to = Injector::open(*index).map_err(failed)?;
            spots.push(Spot::new(*link, from, to, *macs));
        }
        let lot = Lot::new(spots).map_err(failed)?;
        lot.hold_but_neighbours();
        Ok(Self { lot, gates })
    }

    /// Gives the workload a frame that its source has kept.
    pub fn inject(&self, frame: ParkedFrame) {
        self.lot.inject(frame);
    }

    /// Gives the workload what came here; from here on everything passes. Doing it twice does no
    /// harm.
    pub fn deliver(&mut self) -> Result<(), LinkError> {
        let gates = std::mem::take(&mut self.gates);
        self.lot.deliver(|| {
            let opened = gates.iter().map(|(gate, _)| gate.pass());
            opened.fold(Ok(()), Result::and).map_err(failed)
        })
    }
}

fn divert(link: &Awaited) -> std::io::Result<(Tap, Divert, Held)> {
    let tap = Tap::make(TAP_FRAMES_MAX)?;
    let divert = Divert::load()?;
    divert.divert_to(tap.index())?;
    let held = divert.hold(link.index)?;
    Ok((tap, divert, held))
}

fn failed(source: std::io::Error) -> LinkError {
    LinkError::Io {
        action: "keeping what comes for a workload that stands still",
        source,
    }
}

/// Most frames that wait to be read: what reads them is a thread that does nothing else.
const TAP_FRAMES_MAX: u16 = 4096;

/// The same of those that are seen at a bridge, in bytes as the kernel counts them (16 MiB).
const CAPTURE_BYTES_MAX: usize = 16 << 20;
